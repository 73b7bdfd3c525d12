"""Data files to rows of prompt and completion, of chat messages, or of plain text."""

import random
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import DataConfig
from .errors import ConfigError, DataError, require

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_rows", "load_splits", "render_prompt", "row_prompt"]

_MESSAGES = "write a list of {role: user, content: ...} and {role: assistant, content: ...}"
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def load_splits(config: DataConfig, seed: int) -> tuple["Dataset", "Dataset | None"]:
    """Load the training rows and the evaluation rows that the configuration names.

    Returns:
        Datasets with the columns prompt and completion, or messages, or text. The second is None when there is no
        evaluation data.

    Raises:
        DataError: a file is missing, unreadable or empty, or lacks a column.
    """
    if not config.train:
        raise DataError("data.train is not set; name a JSONL, CSV or Parquet file.")
    train = load_rows(config.train, config)
    held_out = load_rows(config.eval, config) if config.eval else None
    if held_out is None and config.eval_fraction > 0:
        count = max(1, round(config.eval_fraction * len(train)))
        if count >= len(train):
            raise DataError(f"{config.train} has only {len(train)} row; holding out {count} leaves none to train on.")
        order = list(range(len(train)))
        random.Random(seed).shuffle(order)
        held_out, train = train.select(sorted(order[:count])), train.select(sorted(order[count:]))
    if config.limit is not None:
        train = train.select(range(min(config.limit, len(train))))
    if held_out is not None and config.eval_limit is not None:
        held_out = held_out.select(range(min(config.eval_limit, len(held_out))))
    return train, held_out


def load_rows(source: str, config: DataConfig | None = None) -> "Dataset":
    """Load one data file, or one hub dataset, as rows of prompt and completion, of messages or of text.

    Raises:
        ConfigError: ``data.prompt`` is no template.
        DataError: it is missing, unreadable or empty, lacks a column, or a cell holds no text or no messages.
    """
    config = config or DataConfig()
    dataset = _read(source)
    if len(dataset) == 0:
        raise DataError(f"{source} has no rows; training needs at least one.")
    fields = _fields(source, dataset.column_names, config)
    if "messages" in fields:
        column = fields["messages"]
        for row, value in enumerate(dataset[column]):
            problem = _problem_of_messages(value)
            if problem:
                raise DataError(f"row {row + 1} of {source} has {problem} in column {column}; {_MESSAGES}.")
        dataset = dataset.select_columns([column])
        return dataset if column == "messages" else dataset.rename_column(column, "messages")
    for column in fields["columns"]:
        for row, value in enumerate(dataset[column]):
            # An instruction may well come without an input; a completion may not be missing.
            if not isinstance(value, str) and not (value is None and column == "input"):
                kind = "nothing" if value is None else f"a {type(value).__name__}"
                raise DataError(f"row {row + 1} of {source} has {kind} in column {column}; it must be text.")
            if value == "" and column in (fields.get("completion"), fields.get("text")):
                raise DataError(f"row {row + 1} of {source} has an empty {column}; remove the row or fill it.")

    def convert(row: dict[str, Any]) -> dict[str, str]:
        if "text" in fields:
            return {"text": row[fields["text"]]}
        return {"prompt": fields["prompt"](row), "completion": row[fields["completion"]]}

    return dataset.map(convert, remove_columns=dataset.column_names, desc=None)


def row_prompt(row: Mapping[str, str], tokenizer: "PreTrainedTokenizerBase", config: DataConfig | None = None) -> str:
    """The prompt that a model was trained on for a row of these columns: through ``data.prompt`` or the columns prompt,
    or instruction and input, and the chat template.

    Raises:
        DataError: the row lacks a column, or has none that makes a prompt.
    """
    config = config or DataConfig()
    found = _prompt("the row", list(row), config)
    if found is None:
        raise DataError(
            f"the row has the columns {', '.join(row)}, which make no prompt; set data.prompt to a template."
        )
    return render_prompt(found[1](row), tokenizer, config)


def render_prompt(prompt: str, tokenizer: "PreTrainedTokenizerBase", config: DataConfig | None = None) -> str:
    """Put a prompt into the tokenizer's chat template, as `DataConfig.chat_template` says.

    The text leaves out the start token where the tokenizer adds one itself, so that there is never a second one.

    Raises:
        DataError: the template is asked for and the tokenizer has none.
    """
    config = config or DataConfig()
    if config.chat_template == "always" and not tokenizer.chat_template:
        raise DataError("data.chat_template is always, but the tokenizer has no chat template; set it to never.")
    own_prompt = config.chat_template == "auto" and config.prompt is not None
    if config.chat_template == "never" or own_prompt or not tokenizer.chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(bos)
    return text


def _problem_of_messages(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "no messages"
    for message in messages:
        texts = [message.get("role"), message.get("content")] if isinstance(message, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            return "a message without role and content"
    if not any(message["role"] == "assistant" for message in messages):
        return "no message of the assistant"
    return None


def _read(source: str) -> "Dataset":
    datasets = require("datasets")
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in _FORMATS:
            raise DataError(f"{source} ends in {path.suffix or 'nothing'}; data files end in {', '.join(_FORMATS)}.")
        if path.suffix != ".parquet" and not path.read_bytes().strip():
            raise DataError(f"{source} is empty; training needs at least one row.")
        if path.suffix == ".parquet" and _parquet_rows(path) == 0:  # which the builder takes for a batch size
            raise DataError(f"{source} has no rows; training needs at least one.")
        arguments = {"sep": "\t"} if path.suffix == ".tsv" else {}
        try:
            return datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train", **arguments)
        except Exception as error:  # the builders raise their parsers' own errors, wrapped or not
            reason = str(error.__cause__ or error).splitlines()[0]
            if "corresponds to no data" in reason:
                raise DataError(f"{source} has no rows; training needs at least one.") from error
            raise DataError(f"{source} cannot be read as {_FORMATS[path.suffix]}: {reason}") from error
    name, _, split = source.partition(":")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix in _FORMATS:
        raise DataError(f"the data file {source} does not exist; give the path of a JSONL, CSV or Parquet file.")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except ValueError as error:
        if "split" not in str(error).lower():
            raise DataError(f"the hub dataset {name} cannot be read: {str(error).splitlines()[0]}") from error
        raise DataError(f"the hub dataset {name} has no split {split or 'train'}; name one as {name}:split.") from error
    except Exception as error:
        raise DataError(
            f"the data file {source} does not exist, and no hub dataset of that name was found: it has another name, "
            "or the hub cannot be reached."
        ) from error


def _parquet_rows(path: Path) -> int | None:
    """Rows of a Parquet file, or None where it cannot be read, which the builder tells better."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_metadata(path).num_rows
    except (OSError, pyarrow.ArrowException):
        return None


def _fields(source: str, columns: list[str], config: DataConfig) -> dict[str, Any]:
    """Decide which columns make the prompt and the completion, or the text."""

    def need(column: str, key: str) -> str:
        return _need(source, columns, column, key)

    if config.text is not None:
        text = need(config.text, "data.text")
        return {"text": text, "columns": [text]}
    own_columns = config.prompt is not None or config.completion is not None
    if config.messages is not None or ("messages" in columns and not own_columns):
        return {"messages": need(config.messages or "messages", "data.messages")}
    completion = None
    if config.completion is not None:
        completion = need(config.completion, "data.completion")
    found = _prompt(source, columns, config)
    if found is None:
        if "text" in columns and completion is None:
            return {"text": "text", "columns": ["text"]}
        raise DataError(
            f"{source} has none of the columns prompt, instruction, messages and text; its columns are "
            f"{', '.join(columns)}: set data.prompt to a template such as {{question}}, and "
            "data.completion to a column."
        )
    if completion is None:
        completion = next((name for name in ("completion", "output") if name in columns), None)
    if completion is None:
        raise DataError(
            f"{source} has no column completion or output; its columns are {', '.join(columns)}: set data.completion."
        )
    return {"prompt": found[1], "completion": completion, "columns": [*found[0], completion]}


def _prompt(
    source: str, columns: list[str], config: DataConfig
) -> tuple[list[str], Callable[[Mapping[str, Any]], str]] | None:
    """The columns that make the prompt, and how; None where there are none."""
    if config.prompt is not None:
        try:
            used = [name for _, name, _, _ in string.Formatter().parse(config.prompt) if name is not None]
        except ValueError as error:
            raise ConfigError(f"data.prompt is not a template: {error}; write columns as {{column}}.") from error
        if not used:
            raise ConfigError("data.prompt names no column; write columns as {column}.")
        used = [_need(source, columns, name, "data.prompt") for name in used]
        template = config.prompt
        return used, lambda row: template.format(**{name: row[name] or "" for name in used})
    if "prompt" in columns:
        return ["prompt"], lambda row: row["prompt"]
    if "instruction" in columns:
        used = [name for name in ("instruction", "input") if name in columns]
        return used, lambda row: "\n\n".join(row[name] for name in used if row[name])
    return None


def _need(source: str, columns: list[str], column: str, key: str) -> str:
    if column not in columns:
        raise DataError(f"{source} has no column {column}, which {key} names; its columns are {', '.join(columns)}.")
    return column
