"""Runs in several processes, which accelerate starts; and what a process asks about the others."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from .errors import ConfigError, require

__all__ = ["is_main_process", "launch", "uses_fsdp"]


def launch(engine: str | Path, words: list[str]) -> int:
    """Starts a pyquant command in the processes that an accelerate configuration file asks for.

    Args:
        engine: the file; ``accelerate config`` writes one, and examples/distributed/ has some.
        words: the command and its arguments.

    Returns:
        The exit code.

    Raises:
        ConfigError: there is no such file.
        UserError: accelerate is not installed, or DeepSpeed where the file asks for it.
    """
    if not Path(engine).is_file():
        raise ConfigError(f"the accelerate configuration {engine} does not exist; examples/distributed/ has some.")
    require("accelerate")
    if (yaml.safe_load(Path(engine).read_text(encoding="utf-8")) or {}).get("distributed_type") == "DEEPSPEED":
        require("deepspeed", None)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(engine)]
    return subprocess.run([*command, "--module", "pyquant.cli", *words]).returncode


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def uses_fsdp() -> bool:
    """Whether accelerate shards the model."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
