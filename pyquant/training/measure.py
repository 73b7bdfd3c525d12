"""What a run measures beside its loss: on the evaluation rows, and on general text."""

from typing import TYPE_CHECKING, Any

import torch

from .config import Config, DataConfig
from .data import load_rows
from .errors import ConfigError, require
from .evaluate import rank_labels, score_tokens
from .launch import input_device
from .metrics import answer_scores, classification_scores
from .tokens import encode_row, prompt_and_answer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .prepare import Prepared

__all__ = ["Measurements"]

_MOST_LABELS = 100


class Measurements:
    """The evaluation section of a configuration, checked and loaded, to run before and after training.

    Raises:
        ConfigError: classify or generate without evaluation rows, too many labels, or a label that is not listed.
        DataError: the general text cannot be read, or the rows hold no answers.
        UserError: a library that a metric comes from is not installed.
    """

    def __init__(self, config: Config, prepared: "Prepared", tokenizer: "PreTrainedTokenizerBase"):
        settings = config.evaluation
        self._settings, self._tokenizer, self._prepared = settings, tokenizer, prepared
        self._batch = config.training.eval_batch_size or config.training.batch_size
        if not isinstance(self._batch, int):
            self._batch = 8
        self._labels: list[str] = []
        self._prompts: list[str] = []
        self._answers: list[str] = []
        if settings.classify or settings.generate:
            if prepared.held_out is None:
                raise ConfigError(
                    f"evaluation.{'classify' if settings.classify else 'generate'} needs evaluation rows; "
                    "set data.eval or data.eval_fraction."
                )
            pairs = [prompt_and_answer(row, tokenizer, config.data) for row in prepared.held_out]
            self._prompts, self._answers = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
        if settings.classify:
            require("sklearn")
            self._labels = self._find_labels()
        if settings.generate:
            require("sacrebleu", "metrics")
            require("rouge_score", "metrics")
        self._general = self._encode_general(config) if settings.general else None

    @property
    def before(self) -> bool:
        """Whether anything is to be measured before training."""
        return self._settings.before or self._general is not None

    def run(self, model: "PreTrainedModel", after: bool = True) -> dict[str, Any]:
        """Measure a model.

        Returns:
            loss, perplexity and token_accuracy of the evaluation rows; with classify those of `classification_scores`,
            with generate bleu, rouge_l and ended (the part of the answers that reach an end token); and
            general_perplexity. Before training only what is wanted then.
        """
        training = model.training
        result: dict[str, Any] = {}
        # Random numbers of the training are not used up here, so that a run with measurements is the run without.
        device = input_device(model)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if self._prepared.eval is not None and (after or self._settings.before):
                result |= self._held_out(model)
            if self._general is not None:
                pad = self._tokenizer.pad_token_id
                result["general_perplexity"] = score_tokens(model, self._general, pad, self._batch).perplexity
        model.train(training)
        return result

    def _held_out(self, model: "PreTrainedModel") -> dict[str, Any]:
        rows = _pairs(self._prepared.eval)
        scores = score_tokens(model, rows, self._tokenizer.pad_token_id, self._batch)
        result: dict[str, Any] = {
            "loss": scores.loss,
            "perplexity": scores.perplexity,
            "token_accuracy": scores.accuracy,
        }
        if self._settings.classify:
            predicted = rank_labels(model, self._tokenizer, self._prompts, self._labels, self._batch)
            expected = [self._labels.index(answer) for answer in self._answers]
            result |= classification_scores(predicted, expected, self._labels)
        if self._settings.generate:
            result |= self._answer(model, self._settings.generate)
        return result

    def _answer(self, model: "PreTrainedModel", count: int) -> dict[str, float]:
        from ..generation import generate_batch

        answers = generate_batch(
            model, self._tokenizer, self._prompts[:count], self._settings.max_new_tokens, self._batch, "never"
        )
        scores = answer_scores([a.text for a in answers], [answer.strip() for answer in self._answers[:count]])
        return scores | {"ended": sum(answer.ended for answer in answers) / len(answers)}

    def _find_labels(self) -> list[str]:
        found = sorted(set(self._answers))
        names = self._settings.labels
        if names is None:
            if len(found) > _MOST_LABELS:
                raise ConfigError(
                    f"the evaluation rows have {len(found)} different completions, which are no labels; "
                    "set evaluation.labels, or evaluation.classify to false."
                )
            return found
        # A completion may begin with the space that parts it from its prompt; the labels then need it too.
        names = [next((answer for answer in found if answer.strip() == name.strip()), name) for name in names]
        missing = [answer for answer in found if answer not in names]
        if missing:
            raise ConfigError(f"the rows have the completion {missing[0]!r}, which is none of the labels; add it.")
        return names

    def _encode_general(self, config: Config) -> list[tuple[list[int], list[int]]]:
        columns = DataConfig(chat_template=config.data.chat_template)
        rows = load_rows(self._settings.general, columns)
        rows = rows.select(range(min(self._settings.general_rows, len(rows))))
        encoded = [encode_row(row, self._tokenizer, columns) for row in rows]
        cut = config.data.max_length
        return [(row["input_ids"][:cut], row["labels"][:cut]) for row in encoded]


def _pairs(rows: "Dataset") -> list[tuple[list[int], list[int]]]:
    return list(zip(rows["input_ids"], rows["labels"], strict=True))
