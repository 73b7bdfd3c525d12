import re
from pathlib import Path

import pytest

from pyquant.demo.tasks import TASKS
from pyquant.training.config import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = ("sentiment", "financial_qa", "role_prompts", "chat_assistant", "choose_a_method")
FILES = sorted(file for folder in FOLDERS for file in (EXAMPLES / folder).glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_the_configuration_is_valid(file):
    config = load_config(file)
    assert config.model.path
    assert config.data.train
    assert config.quantization.method == "nf4"
    # An example does not continue another one's run.
    others = [load_config(other).training.output_dir for other in FILES if other != file]
    assert config.training.output_dir not in others


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_example_has_both_sizes_and_tells_how_it_is_run(folder):
    readme = (EXAMPLES / folder / "README.md").read_text(encoding="utf-8")
    assert f"python examples/{folder}/run.py --small\n" in readme.replace("  ", "\n")
    assert "(mistral-7b.yaml)" in readme
    small, full = (load_config(EXAMPLES / folder / name) for name in ("small.yaml", "mistral-7b.yaml"))
    assert full.model.path.startswith("mistralai/")
    # What --small fetches is what the file names, where the cache is the usual one.
    task = Path(small.data.train).relative_to(Path("~/.cache/pyquant").expanduser()).parts[0]
    assert task in TASKS


def test_the_demo_example_is_the_demos():
    import pyquant.demo

    demo = load_config(Path(pyquant.demo.__file__).with_name("sentiment.yaml"))
    assert load_config(EXAMPLES / "sentiment" / "demo.yaml") == demo


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/README.md")), ids=lambda file: file.parent.name)
def test_every_link_leads_to_a_file(file):
    targets = re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (file.parent / target).exists()] == []
