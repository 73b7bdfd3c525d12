import json
import sys

import pytest
import torch

from pyquant.generation import load_for_inference
from pyquant.training.errors import ConfigError, ModelError
from pyquant.training.merge import merge

merge_module = sys.modules["pyquant.training.merge"]


def logits(model, tokenizer):
    ids = tokenizer("the cat sat on the mat", return_tensors="pt")["input_ids"].to(model.device)
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(("base", "quant_type"), [("16bit", "none"), ("4bit", "auto")])
def test_the_merged_model_is_the_base_that_it_says(tiny_model, adapter, tmp_path, base, quant_type):
    sentence = merge(str(tiny_model), adapter, tmp_path / "merged", base, precision="fp32")
    merged = load_for_inference(str(tmp_path / "merged"), precision="fp32")
    separate = load_for_inference(str(tiny_model), str(adapter), quant_type, "fp32")
    other = load_for_inference(str(tiny_model), str(adapter), "none" if base == "4bit" else "auto", "fp32")
    found = logits(*merged)
    torch.testing.assert_close(found, logits(*separate), rtol=1e-3, atol=2e-3)
    assert (found - logits(*other)).abs().max() > 0.05  # the two bases are told apart

    record = json.loads((tmp_path / "merged" / "pyquant-merge.json").read_text())
    assert record["base_weights"] == base
    assert record["statement"] == sentence
    assert ("dequantized FP4 weights" in sentence and "blocksize 128" in sentence) == (base == "4bit")
    assert ("original float32 weights" in sentence) == (base == "16bit")


def test_a_merged_model_is_whole_or_not_there(tiny_model, adapter, tmp_path, monkeypatch):
    output = tmp_path / "merged"
    for folder in (output, tmp_path / "merged.tmp"):  # of an earlier run, and of one that was killed
        folder.mkdir()
        (folder / "old").touch()
    options = {"precision": "fp32", "replace": True}
    with monkeypatch.context() as patch:
        patch.setattr(merge_module.json, "dumps", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge(str(tiny_model), adapter, output, **options)
    assert [file.name for file in output.iterdir()] == ["old"]
    merge(str(tiny_model), adapter, output, **options)
    assert {"pyquant-merge.json", "config.json", "tokenizer.json"} <= {file.name for file in output.iterdir()}
    assert not (output / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_mistakes_are_named(tiny_model, adapter, tmp_path):
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        merge(str(tiny_model), tiny_model, tmp_path / "out")
    with pytest.raises(ModelError, match="it is an adapter"):
        merge(str(adapter), adapter, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="full exists and is not empty"):
        merge(str(tiny_model), adapter, tmp_path / "full")
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in adapter.iterdir():
        if file.name != "pyquant.json":
            (plain / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=r"plain does not say what it was trained on; give --quant-type"):
        merge(str(tiny_model), plain, tmp_path / "out", "4bit")
    assert not (tmp_path / "out").exists()
