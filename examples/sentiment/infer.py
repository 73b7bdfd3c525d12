"""The label of a text, from a model that run.py has trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pyquant.cli import run
from pyquant.generation import load_for_inference
from pyquant.training import ModelError, load_config
from pyquant.training.data import row_prompt
from pyquant.training.evaluate import rank_labels


def load(folder: Path) -> Callable[[str, str], str]:
    """Load a run of run.py, and return infer_sentiment(instruction, text), which gives the likeliest of the labels.

    Args:
        folder: the run's, with config.yaml, metrics.json and adapter/.

    Raises:
        ModelError: the run has not ended, or ranked no labels.
    """
    config = load_config(folder / "config.yaml")
    metrics = folder / "metrics.json"
    labels = (
        (json.loads(metrics.read_text(encoding="utf-8"))["after"] or {}).get("labels") if metrics.is_file() else None
    )
    if labels is None:
        raise ModelError(f"{folder} holds no finished run with evaluation.classify; start run.py with it once more.")
    model, tokenizer = load_for_inference(config.model.path, str(folder / "adapter"))

    def infer_sentiment(instruction: str, text: str) -> str:
        prompt = row_prompt({"instruction": instruction, "input": text}, tokenizer, config.data)
        return labels[rank_labels(model, tokenizer, [prompt], labels)[0]]

    return infer_sentiment


def main(
    text: Annotated[list[str], typer.Argument(help="One text or several.", show_default=False)],
    folder: Annotated[Path, typer.Option("--run", help="Folder of a run.")] = Path("runs/sentiment/qlora"),
    instruction: Annotated[str, typer.Option(help="As in training.")] = "What is the sentiment of this movie review?",
) -> None:
    """Print the label of each text."""
    infer_sentiment = load(folder)
    for one in text:
        typer.echo(f"{infer_sentiment(instruction, one)}\t{one}")


if __name__ == "__main__":
    run(main)
