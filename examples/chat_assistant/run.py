"""A chat assistant from end to end: fine-tune in the chat template, evaluate, merge, and answer in batches."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pyquant.cli import run
from pyquant.demo.examples import Overrides, Small, before_and_after, example_config, markdown_table, write_results
from pyquant.generation import generate_batch, load_for_inference
from pyquant.training import train
from pyquant.training.data import load_splits
from pyquant.training.tokens import prompt_and_answer

HERE = Path(__file__).parent
SCORES = {
    "perplexity": "perplexity of the assistant's turns",
    "token_accuracy": "token accuracy",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
    "ended": "answers that end by themselves",
    "general_perplexity": "perplexity of general text",
}


def main(
    overrides: Overrides = None,
    small: Small = False,
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions to answer.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 16,
    compiled: Annotated[bool, typer.Option(help="Also answer with a compiled step.")] = True,
) -> None:
    """Fine-tune on conversations, evaluate before and after, merge, and compare three ways to answer.

    One question at a time, several, and several with a compiled step: on the merged model, in 16 bits.
    """
    console = Console()
    config = example_config(HERE, "chats", small, overrides)
    metrics = train(config, console).metrics
    merged = Path(config.training.output_dir) / "merged"
    model, tokenizer = load_for_inference(str(merged), precision=config.model.precision)

    _, held_out = load_splits(config.data, config.training.seed)
    rows = [held_out[i] for i in range(min(questions, len(held_out)))]
    pairs = [prompt_and_answer(row, tokenizer, config.data) for row in rows]
    prompts = [prompt for prompt, _ in pairs]
    limit = config.evaluation.max_new_tokens

    ways = {"one at a time": (1, False), "batched": (batch_size, False)}
    ways |= {"batched and compiled": (batch_size, True)} if compiled else {}
    speeds, answers = {}, {}
    for way, (size, compile_step) in ways.items():
        # The first time compiles; the speed is that of the second.
        for _ in range(1 + compile_step):
            start = time.perf_counter()
            answers[way] = generate_batch(model, tokenizer, prompts, limit, size, "never", compiled=compile_step)
            seconds = time.perf_counter() - start
        tokens = sum(answer.tokens for answer in answers[way])
        same = sum(a.text == b.text for a, b in zip(answers[way], answers["one at a time"], strict=True))
        speeds[way] = {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds, "same": same}

    for (_, reference), row, answer in list(zip(pairs, rows, answers["batched"], strict=True))[:5]:
        said = [message["content"] for message in row["messages"] if message["role"] == "user"][-1]
        for who, text in (("user", said), ("reference", reference), ("assistant", answer.text)):
            console.print(f"{who:>10}  {text}", highlight=False, markup=False)
        console.print()
    console.print(before_and_after(metrics, SCORES), soft_wrap=True, highlight=False)
    table = [[way, *speed.values()] for way, speed in speeds.items()]
    header = ["answering", "s", "tokens", "tokens/s", f"same answer as one at a time, of {len(prompts)}"]
    console.print(markdown_table(header, table), soft_wrap=True, highlight=False)
    file = write_results(config, metrics | {"inference": speeds})
    console.print(f"Results: {file}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run(main)
