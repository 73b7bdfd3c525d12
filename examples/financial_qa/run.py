"""Question answering with QLoRA: tokens of its own around the answer, and a loss on the answer alone."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pyquant.cli import run
from pyquant.demo.examples import Overrides, Small, before_and_after, example_config, write_results
from pyquant.generation import generate_batch
from pyquant.training import train
from pyquant.training.data import load_splits
from pyquant.training.tokens import prompt_and_answer

HERE = Path(__file__).parent
SCORES = {
    "perplexity": "perplexity of the answers",
    "token_accuracy": "token accuracy",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
    "ended": "answers that end by themselves",
    "general_perplexity": "perplexity of general text",
}


def main(
    overrides: Overrides = None,
    small: Small = False,
    show: Annotated[int, typer.Option(min=1, help="Held-out questions to show answers of.")] = 5,
) -> None:
    """Fine-tune on questions and answers, and answer held-out questions before and after.

    A prompt is the question and <response>; generation stops at <response|end>.
    """
    console = Console()
    config = example_config(HERE, "questions", small, overrides)
    trained = train(config, console)
    model, tokenizer, metrics = trained.model, trained.tokenizer, trained.metrics

    _, held_out = load_splits(config.data, config.training.seed)
    pairs = [prompt_and_answer(row, tokenizer, config.data) for row in held_out.select(range(min(show, len(held_out))))]
    prompts = [prompt for prompt, _ in pairs]
    limit = config.evaluation.max_new_tokens
    after = generate_batch(model, tokenizer, prompts, limit, chat_template="never")
    with model.disable_adapter():  # and without the trained rows of the two tokens: the model before
        before = generate_batch(model, tokenizer, prompts, limit, chat_template="never")

    examples = []
    for (prompt, reference), first, last in zip(pairs, before, after, strict=True):
        examples.append(
            {
                "question": prompt.partition("<response>")[0],
                "reference": reference,
                "before": first.text,
                "after": last.text,
                "ended": last.ended,
                "tokens": last.tokens,
            }
        )
        for key, value in examples[-1].items():
            console.print(f"{key:>10}  {value}", highlight=False, markup=False)
        console.print()
    console.print(before_and_after(metrics, SCORES), soft_wrap=True, highlight=False)
    file = write_results(config, metrics | {"examples": examples})
    console.print(f"Results: {file}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run(main)
