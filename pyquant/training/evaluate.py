"""Perplexity and token accuracy, and classification by ranking the labels' probabilities."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .errors import DataError
from .launch import input_device
from .tokens import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TokenScores", "accuracy", "perplexity", "rank_labels", "score_tokens"]


@dataclass(frozen=True)
class TokenScores:
    """Scores over all target tokens alike: mean negative log-likelihood in nats, the part predicted first, count."""

    loss: float
    accuracy: float
    count: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.inference_mode()
def score_tokens(
    model: "PreTrainedModel", rows: Sequence[tuple[list[int], list[int]]], pad_token_id: int, batch_size: int = 8
) -> TokenScores:
    """Score a model on the tokens that each row has a label for.

    Args:
        rows: token ids and labels, of one length; a label is the token itself, or `IGNORED`.
        batch_size: rows in a forward pass.

    Raises:
        DataError: no row has a target after its first token.
    """
    rows = [(ids, labels) for ids, labels in rows if any(label != IGNORED for label in labels[1:])]
    if not rows:
        raise DataError("no text has two tokens or more within max_length, so there is nothing to predict.")
    rows.sort(key=lambda row: len(row[0]))  # rows of like length pad little
    total, right, count = 0.0, 0, 0
    device = input_device(model)
    model.eval()
    for at in range(0, len(rows), batch_size):
        batch = rows[at : at + batch_size]
        ids, mask = _pad([ids for ids, _ in batch], pad_token_id, device)
        targets = _pad([labels for _, labels in batch], IGNORED, device)[0][:, 1:]
        # Only the positions that are counted go through the vocabulary's large product.
        first = int((targets != IGNORED).any(0).nonzero()[0])
        keep = torch.arange(first, ids.shape[1] - 1, device=ids.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
        targets = targets[:, first:]
        counted = targets != IGNORED
        logits, targets = logits[counted].float(), targets[counted]
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        right += int((logits.argmax(-1) == targets).sum())
        count += len(targets)
    return TokenScores(total / count, right / count, count)


def perplexity(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    prompts: Sequence[str] | None = None,
    max_length: int = 1024,
    batch_size: int = 8,
) -> float:
    """exp of the mean negative log-likelihood per token of ``texts``, each on its own.

    Args:
        texts: the texts, or the completions when ``prompts`` are given.
        prompts: one prompt a text, as rendered for the model; its tokens are read but not counted, and the end token
            after the text is counted, as in training.
        max_length: tokens that a prompt and text are cut to.
        batch_size: rows in a forward pass.

    Raises:
        DataError: no token is left to predict.
    """
    end = [] if prompts is None else [tokenizer.eos_token_id]
    rows = []
    for index, text in enumerate(texts):
        prompt = [] if prompts is None else tokenizer(prompts[index])["input_ids"]
        ids = tokenizer(text if prompts is None else prompts[index] + text)["input_ids"] + end
        start = _common_prefix([prompt, ids])
        rows.append((ids[:max_length], ([IGNORED] * start + ids[start:])[:max_length]))
    return score_tokens(model, rows, tokenizer.pad_token_id, batch_size).perplexity


@torch.inference_mode()
def rank_labels(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    labels: Sequence[str],
    batch_size: int = 16,
) -> list[int]:
    """For every prompt the index of the label with the greatest mean log-probability per token.

    The mean, unlike the sum, does not favour labels of few tokens. A prompt is read once: its keys and values serve all
    labels, and the tokens that all prompts begin with are read once for all of them.

    Args:
        prompts: as rendered for the model, up to where the label begins.
        labels: the candidates, with the white space that precedes them after the prompt.
        batch_size: prompts in a forward pass; each brings as many rows as there are labels.
    """
    encoded = [_split(tokenizer, prompt, labels) for prompt in prompts]
    shared = min(_common_prefix([prompt for prompt, _ in encoded]), min(len(prompt) for prompt, _ in encoded) - 1)
    model.eval()
    prefix = None
    if shared > 0:
        ids = torch.tensor([encoded[0][0][:shared]], device=input_device(model))
        prefix = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    best: list[int] = [0] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    for at in range(0, len(order), batch_size):
        chunk = order[at : at + batch_size]
        scores = _score(model, tokenizer.pad_token_id, prefix, shared, [encoded[i] for i in chunk])
        for index, winner in zip(chunk, scores.argmax(1).tolist(), strict=True):
            best[index] = winner
    return best


def accuracy(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """The part of the predictions that are right."""
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(expected)


def _score(model, pad: int, prefix, shared: int, batch: list[tuple[list[int], list[list[int]]]]) -> torch.Tensor:
    """Mean log-probabilities (rows, labels) of each row's label tokens after its prompt."""
    device = input_device(model)
    rows, count = len(batch), len(batch[0][1])
    # Prompts are padded on the left, so that every one ends where its labels begin.
    prompt, mask = _pad([ids[shared:] for ids, _ in batch], pad, device, left=True)
    mask = torch.cat([mask.new_ones(rows, shared), mask], 1)
    cache = None
    if prefix is not None:
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(rows)
    places = _positions(mask)
    output = model(
        input_ids=prompt,
        attention_mask=mask,
        position_ids=places[:, shared:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    first = output.logits[:, -1].float().log_softmax(-1)

    # Labels that begin alike, such as "strong negative" and "strong positive", share the row that reads the beginning.
    beginnings: dict[tuple, int] = {}
    terms = []  # (score, beginning, position in it, token): what the second and later tokens of the labels add
    for row, (_, labels) in enumerate(batch):
        for index, label in enumerate(labels):
            for place, token in enumerate(label[1:]):
                beginning = beginnings.setdefault((row, *label[:-1]), len(beginnings))
                terms.append((row * count + index, beginning, place, token))
    heads = torch.tensor([[label[0] for label in labels] for _, labels in batch], device=device)
    scores = first.gather(1, heads).flatten()
    if terms:
        source = torch.tensor([row for row, *_ in beginnings], device=device)
        tokens, token_mask = _pad([list(ids) for _, *ids in beginnings], pad, device)
        cache = output.past_key_values
        cache.batch_select_indices(source)
        full = torch.cat([mask[source], token_mask], 1)
        logits = model(
            input_ids=tokens,
            attention_mask=full,
            position_ids=_positions(full)[:, mask.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        ).logits
        score, beginning, place, token = torch.tensor(terms, device=device).unbind(1)
        scores.index_add_(0, score, logits.float().log_softmax(-1)[beginning, place, token])
    lengths = torch.tensor([[len(label) for label in labels] for _, labels in batch], device=device)
    return scores.view(rows, count) / lengths


def _split(tokenizer, prompt: str, labels: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt and of each label after it, cut where prompt and prompt+label diverge.

    Tokens can merge across the boundary; the ids then belong to the label, as they do in training.
    """
    alone = tokenizer(prompt)["input_ids"]
    whole = [tokenizer(prompt + label)["input_ids"] for label in labels]
    cut = min(_common_prefix([alone, ids]) for ids in whole)
    return alone[:cut], [ids[cut:] for ids in whole]


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    shortest, longest = min(sequences), max(sequences)  # in lexicographic order, the extremes share what all share
    for index, (a, b) in enumerate(zip(shortest, longest, strict=False)):
        if a != b:
            return index
    return min(len(shortest), len(longest))


def _pad(sequences: list[list[int]], pad: int, device, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (rows, longest), padded on one side. The mask goes by length: a pad token may be a real one too."""
    width = max(map(len, sequences))
    ids, mask = [], []
    for sequence in sequences:
        gap = width - len(sequence)
        ids.append([pad] * gap + sequence if left else sequence + [pad] * gap)
        mask.append([0] * gap + [1] * len(sequence) if left else [1] * len(sequence) + [0] * gap)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)
