"""Full, partial, LoRA and QLoRA fine-tuning on one task: what each learns, forgets and costs, in a table and a plot."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pyquant.cli import run
from pyquant.demo.examples import Overrides, Small, example_config, markdown_table, write_results
from pyquant.training import Config, ConfigError
from pyquant.training.config import to_dict
from pyquant.training.plots import plot_bars

HERE = Path(__file__).parent
# An adapter starts from zero and takes larger steps than weights that have been trained already.
LEARNING_RATES = {
    True: {"full": 1e-4, "partial": 3e-4, "lora": 1e-3, "qlora": 1e-3},
    False: {"full": 1e-5, "partial": 2e-5, "lora": 2e-4, "qlora": 2e-4},
}
COLUMNS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "forgetting": "perplexity of general text, × before",
    "peak_gb": "peak memory, GB",
    "seconds": "training, s",
    "saved_mb": "saved, MB",
}


def main(
    overrides: Overrides = None,
    small: Small = False,
    methods: Annotated[str, typer.Option(help="Which to run, separated by commas.")] = "full,partial,lora,qlora",
) -> None:
    """Fine-tune with every method, each in a process of its own, and compare.

    A method whose run has ended already is not run again; remove its folder to train it anew. One that fails, for
    want of memory or of disk space for instance, gets a row that says why, and the others go on.
    """
    console = Console()
    config = example_config(HERE, "sentiment", small, overrides)
    output = Path(config.training.output_dir)
    rates = LEARNING_RATES[small]
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        if name not in rates:
            raise ConfigError(f"{name} is none of the methods {', '.join(rates)}; correct --methods.")
    results = {}
    for name in names:
        config.training.method, config.training.output_dir = name, str(output / name)
        config.training.learning_rate = rates[name]
        results[name] = fine_tune(config, console)

    config.training.output_dir = str(output)
    rows = [[name, *(row.get(key, "") for key in COLUMNS), row.get("note", "")] for name, row in results.items()]
    console.print(markdown_table(["method", *COLUMNS.values(), ""], rows), soft_wrap=True, highlight=False)
    file = write_results(config, results)
    done = {name: row for name, row in results.items() if "accuracy" in row}
    if done:
        panels = {title: [row.get(key) for row in done.values()] for key, title in COLUMNS.items()}
        plot_bars(list(done), panels, output / "methods.png")
    console.print(f"Results: {file}", highlight=False, soft_wrap=True)
    if not done:
        sys.exit(1)  # no method has a result: a script that runs this one must not take the table for a comparison


def fine_tune(config: Config, console: Console) -> dict[str, Any]:
    """Run `pyquant train` in a process of its own, whose peak memory is the method's, and return a row of the table."""
    folder = Path(config.training.output_dir)
    metrics = finished(folder)
    if metrics is not None:
        console.print(f"{folder} holds a finished run: not run again", highlight=False)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        settings = folder / "run.json"
        settings.write_text(json.dumps(to_dict(config)), encoding="utf-8")
        command = [sys.executable, "-m", "pyquant.cli", "train", str(settings)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if "OutOfMemoryError" in done.stderr or done.returncode == -9:  # -9: how Linux ends what takes the last memory
            return {"note": "out of memory"}
        if done.returncode:
            sys.stderr.write(done.stderr)
            return {"note": reason(done)}
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    before, after = metrics["before"], metrics["after"]
    weights = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    row = {
        "accuracy": after["accuracy"],
        "macro_f1": after["macro_f1"],
        "seconds": metrics["train_seconds"],
        "saved_mb": sum(weight.stat().st_size for weight in weights) / 1e6,
    }
    if metrics["peak_memory_bytes"] is not None:
        row["peak_gb"] = metrics["peak_memory_bytes"] / 1e9
    if "general_perplexity" in after:
        row["forgetting"] = after["general_perplexity"] / before["general_perplexity"]
    if metrics["resumed_from_step"]:
        row["note"] = f"resumed at step {metrics['resumed_from_step']}; time and memory are of the rest"
    return row | {"learning_rate": config.training.learning_rate, "metrics": metrics}


def finished(folder: Path) -> dict[str, Any] | None:
    """The metrics of a run that has ended; None of one that has not, or that was killed while it wrote them."""
    try:
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process failed: the last line of what it wrote to standard error, as `pyquant train` ends with it."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else f"the process ended with {done.returncode}"


if __name__ == "__main__":
    run(main)
