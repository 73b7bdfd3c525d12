import shutil

import pytest
import safetensors
import torch

import pyquant.pretrained
from pyquant.training.config import ModelConfig, QuantizationConfig
from pyquant.training.errors import ConfigError, ModelError
from pyquant.training.models import load_base
from pyquant.training.models import quantize as quantize_in_place
from pyquant.training.quantize import quantize


def test_bitsandbytes_reads_what_is_saved(tiny_model, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    before, after, report = quantize(str(tiny_model), tmp_path / "q", QuantizationConfig(), "fp32")
    assert after < 0.5 * before
    assert len(report.quantized) == 14
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    ours = quantize_in_place(load_base(ModelConfig(path=str(tiny_model), precision="fp32")), QuantizationConfig()).cpu()
    layers = dict(ours.named_modules())
    checked = 0
    for name, layer in theirs.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
            assert torch.equal(weight.float(), layers[name].weight.dequantize().float())
            checked += 1
    assert checked == 14
    assert torch.equal(theirs.lm_head.weight, ours.lm_head.weight)

    with pytest.raises(ModelError, match="is stored quantized; give the 16-bit model"):
        quantize(str(tmp_path / "q"), tmp_path / "again", QuantizationConfig())
    with pytest.raises(ConfigError, match="q exists and is not empty"):
        quantize(str(tiny_model), tmp_path / "q", QuantizationConfig())


def test_what_cannot_be_read_or_written_is_one_sentence(tiny_model, tmp_path, monkeypatch):
    copied = shutil.copytree(tiny_model, tmp_path / "model")
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"^the model .* cannot be quantized: .*\.safetensors cannot be read .*\.$"):
        quantize(str(copied), tmp_path / "new", QuantizationConfig())

    def full(*args, **kwargs):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(pyquant.pretrained, "save_file", full)
    with pytest.raises(ModelError, match=r"cannot be quantized: .* No space left on device"):
        quantize(str(tiny_model), tmp_path / "new", QuantizationConfig())
    assert not (tmp_path / "new").exists()
