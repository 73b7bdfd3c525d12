"""Saving a model in 4 bits, in bitsandbytes' checkpoint format."""

from pathlib import Path

from .config import ModelConfig, QuantizationConfig
from .errors import ConfigError
from .memory import weight_bytes
from .models import check_model, load_base, load_tokenizer, quiet
from .models import quantize as quantize_base

__all__ = ["quantize"]


def quantize(
    model: str, output: str | Path, quantization: QuantizationConfig, precision: str = "auto"
) -> tuple[int, int]:
    """Load a model, quantize its linear layers and save it; transformers with bitsandbytes reads the result too.

    Returns:
        Bytes of the weights before and after.

    Raises:
        ConfigError: ``output`` holds something.
        ModelError: the model is missing, or stored quantized already.
    """
    check_model(model)
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not empty; give a new folder for the 4-bit model.")
    tokenizer = load_tokenizer(model)
    loaded = load_base(ModelConfig(path=model, precision=precision))
    before = weight_bytes(loaded)
    quantize_base(loaded, quantization)
    loaded.config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quantization.method,
        "bnb_4bit_use_double_quant": quantization.double_quant,
        "bnb_4bit_compute_dtype": str(loaded.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": quantization.skip,
    }
    with quiet():
        loaded.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return before, weight_bytes(loaded)
