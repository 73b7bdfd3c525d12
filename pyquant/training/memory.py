"""Bytes of a model's weights: measured on a loaded model, or computed from its configuration alone."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .config import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["estimate_bytes", "format_bytes", "linear_bytes", "peak_bytes", "reset_peak", "weight_bytes"]

_NESTED_BLOCKSIZE = 256


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, quantization statistics included and shared tensors counted once."""
    return _distinct_bytes(_tensors(model))


def linear_bytes(model: torch.nn.Module) -> int:
    """`weight_bytes` of the decoder's linear layers alone, the ones that quantization is for."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return _distinct_bytes(tensor for layer in layers for tensor in _tensors(layer))


def estimate_bytes(config: "PretrainedConfig", quantization: QuantizationConfig) -> dict[str, int]:
    """Parameter counts and weight bytes in 16 bits and quantized, without loading anything.

    Returns:
        parameters, linear_parameters, bytes_16bit and bytes_4bit. Codebooks, at most 1 kB a layer, are left out.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    total = sum(p.numel() for p in model.parameters())
    linears = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] not in quantization.skip
    ]
    linear = sum(module.weight.numel() for module in linears)
    packed = sum(_quantized_bytes(module.weight.numel(), quantization) for module in linears)
    return {
        "parameters": total,
        "linear_parameters": linear,
        "bytes_16bit": 2 * total,
        "bytes_4bit": 2 * (total - linear) + packed,
    }


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # where there is no such file, or it may not be written
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int | None:
    """The most memory in use since `reset_peak`: what torch had allocated on a GPU, or on a CPU the resident memory of
    this process, interpreter and libraries included. None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


def format_bytes(count: int) -> str:
    """Bytes with their decimal unit, such as 113.2 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} B"


def _quantized_bytes(values: int, quantization: QuantizationConfig) -> int:
    blocks = -(-values // quantization.blocksize)
    statistics = 4 * blocks
    if quantization.double_quant:
        statistics = blocks + 4 * -(-blocks // _NESTED_BLOCKSIZE) + 4  # absmax, its own absmax, and the offset
    return -(-values // 2) + statistics


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    for parameter in module.parameters():
        yield parameter
        yield from _state_tensors(getattr(parameter, "quant_state", None))
    yield from module.buffers()


def _state_tensors(state: object) -> Iterator[torch.Tensor]:
    if state is None:
        return
    for name in ("absmax", "code", "offset"):
        tensor = getattr(state, name, None)
        if isinstance(tensor, torch.Tensor):
            yield tensor
    yield from _state_tensors(getattr(state, "state2", None))


def _distinct_bytes(tensors: Iterator[torch.Tensor]) -> int:
    distinct = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(distinct.values())
