"""What a results file says about itself: the machine, the versions, the commit and the command."""

import datetime
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from pyquant.environment import describe

__all__ = ["provenance"]


def provenance(arguments: dict) -> dict:
    """The provenance of what the running command measures with `arguments`.

    In ``command`` an absolute path is its file name alone: a machine's folders say nothing about the measurement.

    ``commit`` is that of the checkout which this file is in, or ``PYQUANT_COMMIT`` of the environment where there is
    none; None where neither is known.
    """
    return {
        "environment": describe(),
        "gpu": _gpu(),
        "commit": _commit(),
        "command": _command(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "arguments": arguments,
    }


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _commit() -> str | None:
    # An installed package may lie in a virtual environment inside some other project's checkout.
    top = _run("git", "rev-parse", "--show-toplevel")
    if top and Path(top).resolve() == Path(__file__).resolve().parents[2]:
        commit = _run("git", "describe", "--always", "--dirty")
        if commit:
            return commit
    return os.environ.get("PYQUANT_COMMIT") or None


def _command() -> str:
    program = Path(sys.argv[0])
    examples = Path(__file__).resolve().parents[2] / "examples"
    if program.parent.name == "benchmarks":
        start = ["python", "-m", f"benchmarks.{program.stem}"]
    elif examples in program.resolve().parents:
        start = ["python", str(program.resolve().relative_to(examples.parent))]
    else:
        start = [program.name]
    return shlex.join([*start, *map(_portable, sys.argv[1:])])


def _portable(word: str) -> str:
    """An argument without this machine's folders: an absolute path becomes its file name, behind ``--output=``,
    ``model.path=`` or ``-o`` too."""
    found = re.fullmatch(r"(-\w|[\w.-]+=)?(/.+)", word, re.DOTALL)
    return (found[1] or "") + (Path(found[2]).name or "/") if found else word


def _gpu() -> dict[str, str] | None:
    """The current GPU's name, driver, clocks and power limit; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    result = {
        "name": properties.name,
        "CUDA runtime of torch": torch.version.cuda,
        "multiprocessors": str(properties.multi_processor_count),
        "L2 cache": f"{properties.L2_cache_size / 2**20:.0f} MiB",
    }
    queries = {
        "driver": "driver_version",
        "SM clock": "clocks.sm",
        "highest SM clock": "clocks.max.sm",
        "memory clock": "clocks.mem",
        "power limit": "power.limit",
    }
    answer = _run(
        "nvidia-smi",
        f"--id=GPU-{properties.uuid}",
        f"--query-gpu={','.join(queries.values())}",
        "--format=csv,noheader",
    )
    if answer:
        result |= dict(zip(queries, (value.strip() for value in answer.splitlines()[0].split(",")), strict=False))
    return result
