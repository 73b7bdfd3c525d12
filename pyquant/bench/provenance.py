"""What a results file says about itself: the machine, the versions, the commit and the command."""

import argparse
import datetime
import subprocess
import sys
from pathlib import Path

from pyquant.environment import describe

__all__ = ["provenance"]


def provenance(module: str, arguments: argparse.Namespace) -> dict:
    """The provenance of what ``python -m benchmarks.<module>`` measures now, with `arguments`."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return {
        "environment": describe(),
        "commit": commit.stdout.strip() or None,
        "command": f"python -m benchmarks.{module} " + " ".join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "arguments": {name: value for name, value in vars(arguments).items() if name != "output"},
    }
