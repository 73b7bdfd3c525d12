"""The demonstration job: quantize a small real Mistral, fine-tune it on sentiment, and compare before and after."""

import json
import shutil
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from ..environment import describe
from ..training.config import Config, parse_config
from ..training.data import load_rows, render_prompt
from ..training.errors import ConfigError, require
from ..training.evaluate import accuracy, perplexity, rank_labels
from ..training.memory import format_bytes, linear_bytes, weight_bytes
from ..training.models import load_base, load_tokenizer, quantize
from ..training.train import make_deterministic, train
from .assets import cache_folder, model_folder
from .sentiment import LABELS, news_passages, polarity, write_splits

__all__ = ["Sizes", "demo", "prepare"]


@dataclass
class Sizes:
    """How much the demo does; ``small`` is for tests, too little to learn anything."""

    held_out: int = 200
    passages: int = 8
    passage_tokens: int = 512
    steps: int | None = None

    @classmethod
    def small(cls) -> "Sizes":
        return cls(held_out=16, passages=1, passage_tokens=64, steps=3)


def prepare(output: Path, sizes: Sizes, assets: Path | None = None) -> Config:
    """Fetch and convert what is not there yet, and return the run's configuration."""
    config = parse_config(yaml.safe_load(files(__package__).joinpath("sentiment.yaml").read_text(encoding="utf-8")))
    config.model.path = str(model_folder(assets))
    folder = cache_folder() / "sentiment" / f"heldout-{sizes.held_out}"
    train_file, _ = write_splits(folder, sizes.held_out, assets)
    config.data.train = str(train_file)
    config.training.output_dir = str(output)
    config.training.resume = "never"
    if sizes.steps is not None:
        config.training.max_steps = sizes.steps
    return config


def demo(output: Path, sizes: Sizes, assets: Path | None = None, console: Console | None = None) -> dict[str, Any]:
    """Run the job and return its results, which ``demo.json`` in ``output`` holds too.

    A former demo's checkpoints in ``output`` are removed, so that every run starts anew.

    Raises:
        AssetError: the model or the data can neither be found nor fetched.
        ConfigError: ``output`` holds files of something else.
    """
    console = console or Console()
    for module in ("gguf", "trl", "datasets", "matplotlib", "tensorboard"):
        require(module)
    _clear(output)
    start = time.perf_counter()
    console.print("Fetching and converting the model and the data, unless they are cached", highlight=False)
    config = prepare(output, sizes, assets)
    make_deterministic(config.training)
    tokenizer = load_tokenizer(config.model.path)
    held_out = load_rows(str(Path(config.data.train).with_name("heldout.jsonl")), config.data)
    prompts = [render_prompt(prompt, tokenizer, config.data) for prompt in held_out["prompt"]]
    answers = list(held_out["completion"])
    expected = [LABELS.index(answer) for answer in answers]
    passages = news_passages(sizes.passages, assets)

    def measure(model: torch.nn.Module, title: str) -> dict[str, float]:
        console.print(f"Evaluating {title} on {len(held_out)} held-out reviews", highlight=False)
        before = time.perf_counter()
        predicted = rank_labels(model, tokenizer, prompts, LABELS)
        return {
            "linear_bytes": linear_bytes(model),
            "weight_bytes": weight_bytes(model),
            "accuracy_7": accuracy(predicted, expected),
            "accuracy_polarity": accuracy([polarity(p) for p in predicted], [polarity(e) for e in expected]),
            "perplexity_answers": perplexity(model, tokenizer, answers, prompts),
            "perplexity_news": perplexity(model, tokenizer, passages, max_length=sizes.passage_tokens, batch_size=4),
            "seconds": time.perf_counter() - before,
        }

    model = load_base(config.model)
    results: dict[str, Any] = {"16-bit": measure(model, "the 16-bit model")}
    before = time.perf_counter()
    model = quantize(model, config.quantization)
    quantize_seconds = time.perf_counter() - before
    results["4-bit"] = measure(model, "the 4-bit model")
    run = train(config, console, model)
    results["4-bit + adapter"] = measure(run.model, "the fine-tuned 4-bit model")
    metrics = {
        "results": results,
        "held_out_rows": len(held_out),
        "quantize_seconds": quantize_seconds,
        "train_seconds": run.metrics["train_seconds"],
        "seconds": time.perf_counter() - start,
        "steps": run.metrics["steps"],
        "device": run.metrics["device"],
        "precision": run.metrics["precision"],
        "threads": torch.get_num_threads(),
        "environment": describe(),
    }
    (output / "demo.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    console.print(_table(metrics))
    console.print(
        f"Trained {metrics['steps']} steps in {metrics['train_seconds']:.0f} s of {metrics['seconds']:.0f} s in all, "
        f"on {metrics['device']}, {metrics['precision']}.\n"
        f"Loss curve: {output / 'loss.png'}   metrics: {output / 'demo.json'}   adapter: {output / 'adapter'}",
        highlight=False,
        soft_wrap=True,
    )
    return metrics


def _table(metrics: dict[str, Any]) -> Table:
    results = metrics["results"]
    table = Table(title=f"SmolLM2-135M as Mistral, seven-label sentiment, {metrics['held_out_rows']} held-out reviews")
    table.add_column("")
    for title in ("16-bit", "4-bit (before)", "4-bit + adapter (after)"):
        table.add_column(title, justify="right")
    table.add_column("change", justify="right")
    before, after = results["4-bit"], results["4-bit + adapter"]
    for title, key in (("Linear layers", "linear_bytes"), ("All weights", "weight_bytes")):
        ratio = f"16-bit / {results['16-bit'][key] / before[key]:.2f}"
        table.add_row(title, *(f"{row[key]:,} B ({format_bytes(row[key])})" for row in results.values()), ratio)
    for title, key in (("Accuracy, 7 labels", "accuracy_7"), ("Accuracy, polarity (3)", "accuracy_polarity")):
        points = 100 * (after[key] - before[key])
        table.add_row(title, *(f"{100 * row[key]:.1f} %" for row in results.values()), f"{points:+.1f} points")
    for title, key in (
        ("Perplexity of the held-out answers", "perplexity_answers"),
        ("Perplexity of newspaper editorials", "perplexity_news"),
    ):
        table.add_row(title, *(f"{row[key]:.2f}" for row in results.values()), f"× {after[key] / before[key]:.3g}")
    return table


def _clear(output: Path) -> None:
    """Remove a former demo's checkpoints; the file .demo beside them tells that they are its own."""
    checkpoints = list(output.glob("checkpoint-*"))
    if checkpoints and not (output / ".demo").is_file():
        raise ConfigError(f"{output} holds checkpoints of another run; give another folder with --output.")
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint)
    shutil.rmtree(output / "tensorboard", ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / ".demo").touch()
