"""Scores of predicted labels and of written answers, from scikit-learn, sacreBLEU and rouge-score."""

from collections.abc import Sequence
from typing import Any

from .errors import require

__all__ = ["answer_scores", "classification_scores"]


def classification_scores(predicted: Sequence[int], expected: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro F1 (the mean of the labels' F1, where a label without rows and predictions counts as 0) and the
    confusion matrix.

    Args:
        predicted, expected: indices into ``labels``, one a row.

    Returns:
        labels, accuracy, macro_f1, and confusion_matrix: rows by expected label and predicted label, a list of lists.

    Raises:
        UserError: scikit-learn is not installed.
    """
    sklearn = require("sklearn.metrics")
    indices = list(range(len(labels)))
    matrix = sklearn.confusion_matrix(expected, predicted, labels=indices)
    return {
        "labels": list(labels),
        "accuracy": float(sklearn.accuracy_score(expected, predicted)),
        "macro_f1": float(sklearn.f1_score(expected, predicted, labels=indices, average="macro", zero_division=0)),
        "confusion_matrix": matrix.tolist(),
    }


def answer_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU (0 to 100) and the mean ROUGE-L F-measure (0 to 1) of answers, each against its one reference.

    Raises:
        UserError: sacrebleu or rouge-score is not installed.
    """
    sacrebleu = require("sacrebleu", "metrics")
    rouge = require("rouge_score.rouge_scorer", "metrics").RougeScorer(["rougeL"])
    scores = [
        rouge.score(reference, answer)["rougeL"].fmeasure for answer, reference in zip(answers, references, strict=True)
    ]
    return {
        "bleu": sacrebleu.corpus_bleu(list(answers), [list(references)]).score,
        "rouge_l": sum(scores) / len(scores),
    }
