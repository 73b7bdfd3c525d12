"""Runs an example's script as a person does."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a two-layer Mistral with random weights and a tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-mistral"))


@pytest.fixture
def example(tmp_path, skip_without_assets):
    """Runs a script under examples/ in a new folder; its output, unless another exit code is expected."""

    def run(script, *words, code=0):
        command = [sys.executable, str(EXAMPLES / script), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False)
        if done.returncode == 1 and "cannot be fetched" in done.stderr:
            skip_without_assets(done.stderr.strip().splitlines()[-1])
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout if code == 0 else done.stderr

    return run
