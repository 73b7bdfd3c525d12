"""Fixtures of the whole suite."""

import os

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # as the command line does, before datasets is imported

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


@pytest.fixture
def skip_without_assets():
    """Skips the test for want of what a package index would give. Where one is meant to be reachable a skip would hide
    that nothing was tested: with PYQUANT_TEST_REQUIRE_ASSETS=1 nothing happens, and the failure is told."""

    def skip(reason: str) -> None:
        if os.environ.get("PYQUANT_TEST_REQUIRE_ASSETS", "0") in ("", "0"):
            pytest.skip(f"needs the package index: {reason}")

    return skip


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """Runs the test on the CPU, and on the GPU where there is one."""
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)


def _tiny_mistral(**sizes):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
        **sizes,
    )
    return MistralForCausalLM(config).eval()


@pytest.fixture
def tiny_mistral():
    """A random float32 Mistral with grouped-query attention: 14 linear layers and the head."""
    return _tiny_mistral(hidden_size=64, intermediate_size=160)


@pytest.fixture
def odd_mistral():
    """The same, with input features that are no multiple of the block size: 72 and 77."""
    return _tiny_mistral(hidden_size=72, intermediate_size=77)


@pytest.fixture
def token_ids() -> torch.Tensor:
    return torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(7))


CPU_ISAS = ("portable", "avx2", "avx512", "amx")


@pytest.fixture
def each_isa():
    """A generator function: each step forces the next of the instruction sets that this processor has."""
    from pyquant import _C

    chosen = _C.cpu_isa()

    def steps():
        for name in CPU_ISAS:
            try:
                _C.set_cpu_isa(name)
            except ValueError:
                continue
            yield name

    yield steps
    _C.set_cpu_isa(chosen)
