import sys

import pytest
import torch

import pyquant
from pyquant.training.config import ModelConfig, QuantizationConfig
from pyquant.training.memory import estimate_bytes, format_bytes, linear_bytes, peak_bytes, reset_peak, weight_bytes
from pyquant.training.models import check_model, load_base, quantize


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_estimate_is_what_is_measured(tiny_model, double_quant):
    quantization = QuantizationConfig(double_quant=double_quant)
    estimate = estimate_bytes(check_model(str(tiny_model)), quantization)
    model = load_base(ModelConfig(path=str(tiny_model), precision="bf16"))
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert sum(p.numel() for p in model.parameters()) == estimate["parameters"]
    assert weight_bytes(model) == estimate["bytes_16bit"] + buffers
    assert linear_bytes(model) == 2 * estimate["linear_parameters"]
    model = quantize(model, quantization)
    assert isinstance(model.model.layers[0].mlp.up_proj, pyquant.nn.Linear4bit)
    codebooks = weight_bytes(model) - buffers - estimate["bytes_4bit"]
    # Two small tables, or at most one pair for each of the 14 layers.
    assert 16 * 4 <= codebooks <= 14 * (16 + 256) * 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_on_a_cpu_is_of_what_came_since():
    device, size = torch.device("cpu"), 200 * 2**20
    reset_peak(device)
    before = peak_bytes(device)
    torch.zeros(size, dtype=torch.uint8).add_(1)  # freed at once
    # Linux counts pages in batches, so that a few are always missing.
    assert 0.9 * size < peak_bytes(device) - before < 1.5 * size
    reset_peak(device)
    assert abs(peak_bytes(device) - before) < size // 2


def test_format_bytes():
    assert [format_bytes(n) for n in (12, 1500, 113_240_000, 14_500_000_000)] == [
        "12 B",
        "1.5 kB",
        "113.2 MB",
        "14.5 GB",
    ]
