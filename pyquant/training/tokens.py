"""Rows to token ids and labels: chat templates, added tokens, and which tokens the loss counts."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .config import DataConfig
from .data import render_prompt
from .errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "add_tokens", "encode_row", "end_token_id", "prompt_and_answer"]

IGNORED = -100  # cross-entropy's own mark for a position without a target
# What a person writes as a token of its own: <response>, <response|end>, <|im_end|>.
_TAG = re.compile(r"<\|?[A-Za-z_][\w.-]*(?:\|[\w.-]+)*\|?>")


def add_tokens(tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> list[str]:
    """Add ``data.special_tokens`` to the tokenizer, and return those that it did not have.

    Raises:
        ConfigError: a tag in ``data.prompt``, or ``data.end_token``, is no token of the tokenizer or the list.
    """
    wanted = config.special_tokens or []
    for token in wanted:
        if not token or token != token.strip():
            raise ConfigError(f"data.special_tokens holds {token!r}; a token has no white space around it.")
    known = tokenizer.get_vocab()
    used = [("data.end_token", config.end_token)] if config.end_token is not None else []
    if config.prompt is not None and config.special_tokens is None:
        used += [("data.prompt", tag) for tag in _TAG.findall(config.prompt)]
    for key, token in used:
        if token not in known and token not in wanted:
            plain = "" if key == "data.end_token" else ", or set that to [] if it is plain text"
            raise ConfigError(
                f"{key} has the token {token}, which is not in the tokenizer; add it to data.special_tokens{plain}."
            )
    new = [token for token in dict.fromkeys(wanted) if token not in known]
    if new:
        tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    return new


def end_token_id(tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> int:
    """The id of the token that ends a completion."""
    return tokenizer.eos_token_id if config.end_token is None else tokenizer.convert_tokens_to_ids(config.end_token)


def encode_row(
    row: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase", config: DataConfig, completion_only: bool = True
) -> dict[str, list[int]]:
    """Token ids of one row, and the labels that its loss is taken on.

    A row holds ``messages``, or ``text``, or ``prompt`` and ``completion``; other columns, or None, are passed over.
    Text and completions end with the end token. The targets of a prompt and completion are the tokens after those that
    the prompt alone has too; those of messages lie between the assistant's header and the end of its turn.

    Args:
        completion_only: no target on prompts and on other roles' messages; else every token is one.

    Returns:
        input_ids and labels, two lists of the same length; labels hold `IGNORED` where there is no target.

    Raises:
        DataError: messages meet a tokenizer without a chat template, or a template that renders a conversation's
            beginning otherwise than the conversation.
    """
    end = end_token_id(tokenizer, config)
    if row.get("messages") is not None:
        return _encode_messages(row["messages"], tokenizer, completion_only)
    if row.get("text") is not None:
        ids = _with_end(tokenizer(row["text"])["input_ids"], end)
        return {"input_ids": ids, "labels": ids.copy()}
    prompt = render_prompt(row["prompt"], tokenizer, config)
    alone = tokenizer(prompt)["input_ids"]
    ids = _with_end(tokenizer(prompt + row["completion"])["input_ids"], end)
    # Tokens can merge across the boundary; such a token is a target.
    start = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), min(len(alone), len(ids)))
    start = start if completion_only else 0
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}


def prompt_and_answer(
    row: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase", config: DataConfig
) -> tuple[str, str]:
    """The prompt as rendered for the model, and the answer that the row holds: the completion, or the assistant's last
    message.

    Raises:
        DataError: the row is plain text, or messages meet a tokenizer without a chat template.
    """
    if row.get("messages") is not None:
        last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        _need_template(tokenizer)
        text = tokenizer.apply_chat_template(row["messages"][:last], tokenize=False, add_generation_prompt=True)
        if tokenizer.bos_token and _adds_bos(tokenizer):
            text = text.removeprefix(tokenizer.bos_token)
        return text, row["messages"][last]["content"]
    if row.get("text") is not None:
        raise DataError("the evaluation rows are plain text, which has no prompt to answer; give other rows.")
    return render_prompt(row["prompt"], tokenizer, config), row["completion"]


def _need_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    if not tokenizer.chat_template:
        raise DataError(
            "the rows hold messages, but the tokenizer has no chat template; use an instruct model's, or rows with "
            "prompt and completion."
        )


def _with_end(ids: list[int], end: int) -> list[int]:
    return ids if ids and ids[-1] == end else [*ids, end]


def _encode_messages(messages: list[dict], tokenizer: "PreTrainedTokenizerBase", completion_only: bool) -> dict:
    _need_template(tokenizer)
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]

    def render(count: int, header: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=header)

    whole = render(len(messages))
    spans = []
    for index, message in enumerate(messages if completion_only else []):
        if message["role"] != "assistant":
            continue
        after = render(index + 1)
        # Where generation would start; or, in a template whose header for generation is another, where the content is.
        before, header = (render(index), render(index, header=True)) if index else ("", None)
        start = len(header) if header and after.startswith(header) else after.find(message["content"], len(before))
        if start < 0 or not (whole.startswith(after) and after.startswith(before)):
            raise DataError(
                "the chat template renders a conversation's beginning otherwise than the whole, so the assistant's "
                "tokens cannot be told; set training.completion_only_loss to false, or change the template."
            )
        spans.append((start, len(after)))
    shift = 0
    if tokenizer.bos_token and whole.startswith(tokenizer.bos_token) and _adds_bos(tokenizer):
        shift = len(tokenizer.bos_token)  # the tokenizer writes the start token itself
    encoded = tokenizer(whole[shift:], return_offsets_mapping=True)
    ids = encoded["input_ids"]
    if not completion_only:
        return {"input_ids": ids, "labels": ids.copy()}
    labels = [
        token if last > first and any(first + shift < b and last + shift > a for a, b in spans) else IGNORED
        for token, (first, last) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": ids, "labels": labels}


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
