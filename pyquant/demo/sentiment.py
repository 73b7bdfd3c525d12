"""The seven-label sentiment task: rows, labels and the split."""

import json
import random
from pathlib import Path

from .assets import sentiment_texts

__all__ = ["INSTRUCTION", "LABELS", "label_of", "news_passages", "polarity", "write_splits"]

INSTRUCTION = "What is the sentiment of this movie review?"
LABELS = (
    "strong negative",
    "moderately negative",
    "mildly negative",
    "neutral",
    "mildly positive",
    "moderately positive",
    "strong positive",
)


def label_of(rating: float) -> int:
    """The label of a mean rating from −4 to +4, cut at ±0.25, ±1 and ±2; a rating on a cut takes the milder label."""
    strength = sum(abs(rating) > cut for cut in (0.25, 1, 2))
    return 3 + strength if rating > 0 else 3 - strength


def polarity(label: int) -> int:
    """−1, 0 or 1 for a negative, the neutral or a positive label."""
    return (label > 3) - (label < 3)


def write_splits(folder: Path, held_out: int, assets: Path | None = None, seed: int = 0) -> tuple[Path, Path]:
    """Write the movie reviews as ``train.jsonl`` and ``heldout.jsonl``, shuffled once, and return the two paths.

    A sentence that occurs twice could stand on both sides of the split; only its first row is kept.
    """
    rows = list(
        {text: (text, label_of(rating)) for _, rating, text in reversed(sentiment_texts("movie", assets))}.values()
    )
    rows.sort()
    random.Random(seed).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train.jsonl", folder / "heldout.jsonl"
    for file, part in zip(files, (rows[held_out:], rows[:held_out]), strict=True):
        lines = "".join(json.dumps(_row(text, label), ensure_ascii=False) + "\n" for text, label in part)
        # A file that stays as it is keeps its place in the cache of tokenized rows.
        if not file.is_file() or file.read_text(encoding="utf-8") != lines:
            file.write_text(lines, encoding="utf-8")
    return files


def news_passages(count: int, assets: Path | None = None) -> list[str]:
    """The first ``count`` newspaper editorials, each the sentences of one article joined."""
    articles: dict[str, list[str]] = {}
    for name, _, sentence in sentiment_texts("news", assets):
        articles.setdefault(name.partition("_")[0], []).append(sentence)
    return [" ".join(sentences) for sentences in list(articles.values())[:count]]


def _row(text: str, label: int) -> dict[str, str]:
    return {"instruction": INSTRUCTION, "input": text, "output": LABELS[label]}
