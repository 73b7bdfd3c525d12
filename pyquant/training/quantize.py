"""Saving a model in 4 bits from the command line."""

from pathlib import Path

import torch
from safetensors import SafetensorError

import pyquant
from pyquant.report import QuantizationReport

from .config import QuantizationConfig
from .errors import ConfigError, ModelError
from .models import check_model

__all__ = ["quantize"]

_DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def quantize(
    model: str,
    output: str | Path,
    quantization: QuantizationConfig,
    precision: str = "auto",
    format: str = "bitsandbytes",
    max_shard_bytes: int = 2_000_000_000,
) -> tuple[int, int, QuantizationReport]:
    """Quantize a model's linear layers and save it, one tensor at a time; see `pyquant.quantize_pretrained`.

    Returns:
        Bytes of the weights before and after, and what was quantized and what was not.

    Raises:
        ConfigError: ``output`` holds something.
        ModelError: the model is missing, stored quantized already or cannot be read, a weight cannot be quantized, or
            the result cannot be written. Nothing is left in ``output`` then.
    """
    if getattr(check_model(model), "quantization_config", None) is not None:
        raise ModelError(f"{model} is stored quantized; give the 16-bit model, which is quantized here.")
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not empty; give a new folder for the 4-bit model.")
    config = pyquant.PyQuantConfig(
        quantization.method, quantization.blocksize, quantization.double_quant, skip=quantization.skip
    )
    try:
        return pyquant.quantize_pretrained(
            str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model,
            output,
            config,
            format=format,
            dtype=_DTYPES[precision],
            max_shard_bytes=max_shard_bytes,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"the model {model} cannot be quantized: {error}.") from error
