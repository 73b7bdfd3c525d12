import pytest

from pyquant.training.errors import UserError
from pyquant.training.metrics import answer_scores, classification_scores
from pyquant.training.plots import plot_bars, plot_confusion


def test_classification_scores_by_hand(tmp_path):
    pytest.importorskip("sklearn")
    expected, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
    scores = classification_scores(predicted, expected, ["a", "b", "c", "d"])
    # F1 = 2·TP / (2·TP + FP + FN): a 4/5, b 2/4, c 2/3, and d, which never occurs, 0.
    assert scores["macro_f1"] == pytest.approx((4 / 5 + 2 / 4 + 2 / 3 + 0) / 4)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["confusion_matrix"] == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    plot_confusion(scores["confusion_matrix"], scores["labels"], tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_bars_leave_out_what_nothing_was_measured_of(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "bar_label", lambda axes, bars, labels, **options: drawn.append(labels))
    panels = {"accuracy": [0.5, 0.25], "memory": [1.5, None], "nothing": [None, None], "time": [0.0, 1234.5]}
    plot_bars(["full", "lora"], panels, tmp_path / "bars.png")
    assert drawn == [["0.5", "0.25"], ["1.5", ""], ["0", "1.23e+03"]]
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_answer_scores_by_hand():
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    perfect = answer_scores(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert perfect == {"bleu": pytest.approx(100), "rouge_l": 1}
    # The longest common subsequence is "the cat on mat": 4 of 5 words against 4 of 6.
    found = answer_scores(["the cat lay on mat"], ["the cat sat on the mat"])
    assert found["rouge_l"] == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
    # Two answers count with the same weight for ROUGE-L.
    both = answer_scores(["the cat lay on mat", "no"], ["the cat sat on the mat", "yes"])
    assert both["rouge_l"] == pytest.approx(found["rouge_l"] / 2)


def test_a_missing_library_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"sacrebleu is not installed; .*: pip install 'pyquant\[metrics\]'"):
        answer_scores(["a"], ["b"])
