"""Writing prompts for a role: plain language modelling on pairs of act and prompt, and one prompt before and after."""

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from pyquant.cli import run
from pyquant.demo.examples import Overrides, Small, before_and_after, example_config, write_results
from pyquant.generation import generate_batch
from pyquant.training import train
from pyquant.training.data import row_prompt

HERE = Path(__file__).parent
ACTS = {True: ["tech support", "science", "psychology"], False: ["Astronomer", "Sommelier", "Train Conductor"]}
SCORES = {
    "perplexity": "perplexity of held-out pairs",
    "token_accuracy": "token accuracy",
    "general_perplexity": "perplexity of general text",
}


def main(
    overrides: Overrides = None,
    small: Small = False,
    act: Annotated[Optional[list[str]], typer.Option(help="A role to write for; may be repeated.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
) -> None:
    """Fine-tune on act and prompt, with the batch size found by trying, and write for some acts before and after."""
    console = Console()
    config = example_config(HERE, "roles", small, overrides)
    trained = train(config, console)
    model, tokenizer, metrics = trained.model, trained.tokenizer, trained.metrics

    acts = act or ACTS[small]
    prompts = [row_prompt({"act": one}, tokenizer, config.data) for one in acts]
    after = generate_batch(model, tokenizer, prompts, max_new_tokens, chat_template="never")
    with model.disable_adapter():
        before = generate_batch(model, tokenizer, prompts, max_new_tokens, chat_template="never")
    examples = []
    for prompt, first, last in zip(prompts, before, after, strict=True):
        examples.append({"prompt": prompt, "before": first.text, "after": last.text, "ended": last.ended})
        for title, text in (("", prompt), ("before: ", first.text), ("after:  ", last.text)):
            console.print(f"{title}{text}", highlight=False, markup=False)
        console.print()
    console.print(before_and_after(metrics, SCORES), soft_wrap=True, highlight=False)
    batch = f"{metrics['batch_size']} rows × {metrics['gradient_accumulation']} forward passes"
    console.print(f"Batch size found: {batch}", highlight=False)
    file = write_results(config, metrics | {"examples": examples})
    console.print(f"Results: {file}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run(main)
