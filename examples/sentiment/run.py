"""Sentiment in seven labels, learned with LoRA on 16-bit weights and with QLoRA on 4-bit weights, side by side."""

from pathlib import Path

from infer import load
from rich.console import Console

from pyquant.cli import run
from pyquant.demo.examples import Overrides, Small, example_config, markdown_table, write_results
from pyquant.training import train

HERE = Path(__file__).parent
METHODS = {"lora": "LoRA, 16-bit weights", "qlora": "QLoRA, 4-bit weights"}
SCORES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "perplexity": "perplexity of the answers",
    "general_perplexity": "perplexity of general text",
}
TRY = ("A quiet film that stays with you.", "Two hours that I will never get back.", "It is what it is.")


def main(overrides: Overrides = None, small: Small = False) -> None:
    """Fine-tune with LoRA and with QLoRA, compare labels before and after, and use the result.

    Leaves a folder for each of the two with its adapter, confusion-before.png and confusion.png, and results.json.
    """
    console = Console()
    results = {}
    for method in METHODS:
        config = example_config(HERE, "sentiment", small, overrides)
        output = Path(config.training.output_dir)
        config.training.method, config.training.output_dir = method, str(output / method)
        results[method] = train(config, console).metrics

    config.training.output_dir = str(output)
    rows = []
    for key, title in SCORES.items():
        cells = [results[method][when].get(key, "") for method in METHODS for when in ("before", "after")]
        rows.append([title, *cells])
    header = ["", *(f"{title}, {when}" for title in METHODS.values() for when in ("before", "after"))]
    console.print(markdown_table(header, rows), soft_wrap=True, highlight=False)

    infer_sentiment = load(output / "qlora")
    instruction = "What is the sentiment of this movie review?" if small else "What is the sentiment of this news?"
    for text in TRY:
        console.print(f"{text}  →  {infer_sentiment(instruction, text)}", highlight=False)
    console.print(f"Results: {write_results(config, results)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run(main)
