"""Text from a model with or without an adapter, in 16 or 4 bits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Answer", "Conversation", "generate_batch", "generate_text", "load_for_inference"]


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: without special tokens and surrounding white space.
        tokens: new tokens, the end token included.
        ended: whether it reached an end token, rather than the limit.
    """

    text: str
    tokens: int
    ended: bool


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
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_ends(model, tokenizer),
        **_sampling(temperature, top_p),
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


class Conversation:
    """A conversation with a model, in the chat template of its tokenizer.

    Args:
        system: what the model is told before the conversation, if anything.
        max_new_tokens: longest answer.
        temperature, top_p: see `generate_text`.

    Attributes:
        messages: all so far, as ``{"role": ..., "content": ...}``.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ):
        from .training.errors import ConfigError

        if not tokenizer.chat_template:
            raise ConfigError("the model's tokenizer has no chat template; pyquant generate continues a plain prompt.")
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.sampling = _sampling(temperature, top_p)
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self._fixed = len(self.messages)

    def reset(self) -> None:
        """Forgets everything but the system message."""
        del self.messages[self._fixed :]

    @torch.inference_mode()
    def reply(self, text: str, on_text: Callable[[str], None] = lambda text: None) -> Answer:
        """The model's answer to `text`; both join `messages`. An interrupted one leaves them as they were.

        Where the conversation no longer fits the model's context, its oldest exchanges are left out of what the model
        sees.

        Args:
            on_text: called with each piece of the answer as soon as it is known.

        Raises:
            ConfigError: `text` alone does not fit the model's context.
        """
        from transformers import TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if text:
                    on_text(text)

        ids = self._ids([*self.messages, {"role": "user", "content": text}])
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=_ends(self.model, self.tokenizer),
            streamer=Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **self.sampling,
        )[0, ids.shape[1] :].tolist()
        ended = bool(output) and output[-1] in _ends(self.model, self.tokenizer)
        answer = Answer(self.tokenizer.decode(output, skip_special_tokens=True).strip(), len(output), ended)
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]
        return answer

    def _ids(self, messages: list[dict[str, str]]) -> torch.Tensor:
        """Token ids ``[1, length]``, without as many of the oldest exchanges as leaves room for an answer."""
        from .training.errors import ConfigError

        room = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        room -= min(self.max_new_tokens, room // 2)
        while True:
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(rendered, return_tensors="pt", add_special_tokens=False)["input_ids"]
            if ids.shape[1] <= room:
                return ids.to(self.model.device)
            if len(messages) <= self._fixed + 1:
                raise ConfigError(
                    f"the message has {ids.shape[1]} tokens, and the model's context has room for {room}."
                )
            messages = messages[: self._fixed] + messages[self._fixed + 2 :]


@torch.inference_mode()
def generate_batch(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    batch_size: int = 8,
    chat_template: str = "auto",
    compiled: bool = False,
) -> list[Answer]:
    """Continue many prompts with the likeliest tokens, several at a time; one answer a prompt, in their order.

    A row's sums are taken in another order when others are beside it, so that in 16 bits an answer can turn out
    differently from `generate_text`'s where two tokens are about as likely.

    Args:
        batch_size: prompts in a forward pass; those of like length go together.
        chat_template: see `generate_text`.
        compiled: compile the step from token to token, with a cache of fixed size. All batches then have one shape. It
            takes a minute or more, once for each shape.
    """
    from .training.config import DataConfig
    from .training.data import render_prompt

    texts = [render_prompt(prompt, tokenizer, DataConfig(chat_template=chat_template)) for prompt in prompts]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    ends = _ends(model, tokenizer)
    padding: dict[str, Any] = {"padding": True}
    options: dict[str, Any] = {}
    if compiled:
        padding = {"padding": "max_length", "max_length": max(lengths)}
        options = {"cache_implementation": "static", "compile_config": _compile_config(model.device)}
    answers: dict[int, Answer] = {}
    for at in range(0, len(order), batch_size):
        chunk = order[at : at + batch_size]
        rows = [texts[i] for i in chunk]
        if compiled:
            rows += rows[-1:] * (batch_size - len(rows))
        # Padded on the left, so that every prompt ends where its answer begins.
        inputs = tokenizer(rows, return_tensors="pt", return_token_type_ids=False, padding_side="left", **padding).to(
            model.device
        )
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
            **options,
        )
        for index, ids in zip(chunk, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=False):
            end = next((place for place, token in enumerate(ids) if token in ends), None)
            ids = ids if end is None else ids[: end + 1]
            answers[index] = Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids), end is not None)
    return [answers[index] for index in range(len(texts))]


def _sampling(temperature: float, top_p: float) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}


def _compile_config(device: torch.device):
    from transformers import CompileConfig

    if device.type != "cpu":
        return CompileConfig(fullgraph=False)
    config = CompileConfig(fullgraph=False, mode="default")  # the default mode is CUDA graphs
    config._compile_all_devices = True  # generate compiles on accelerators alone unless told so
    return config


def _ends(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation settings."""
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known]
    return sorted({token for token in [*known, tokenizer.eos_token_id] if token is not None})
