"""Every example at its smallest: the real model and data, in too few steps to learn anything."""

import json
import math

import pytest

pytest.importorskip("trl")
pytest.importorskip("gguf")
pytestmark = pytest.mark.assets

FEW = ["training.max_steps=2", "data.limit=64", "evaluation.general_rows=1", "data.max_length=64"]


def results(folder):
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert content["command"].startswith("python examples/")
    assert content["arguments"]["training"]["max_steps"] == 2
    return content["results"]


def finite(scores, *keys):
    assert all(math.isfinite(scores[key]) for key in keys), scores


def rows(table):
    """The cells of the lines of a Markdown table, by their first."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}


def test_sentiment(example, tmp_path):
    output = example("sentiment/run.py", "--small", *FEW, "data.eval_limit=8")
    folder = tmp_path / "runs" / "sentiment"
    found = results(folder)
    assert set(found) == {"lora", "qlora"}
    for method, metrics in found.items():
        assert metrics["method"] == method
        for when in ("before", "after"):
            finite(metrics[when], "accuracy", "macro_f1", "perplexity", "general_perplexity")
            assert sum(map(sum, metrics[when]["confusion_matrix"])) == 8
        for file in ("confusion-before.png", "confusion.png"):
            assert (folder / method / file).read_bytes().startswith(b"\x89PNG")
        assert len(metrics["after"]["labels"]) == 7
    # Untrained adapters change nothing: 4-bit weights alone set the two apart.
    assert found["lora"]["before"]["general_perplexity"] < found["qlora"]["before"]["general_perplexity"]
    assert found["lora"]["trainable"] == found["qlora"]["trainable"]
    assert len(rows(output)["accuracy"]) == 4

    text = "A quiet film that stays with you."
    answer, told = example("sentiment/infer.py", "--run", folder / "qlora", text).strip().split("\t")
    assert told == text
    assert answer in found["qlora"]["after"]["labels"]


def test_financial_qa(example, tmp_path):
    words = ["data.eval_limit=4", "evaluation.generate=4", "evaluation.max_new_tokens=8", "--show", "3"]
    output = example("financial_qa/run.py", "--small", *FEW, *words)
    found = results(tmp_path / "runs" / "financial-qa")
    finite(found["after"], "perplexity", "token_accuracy", "bleu", "rouge_l", "ended", "general_perplexity")
    assert set(rows(output)) >= {"perplexity of the answers", "BLEU", "answers that end by themselves"}
    assert len(found["examples"]) == 3
    for shown in found["examples"]:
        assert "<response" not in shown["question"] + shown["after"]
        assert shown["tokens"] == 8 or shown["ended"]
    record = json.loads((tmp_path / "runs" / "financial-qa" / "adapter" / "pyquant.json").read_text())
    assert record["end_token"] == "<response|end>"


def test_role_prompts(example, tmp_path):
    words = ["data.eval_limit=4", "--act", "science", "--act", "trivia", "--max-new-tokens", "6"]
    output = example("role_prompts/run.py", "--small", *FEW, *words)
    found = results(tmp_path / "runs" / "role-prompts")
    finite(found["after"], "perplexity", "token_accuracy", "general_perplexity")
    assert found["data"]["targets"] == found["data"]["tokens"]  # plain language modelling
    assert found["batch_size"] * found["gradient_accumulation"] == 8
    assert f"Batch size found: {found['batch_size']} rows" in output
    assert [shown["prompt"] for shown in found["examples"]] == ["Act as science\nPrompt:\n", "Act as trivia\nPrompt:\n"]


def test_chat_assistant(example, tmp_path):
    words = ["data.eval_limit=4", "evaluation.generate=2", "evaluation.max_new_tokens=4"]
    output = example("chat_assistant/run.py", "--small", *FEW, *words, "--questions", "3", "--no-compiled")
    found = results(tmp_path / "runs" / "chat-assistant")
    finite(found["after"], "perplexity", "token_accuracy", "bleu", "rouge_l", "ended", "general_perplexity")
    assert found["data"]["targets"] < found["data"]["tokens"]  # what the assistant says alone
    # Compiling 30 layers takes a minute; the tiny model of the full-size test is compiled.
    assert list(found["inference"]) == ["one at a time", "batched"]
    assert len(rows(output)["batched"]) == 4
    assert (tmp_path / "runs" / "chat-assistant" / "merged" / "model.safetensors").is_file()


def test_choose_a_method(example, tmp_path):
    few = ["--small", *FEW, "data.eval_limit=8"]
    output = example("choose_a_method/run.py", *few, "--methods", "full,qlora")
    found = results(tmp_path / "runs" / "choose-a-method")
    assert list(found) == ["full", "qlora"]
    for method, row in found.items():
        finite(row, "accuracy", "macro_f1", "forgetting", "peak_gb", "seconds", "saved_mb")
        assert row["metrics"]["method"] == method
        assert row["metrics"]["steps"] == 2
    assert found["full"]["peak_gb"] > found["qlora"]["peak_gb"]
    assert found["full"]["saved_mb"] == pytest.approx(269, rel=0.01)
    assert found["qlora"]["saved_mb"] == pytest.approx(4 * 4.884, rel=0.01)  # float32
    table = rows(output)
    assert [len(table[method]) for method in found] == [7] * 2
    assert (tmp_path / "runs" / "choose-a-method" / "methods.png").read_bytes().startswith(b"\x89PNG")
    # A run that has ended is not run again.
    again = example("choose_a_method/run.py", *few, "--methods", "qlora")
    assert "holds a finished run: not run again" in again
    assert rows(again)["qlora"] == table["qlora"]


def test_memory(example, tmp_path):
    example("chat_assistant/memory.py", "--small", "--methods", "qlora", "--shapes", "2x128", "--steps", "1")
    content = json.loads((tmp_path / "runs" / "memory.json").read_text(encoding="utf-8"))
    assert [row["checkpointing"] for row in content["rows"]] == [False, True]
    for row in content["rows"]:
        assert "note" not in row, row
        finite(row, "peak_gib", "planned_gib", "tokens_per_second")
        assert row["peak_gib"] > row["planned_gib"] > 0.1


def test_the_drop_in(example, tmp_path):
    pytest.importorskip("bitsandbytes")
    example("drop_in.py", "--small", "--steps", "2")
    content = json.loads((tmp_path / "runs" / "drop-in.json").read_text(encoding="utf-8"))
    assert content["arguments"]["steps"] == 2
    ours, theirs = (content["results"][library]["losses"] for library in ("pyquant", "bitsandbytes"))
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, rel=5e-2)
    assert ours[1] < ours[0]  # the second loss is of weights that the first step has changed
