"""From the configuration to tokenized rows: splits, duplicates, mixtures, lengths."""

import json
import random
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .config import Config, DataConfig
from .data import load_rows, load_splits
from .errors import ConfigError, DataError, require
from .tokens import IGNORED, encode_row

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["LengthReport", "Prepared", "mix_rows", "prepare_data", "prepare_evaluation"]


@dataclass
class LengthReport:
    """What is in the training rows, and what became of them, in tokens.

    Attributes:
        rows: rows that are trained on.
        duplicates: rows that repeat another one (dropped with ``data.deduplicate``).
        leaked: training rows that evaluation holds too (likewise).
        too_long: rows above max_length, which were cut or dropped.
        without_target: rows dropped because the cut left nothing to predict.
        tokens, targets: tokens of an epoch, and those among them that the loss counts.
        shortest, median, p95, longest: of the rows before any was cut.
        longest_kept: of the rows that are trained on.
    """

    rows: int = 0
    duplicates: int = 0
    leaked: int = 0
    too_long: int = 0
    without_target: int = 0
    tokens: int = 0
    targets: int = 0
    shortest: int = 0
    median: int = 0
    p95: int = 0
    longest: int = 0
    longest_kept: int = 0
    mixed_in: dict[str, int] = field(default_factory=dict)

    def lines(self, config: DataConfig) -> list[str]:
        """The report in sentences, each on a line."""
        lines = [
            f"{self.rows:,} rows, {self.tokens:,} tokens ({self.targets:,} targets) per epoch; tokens per row: "
            f"{self.shortest} to {self.longest}, median {self.median}, 95th percentile {self.p95}"
        ]
        lines += [f"{count:,} rows mixed in from {name}" for name, count in self.mixed_in.items()]
        dropped = "dropped" if config.deduplicate else "kept; data.deduplicate drops them"
        if self.duplicates:
            lines.append(f"{self.duplicates:,} rows repeat another one: {dropped}")
        if self.leaked:
            lines.append(f"{self.leaked:,} training rows are evaluation rows too: {dropped}")
        if self.too_long:
            done = "dropped" if config.too_long == "drop" else "cut"
            lines.append(f"{self.too_long:,} rows are longer than data.max_length ({config.max_length}): {done}")
        if self.without_target:
            lines.append(f"{self.without_target:,} rows dropped: cut to max_length, they have nothing left to predict")
        return lines


@dataclass
class Prepared:
    """Tokenized rows (columns input_ids, labels, list of int each), and what they were made of.

    ``held_out`` holds the evaluation rows before tokenizing; it and ``eval`` are None without evaluation data.
    """

    train: "Dataset"
    eval: "Dataset | None"
    held_out: "Dataset | None"
    report: LengthReport

    def metrics(self) -> dict[str, Any]:
        """The report for metrics.json."""
        return asdict(self.report)


def prepare_data(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Prepared:
    """Load, deduplicate, mix and tokenize the rows of a run.

    Raises:
        ConfigError: the parts in ``data.mix`` leave nothing for ``data.train``.
        DataError: see `load_splits` and `encode_row`; or no row is left.
    """
    data, seed = config.data, config.training.seed
    report = LengthReport()
    train, held_out = load_splits(data, seed)
    train = _deduplicate(train, held_out, data.deduplicate, report)
    if data.mix:
        train = mix_rows(train, data, seed, report)
    # The loss on plain text counts every token in any case.
    options = {"tokenizer": tokenizer, "config": data, "completion_only": config.training.completion_only_loss}
    tokenized = _tokenize(train, data, options, report)
    report.rows, report.tokens = len(tokenized), 0
    for row in tokenized:
        report.tokens += len(row["input_ids"])
        report.targets += sum(label != IGNORED for label in row["labels"])
        report.longest_kept = max(report.longest_kept, len(row["input_ids"]))
    evaluation = None
    if held_out is not None:
        evaluation = _tokenize(held_out, data, options, LengthReport(), "data.eval")
    return Prepared(tokenized, evaluation, held_out, report)


def prepare_evaluation(config: Config, tokenizer: "PreTrainedTokenizerBase", limit: int | None = None) -> Prepared:
    """Load and tokenize ``data.eval`` alone, or its first ``limit`` rows; the training rows are none then.

    Raises:
        DataError: see `load_rows` and `encode_row`.
    """
    rows = load_rows(config.data.eval, config.data)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    options = {"tokenizer": tokenizer, "config": config.data}
    report = LengthReport()
    tokenized = _tokenize(rows, config.data, options, report, config.data.eval)
    return Prepared(tokenized.select([]), tokenized, rows, report)


def mix_rows(train: "Dataset", data: DataConfig, seed: int, report: LengthReport | None = None) -> "Dataset":
    """Add rows of other files to the training rows, so that each file has its part of the whole.

    The training rows all stay, once each; the others are drawn at random, again from the start where they run out.

    Raises:
        ConfigError: a part is not above 0, or the parts add up to 1 or more.
    """
    datasets = require("datasets")
    total = sum(data.mix.values())
    if total >= 1 or any(part <= 0 for part in data.mix.values()):
        raise ConfigError(f"the parts in data.mix add up to {total:g}; each is above 0, and together they are below 1.")
    parts = [train]
    for source, part in data.mix.items():
        rows = load_rows(source, DataConfig(chat_template=data.chat_template))
        wanted = round(part * len(train) / (1 - total))
        if wanted == 0:
            raise ConfigError(f"data.mix takes {part:g} of {len(train)} rows from {source}, which is none; raise it.")
        generator, order = random.Random(f"{seed} {source}"), []
        while len(order) < wanted:
            turn = list(range(len(rows)))
            generator.shuffle(turn)
            order += turn
        parts.append(rows.select(order[:wanted]))
        if report is not None:
            report.mixed_in[source] = wanted
    return datasets.concatenate_datasets(parts)


def _deduplicate(train: "Dataset", held_out: "Dataset | None", drop: bool, report: LengthReport) -> "Dataset":
    """Count the rows that repeat an earlier one or an evaluation row, and drop them where asked."""
    elsewhere = {_key(row) for row in held_out} if held_out is not None else set()
    seen: set[str] = set()
    kept = []
    for index, row in enumerate(train):
        key = _key(row)
        if key in elsewhere:
            report.leaked += 1
        elif key in seen:
            report.duplicates += 1
        else:
            kept.append(index)
        seen.add(key)
    if drop and not kept:
        raise DataError("all training rows are evaluation rows too, and data.deduplicate drops them; change data.eval.")
    return train.select(kept) if drop and len(kept) < len(train) else train


def _key(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, ensure_ascii=False)


def _tokenize(
    rows: "Dataset", data: DataConfig, options: dict, report: LengthReport, key: str = "data.train"
) -> "Dataset":
    encoded = rows.map(lambda row: encode_row(row, **options), remove_columns=rows.column_names, desc=None)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    ordered = sorted(lengths)
    report.shortest, report.longest = ordered[0], ordered[-1]
    report.median, report.p95 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]
    report.too_long = sum(length > data.max_length for length in lengths)
    if report.too_long and data.too_long == "drop":
        encoded = encoded.select([i for i, length in enumerate(lengths) if length <= data.max_length])
    elif report.too_long:
        encoded = encoded.map(lambda row: {name: ids[: data.max_length] for name, ids in row.items()}, desc=None)
    # A position's target is the token after it: the first token is never one.
    useful = [i for i, labels in enumerate(encoded["labels"]) if any(label != IGNORED for label in labels[1:])]
    report.without_target = len(encoded) - len(useful)
    if not useful:
        raise DataError(f"no row of {key} has a token to predict within data.max_length ({data.max_length}); raise it.")
    return encoded.select(useful) if len(useful) < len(encoded) else encoded
