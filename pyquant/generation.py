"""Text from a model with or without an adapter, in 16 or 4 bits."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["generate_text", "load_for_inference"]


def load_for_inference(
    model: str, adapter: str | None = None, quant_type: str = "auto", precision: str = "auto"
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a model, quantize it where asked and put an adapter on it.

    Args:
        model: folder or hub name of the base; one stored in 4 bits stays as it is.
        adapter: folder of a LoRA adapter, if any.
        quant_type: ``nf4``, ``fp4``, ``none``, or ``auto`` for what the adapter was trained on.
        precision: ``auto``, ``bf16``, ``fp16`` or ``fp32``.

    Raises:
        ModelError: the model or the adapter is missing or cannot be used.
        ConfigError: `quant_type` asks to quantize a model that is quantized already.
    """
    from .training.config import ModelConfig
    from .training.errors import ConfigError
    from .training.methods import fit_vocabulary
    from .training.models import (
        adapter_tokenizer,
        check_adapter,
        check_model,
        load_adapter,
        load_packed,
        load_quantized,
        quantization_of,
        set_end_token,
    )

    packed = getattr(check_model(model), "quantization_config", None) is not None
    if packed and quant_type != "auto":
        raise ConfigError(f"{model} is stored quantized already; leave --quant-type at auto, or give the 16-bit model.")
    if adapter is not None:
        check_adapter(adapter)
    tokenizer = adapter_tokenizer(model, adapter)
    settings = ModelConfig(path=model, precision=precision)
    base = load_packed(settings) if packed else load_quantized(settings, quantization_of(adapter, quant_type))
    if adapter is not None:
        fit_vocabulary(base, tokenizer)
        set_end_token(base, tokenizer, adapter)
        base = load_adapter(base, adapter)
    return base.eval(), tokenizer


@torch.inference_mode()
def generate_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    chat_template: str = "auto",
) -> str:
    """Continue a prompt and return the new text alone.

    Args:
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: sample from the fewest tokens that hold this much probability.
        chat_template: ``auto``, ``always`` or ``never`` put the prompt into the tokenizer's chat template.
    """
    from .training.config import DataConfig
    from .training.data import render_prompt

    text = render_prompt(prompt, tokenizer, DataConfig(chat_template=chat_template))
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_ends(model, tokenizer),
        **sampling,
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _ends(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation settings."""
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known]
    return sorted({token for token in [*known, tokenizer.eos_token_id] if token is not None})
