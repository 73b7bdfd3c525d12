"""Merging an adapter into its base, with a statement of which base that was."""

import json
import shutil
from pathlib import Path
from typing import Literal

from .config import ModelConfig, QuantizationConfig
from .errors import ConfigError
from .methods import fit_vocabulary
from .models import (
    adapter_record,
    adapter_tokenizer,
    check_adapter,
    check_model,
    load_adapter,
    load_base,
    quantize,
    quiet,
    set_end_token,
)

__all__ = ["merge"]


def merge(
    model: str,
    adapter: str | Path,
    output: str | Path,
    base: Literal["16bit", "4bit"] = "16bit",
    quant_type: str | None = None,
    precision: str = "auto",
    replace: bool = False,
) -> str:
    """Merge an adapter into its base and save a model without adapters, in 16 bits.

    ``16bit`` adds it to the original weights. ``4bit`` adds it to the weights as they are after quantization, which the
    adapter was trained on: the result does what the adapter did in training, at the cost of the base's precision.

    Args:
        model: folder or hub name of the base.
        adapter: the adapter's folder.
        output: folder for the merged model; it must be empty or new.
        base: which weights the adapter is added to.
        quant_type: ``nf4`` or ``fp4`` for ``4bit``, when the adapter does not say what it was trained on.
        precision: dtype of the saved weights.
        replace: whether what ``output`` holds gives way to the merged model, once that is whole.

    Returns:
        One sentence that says what was merged into what; ``pyquant-merge.json`` in the output holds it too.

    Raises:
        ConfigError: ``output`` holds something that is not to be replaced, or the quantization is not known.
        ModelError: the model or the adapter is missing or does not fit.
    """
    check_model(model)
    check_adapter(adapter)
    output = Path(output)
    if not replace and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not empty; give a new folder for the merged model.")
    quantization = _trained_quantization(adapter, quant_type) if base == "4bit" else None
    tokenizer = adapter_tokenizer(model, adapter)

    dense = load_base(ModelConfig(path=model, precision=precision))
    dtype = dense.dtype
    fit_vocabulary(dense, tokenizer)
    set_end_token(dense, tokenizer, adapter)
    if quantization is not None:
        import pyquant

        dense = pyquant.dequantize_linear(quantize(dense, quantization), dtype)
    merged = load_adapter(dense, adapter).merge_and_unload(safe_merge=True)
    folder = output
    if replace:
        folder = output.with_name(output.name + ".tmp")
        shutil.rmtree(folder, ignore_errors=True)  # of a merge that was killed
    with quiet():
        merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    weights = str(dtype).removeprefix("torch.")
    if quantization is None:
        into = f"the original {weights} weights of {model}"
    else:
        nested = ", double quantization" if quantization.double_quant else ""
        into = (
            f"the dequantized {quantization.method.upper()} weights of {model} "
            f"(blocksize {quantization.blocksize}{nested})"
        )
    sentence = f"Merged {adapter} into {into}; saved in {weights} to {output}."
    record = {"base": model, "base_weights": base, "adapter": str(adapter), "dtype": weights, "statement": sentence}
    if quantization is not None:
        record["quantization"] = vars(quantization)
    (folder / "pyquant-merge.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if replace:
        shutil.rmtree(output, ignore_errors=True)
        folder.rename(output)
    return sentence


def _trained_quantization(adapter: str | Path, quant_type: str | None) -> QuantizationConfig:
    record = adapter_record(adapter)
    trained = QuantizationConfig(**record["quantization"]) if record else None
    if quant_type is not None and (trained is None or trained.method != quant_type):
        return QuantizationConfig(method=quant_type)
    if trained is None:
        raise ConfigError(f"{adapter} does not say what it was trained on; give --quant-type nf4 or fp4.")
    if trained.method == "none":
        raise ConfigError(f"{adapter} was trained on 16-bit weights; merge it with --base 16bit.")
    return trained
