"""Runs in several processes, which accelerate starts; and what a process asks about the others."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from .errors import ConfigError, require

if TYPE_CHECKING:
    import torch

__all__ = ["input_device", "is_main_process", "launch", "leave", "uses_fsdp"]


def launch(engine: str | Path, words: list[str]) -> int:
    """Starts a pyquant command in the processes that an accelerate configuration file asks for.

    Args:
        engine: the file; ``accelerate config`` writes one, and examples/distributed/ has some.
        words: the command and its arguments.

    Returns:
        The exit code.

    Raises:
        ConfigError: there is no such file, or it is not YAML.
        UserError: accelerate is not installed, or DeepSpeed where the file asks for it.
    """
    if not Path(engine).is_file():
        raise ConfigError(f"the accelerate configuration {engine} does not exist; examples/distributed/ has some.")
    require("accelerate")
    try:
        settings = yaml.safe_load(Path(engine).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the accelerate configuration {engine} is not valid YAML; correct it.") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"the accelerate configuration {engine} holds no keys; `accelerate config` writes one.")
    if settings.get("distributed_type") == "DEEPSPEED":
        require("deepspeed", None)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(engine)]
    return subprocess.run([*command, "--module", "pyquant.cli", *words]).returncode


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def leave() -> None:
    """Parts from the other processes: one that just ended could take its communication threads down as they run."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def uses_fsdp() -> bool:
    """Whether accelerate shards the model."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def input_device(model: "torch.nn.Module") -> "torch.device":
    """Where a model computes: not where its weights are, if FSDP2 keeps them in CPU memory between uses."""
    import torch

    weight = next(model.parameters())
    mesh = getattr(weight, "device_mesh", None)  # of a sharded weight
    return weight.device if mesh is None else torch.device(mesh.device_type)
