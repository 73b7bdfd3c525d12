"""The full-size configurations as they are, but for a tiny model and a file with the columns of their data set."""

import json
import math
import os
from pathlib import Path

import pytest

from pyquant.training import load_config

pytest.importorskip("trl")

TINY = ["model.precision=bf16", "training.max_steps=2", "training.batch_size=2", "training.gradient_accumulation=1"]
CHOOSE_A_METHOD = Path(__file__).parents[2] / "examples" / "choose_a_method" / "mistral-7b.yaml"
LABELS = ("negative", "neutral", "positive")


@pytest.fixture
def words(tiny_model, tmp_path):
    """The overrides that put the tiny model and some rows in the place of hub names."""

    def write(rows, **more):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return [f"model.path={tiny_model}", f"data.train={file}", *TINY, *(f"{k}={v}" for k, v in more.items())]

    return write


def pairs(answers, count=60):
    return [
        {"instruction": "Which?", "input": f"red {i} blue", "output": answers[i % len(answers)]} for i in range(count)
    ]


def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]


def test_sentiment(example, words, tmp_path):
    example("sentiment/run.py", *words(pairs(LABELS)), "data.eval_fraction=0.2")
    found = results(tmp_path / "runs" / "fingpt-sentiment")
    assert found["qlora"]["eval_rows"] == 12
    assert set(found["lora"]["after"]["labels"]) == set(LABELS)


def test_financial_qa(example, words, tmp_path):
    example("financial_qa/run.py", *words(pairs(["yes", "no"])), "evaluation.max_new_tokens=4")
    assert results(tmp_path / "runs" / "fingpt-qa")["after"]["ended"] <= 1


def test_role_prompts(example, words, tmp_path):
    rows = [{"act": f"Actor {i}", "prompt": f"the cat sat on mat {i}"} for i in range(40)]
    overrides = [word for word in words(rows) if "batch_size" not in word and "accumulation" not in word]
    example("role_prompts/run.py", *overrides, "--max-new-tokens", "4")
    found = results(tmp_path / "runs" / "awesome-prompts")
    assert found["batch_size"] * found["gradient_accumulation"] == 16
    assert found["examples"][0]["prompt"] == "Act as Astronomer\nPrompt:\n"


def test_choose_a_method_says_why_a_method_has_no_result(example, words, tmp_path, monkeypatch):
    # Where torch or the disk runs out cannot be chosen; that they do is written into the process's start.
    (tmp_path / "sitecustomize.py").write_text(
        "import shutil, sys\n"
        "ran = ' '.join(sys.orig_argv)\n"
        "if '/lora/run.json' in ran:\n"
        "    raise SystemExit('torch.OutOfMemoryError: CUDA out of memory.')\n"
        "if '/full/run.json' in ran:\n"
        "    usage = shutil.disk_usage\n"
        "    shutil.disk_usage = lambda path: usage(path)._replace(free=1000)\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    folder = tmp_path / "runs" / "choose-a-method-7b"
    (folder / "partial").mkdir(parents=True)
    (folder / "partial" / "metrics.json").write_text('{"method": "partial", "bef', encoding="utf-8")  # killed there
    assert load_config(CHOOSE_A_METHOD).evaluation.general is not None  # a hub name, which the file stands for
    general = tmp_path / "general.jsonl"
    general.write_text('{"text": "the cat sat on the mat"}\n', encoding="utf-8")
    overrides = words(pairs(LABELS), **{"partial.last_layers": 1, "evaluation.general": general})
    output = example("choose_a_method/run.py", *overrides, "--methods", "full,partial,lora")
    found = results(folder)
    assert list(found) == ["full", "partial", "lora"]
    assert set(found["full"]) == {"note"}
    assert "but the disk of runs/choose-a-method-7b/full has 1.0 kB free" in found["full"]["note"]
    assert f"| full |  |  |  |  |  |  | {found['full']['note']} |" in output
    assert found["lora"] == {"note": "out of memory"}
    assert "| lora |  |  |  |  |  |  | out of memory |" in output
    cells = next(line for line in output.splitlines() if line.startswith("| partial |")).split("|")[2:-1]
    assert all(math.isfinite(float(cell)) for cell in cells[:-1])
    assert (len(cells), cells[-1].strip()) == (7, "")


def test_choose_a_method_without_any_result_fails(example, tmp_path):
    example("choose_a_method/run.py", f"model.path={tmp_path}", "--methods", "qlora", code=1)
    found = results(tmp_path / "runs" / "choose-a-method-7b")
    assert "has no config.json" in found["qlora"]["note"]


def test_memory_with_random_weights(example, tiny_model, tmp_path):
    words = ["--random-weights", "--model", tiny_model, "--methods", "full", "--shapes", "2x32", "--steps", "1"]
    output = example("chat_assistant/memory.py", *words, "-o", "table.json")
    content = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert content["arguments"]["random_weights"] is True
    assert [(row["method"], row["checkpointing"]) for row in content["rows"]] == [("full", False), ("full", True)]
    for row in content["rows"]:
        assert row["peak_gib"] > 0.1
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds_per_step"])
    assert output.count("| full |") == 2


def test_memory_of_several_cases_in_one_process(example, tiny_model):
    """As on a GPU, where a method's model is loaded once."""
    cases = [[False, 2, 32], [True, 2, 32], [False, 4, 16]]
    words = {"model": str(tiny_model), "random_weights": False, "method": "qlora", "cases": cases, "steps": 1}
    output = example("chat_assistant/memory.py", "--worker", json.dumps(words))
    rows = [json.loads(line.removeprefix("ROW ")) for line in output.splitlines() if line.startswith("ROW ")]
    assert [[row["checkpointing"], row["rows"], row["tokens"]] for row in rows] == cases
    assert all(row["tokens_per_second"] > 0 and "note" not in row for row in rows)
    assert rows[1]["planned_gib"] < rows[0]["planned_gib"]


def test_a_row_that_fails_says_why(example, tmp_path):
    example("chat_assistant/memory.py", "--model", tmp_path, "--methods", "qlora", "--shapes", "2x32")
    rows = json.loads((tmp_path / "runs" / "memory.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 2
    assert all("has no config.json" in row["note"] for row in rows)


def test_chat_assistant(example, words, tmp_path):
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"red {i}"},
                {"role": "assistant", "content": ("yes", "no")[i % 2]},
            ]
        }
        for i in range(40)
    ]
    overrides = [*words(chats), f"data.eval={tmp_path / 'rows.jsonl'}", "data.eval_limit=6", "data.max_length=64"]
    overrides += ["training.global_batch_size=4", "training.batch_size=2", "evaluation.max_new_tokens=4"]
    example("chat_assistant/run.py", *overrides, "--questions", "5", "--batch-size", "2")
    found = results(tmp_path / "runs" / "ultrachat")
    assert found["gradient_accumulation"] == 2
    assert found["eval_rows"] == 6
    assert set(found["inference"]) == {"one at a time", "batched", "batched and compiled"}
    assert all(way["same"] <= 5 and way["tokens_per_second"] > 0 for way in found["inference"].values())
    statement = json.loads((tmp_path / "runs" / "ultrachat" / "merged" / "pyquant-merge.json").read_text())
    assert statement["base_weights"] == "16bit"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sentiment/run.py", "--small", "adapter.rank=8"), "adapter.rank is not a configuration key; did you mean"),
        (("choose_a_method/run.py", "model.path=x", "--methods", "full,half"), "half is none of the methods full"),
        (("chat_assistant/memory.py", "--random-weights", "--shapes", "4"), "4 is no shape; write rows x tokens"),
        (("chat_assistant/memory.py",), "no model is named; give --model, --random-weights or --small"),
        (("drop_in.py",), "no model or no data is named"),
    ],
)
def test_a_mistake_is_one_sentence(example, words, message):
    assert message in " ".join(example(*words, code=2).split())


def test_the_drop_in_trains_the_same_losses(example, words, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, data, *_ = (word.partition("=")[2] for word in words(pairs(["yes", "no"])))
    output = example("drop_in.py", "--model", model, "--data", data, "--steps", "4")
    changed = [line for line in output.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert [line for line in changed if line.strip("+-")] == [
        "-from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig",
        "+from transformers import AutoModelForCausalLM, AutoTokenizer",
        "+from pyquant import BitsAndBytesConfig",
    ]
    losses = {
        line.split()[0]: json.loads(line.partition("losses ")[2]) for line in output.splitlines() if "losses" in line
    }
    assert len(losses["pyquant"]) == 4
    assert losses["pyquant"] == pytest.approx(losses["bitsandbytes"], rel=2e-2)
