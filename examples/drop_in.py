"""A fine-tuning script written for bitsandbytes, and the same with pyquant: their difference, and what each trains."""

import difflib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from pyquant.bench.provenance import provenance
from pyquant.cli import run
from pyquant.demo.tasks import write_task
from pyquant.training import ConfigError, UserError

FOLDER = Path(__file__).parent / "drop_in"
SCRIPTS = {"bitsandbytes": FOLDER / "before.py", "pyquant": FOLDER / "after.py"}


def main(
    model: Annotated[Optional[str], typer.Option(help="Folder or hub name of a model.")] = None,  # noqa: UP045
    data: Annotated[Optional[Path], typer.Option(help="JSONL of instruction, input and output.")] = None,  # noqa: UP045
    small: Annotated[bool, typer.Option("--small", help="A 135M model and small data, for a CPU, offline.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each.")] = 10,
    output: Annotated[Path, typer.Option("--output", "-o", help="The result as JSON.")] = Path("runs/drop-in.json"),
) -> None:
    """Show the difference between the two scripts, run both, and show their losses and times."""
    console = Console()
    if small:
        files = write_task("sentiment")
        model, data = model or files["model.path"], data or Path(files["data.train"])
    if model is None or data is None:
        raise ConfigError("no model or no data is named; give --model and --data, or --small.")
    texts = [script.read_text(encoding="utf-8").splitlines(keepends=True) for script in SCRIPTS.values()]
    names = [f"drop_in/{script.name}" for script in SCRIPTS.values()]
    for line in difflib.unified_diff(*texts, *names, n=0):
        console.print(line, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    results = {}
    for library, script in SCRIPTS.items():
        if importlib.util.find_spec(library) is None:
            console.print(f"{library:>12}  not installed, so not run: pip install {library}", highlight=False)
            continue
        command = [sys.executable, str(script), model, str(data), str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.search(r"^([\d.]+) s a step; losses (.*)$", done.stdout, re.MULTILINE)
        if done.returncode or not found:
            raise UserError(f"{script.name} failed: {(done.stderr.strip() or 'no result').splitlines()[-1]}")
        console.print(f"{library:>12}  {found[0]}", highlight=False, soft_wrap=True)
        results[library] = {"seconds_per_step": float(found[1]), "losses": json.loads(found[2])}
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(provenance({"model": model, "data": str(data), "steps": steps}) | {"results": results}, indent=2)
    output.write_text(text.replace(f'"{Path.home()}/', '"~/') + "\n", encoding="utf-8")
    console.print(f"Results: {output}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run(main)
