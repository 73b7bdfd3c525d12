"""The examples' small tasks: files of the columns that their full-size data sets have, out of the cached packages."""

import json
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from ..training.errors import ConfigError
from .assets import cache_folder, dialogues, model_folder
from .sentiment import news_passages, write_splits

__all__ = ["TASKS", "write_chats", "write_general", "write_questions", "write_roles", "write_task"]

# Answers of this file are programs, many times as long as all the others.
_LEFT_OUT = "coding"
# In these files the lines after the first are turns; in the others they are further answers to it.
_TURNS = ("conversations", "health", "psychology")
_TOPIC_NAMES = {"ai": "artificial intelligence", "botprofile": "its own profile"}


def write_task(task: str, assets: Path | None = None) -> dict[str, str]:
    """Fetch the model, write a task's files into the cache, and return the configuration keys that name them.

    Args:
        task: one of `TASKS`.
        assets: see `model_folder`; $PYQUANT_ASSETS when None.

    Raises:
        AssetError: see `model_folder`.
        ConfigError: ``assets`` is no folder.
    """
    if assets is None and os.environ.get("PYQUANT_ASSETS"):
        assets = Path(os.environ["PYQUANT_ASSETS"])
    if assets is not None and not assets.is_dir():
        raise ConfigError(f"the assets folder {assets} does not exist; give a folder with the packages.")
    train, held_out = TASKS[task](cache_folder() / task, assets)
    return {
        "model.path": str(model_folder(assets)),
        "data.train": str(train),
        "data.eval": str(held_out),
        "evaluation.general": str(write_general(cache_folder() / "general", assets)),
    }


def write_questions(folder: Path, assets: Path | None = None) -> tuple[Path, Path]:
    """Questions and answers, with the columns instruction, input and output: ``train.jsonl`` and ``heldout.jsonl``.

    Of 100 questions nothing is trained on: a question with several answers stands on one side of the split.
    """
    pairs = [lines for topic, lines in dialogues(assets) if len(lines) == 2 and topic != _LEFT_OUT]
    instruction = "Answer the question."

    def rows(part: set[str]) -> list[dict]:
        # Of a held-out question the first answer alone is the reference.
        return [{"instruction": instruction, "input": q, "output": a} for q, a in pairs if q.lower() in part]

    held_out, rest = _split({question.lower() for question, _ in pairs}, 100)
    references = {row["input"].lower(): row for row in reversed(rows(held_out))}
    return _write(folder, rows(rest), references.values())


def write_roles(folder: Path, assets: Path | None = None) -> tuple[Path, Path]:
    """Pairs of act (what the dialogue is about) and prompt (what is said in it): ``train.jsonl``, ``heldout.jsonl``."""
    rows = [
        {"act": _TOPIC_NAMES.get(topic, topic.replace("_", " ")), "prompt": f"{lines[0]}\n{lines[1]}"}
        for topic, lines in dialogues(assets)
        if len(lines) == 2 and topic != _LEFT_OUT
    ]
    held_out, rest = _split({row["prompt"] for row in rows}, 100)
    parts = ([row for row in rows if row["prompt"] in part] for part in (rest, held_out))
    return _write(folder, *parts)


def write_chats(folder: Path, assets: Path | None = None) -> tuple[Path, Path]:
    """Conversations in the column messages, of one turn or several: ``train.jsonl`` and ``heldout.jsonl``."""
    chats = []
    for topic, lines in dialogues(assets):
        if topic != _LEFT_OUT and (len(lines) == 2 or topic in _TURNS):
            lines = lines[: len(lines) // 2 * 2]  # the assistant has the last word
            chats.append([{"role": ("user", "assistant")[i % 2], "content": line} for i, line in enumerate(lines)])
    held_out, rest = _split({chat[0]["content"].lower() for chat in chats}, 100)
    parts = ([{"messages": c} for c in chats if c[0]["content"].lower() in part] for part in (rest, held_out))
    return _write(folder, *parts)


def write_general(folder: Path, assets: Path | None = None) -> Path:
    """Newspaper editorials, which no task is about, in the column text: what a model forgets shows on them."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "news.jsonl"
    _write_rows(file, [{"text": text} for text in news_passages(16, assets)])
    return file


def _sentiment(folder: Path, assets: Path | None) -> tuple[Path, Path]:
    return write_splits(folder / "heldout-200", 200, assets)  # the demo's own


TASKS: dict[str, Callable[[Path, Path | None], tuple[Path, Path]]] = {
    "sentiment": _sentiment,
    "questions": write_questions,
    "roles": write_roles,
    "chats": write_chats,
}


def _split(keys: set[str], count: int, seed: int = 0) -> tuple[set[str], set[str]]:
    """``count`` of the keys, always the same, and the others."""
    order = sorted(keys)
    random.Random(seed).shuffle(order)
    return set(order[:count]), set(order[count:])


def _write(folder: Path, train: Iterable[dict], held_out: Iterable[dict]) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train.jsonl", folder / "heldout.jsonl"
    for file, rows in zip(files, (train, held_out), strict=True):
        distinct = list({json.dumps(row): row for row in rows}.values())
        random.Random(0).shuffle(distinct)
        _write_rows(file, distinct)
    return files


def _write_rows(file: Path, rows: Iterable[dict]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # A file that stays as it is keeps its place in the cache of tokenized rows.
    if not file.is_file() or file.read_text(encoding="utf-8") != lines:
        file.write_text(lines, encoding="utf-8")
