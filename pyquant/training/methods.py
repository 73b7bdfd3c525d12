"""What a method trains: an adapter, a part of the weights, or all of them; and in which learning-rate groups."""

import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .config import Config, PartialConfig, QuantizationConfig, nearest
from .errors import ConfigError
from .models import add_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["choose_trainable", "fit_vocabulary", "resolve_method", "split_learning_rates", "uses_adapter"]


def resolve_method(config: Config) -> str:
    """The method of a run: qlora, lora, partial or full. All but qlora train on 16-bit weights, so that for them
    ``config.quantization.method`` becomes none.

    Raises:
        ConfigError: qlora without a 4-bit type, or partial without anything to train.
    """
    method, quantized = config.training.method, config.quantization.method != "none"
    if method == "auto":
        method = "qlora" if quantized else "lora"
    if method == "qlora" and not quantized:
        raise ConfigError("training.method is qlora, but quantization.method is none; set it to nf4 or fp4, or lora.")
    if method == "partial" and config.partial == PartialConfig():
        raise ConfigError(
            "training.method is partial, but the section partial names nothing to train; "
            "set partial.last_layers, norms, embeddings or patterns."
        )
    if method != "qlora":
        config.quantization = QuantizationConfig(**(vars(config.quantization) | {"method": "none"}))
    return method


def uses_adapter(method: str) -> bool:
    """Whether the method leaves an adapter, rather than a model."""
    return method in ("qlora", "lora")


def choose_trainable(
    model: "PreTrainedModel", config: Config, method: str, new_tokens: Sequence[int] = ()
) -> torch.nn.Module:
    """Put the adapter on the model, or mark the parameters that are trained; trained parameters become float32.

    Args:
        new_tokens: ids of the tokens that were added to the vocabulary.

    Raises:
        ConfigError: a pattern of ``partial`` matches no parameter.
        ModelError: see `add_adapter`.
    """
    if uses_adapter(method):
        return add_adapter(model, config.adapter, new_tokens)
    if method == "full":
        model.requires_grad_(True)
    else:
        _mark_partial(model, config.partial)
    # Steps of the size of a learning rate would be rounded away in 16 bits; autocast runs the products there.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def fit_vocabulary(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give the embeddings a row for every token; new rows start near the mean of the others. Never takes rows away."""
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=model.device.type != "meta")


def split_learning_rates(model: torch.nn.Module, optimizer: torch.optim.Optimizer, embedding_rate: float) -> None:
    """Move embeddings and output layer into parameter groups of their own learning rate; before the scheduler is made.

    The rest keeps the rate that the optimizer was made with.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if _is_embedding(names[id(p)])]
        if own:
            group["params"] = [p for p in group["params"] if not _is_embedding(names[id(p)])]
            options = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group(options | {"params": own, "lr": embedding_rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _is_embedding(name: str) -> bool:
    # The adapter of an output layer is an adapter; a trained copy or new rows of it are embeddings.
    return any(part in ("embed_tokens", "lm_head") for part in name.split(".")) and "lora_" not in name


def _mark_partial(model: "PreTrainedModel", partial: PartialConfig) -> None:
    model.requires_grad_(False)
    layers = model.get_decoder().layers
    if partial.last_layers > len(layers):
        raise ConfigError(f"partial.last_layers is {partial.last_layers}, but the model has {len(layers)} layers.")
    chosen: list[torch.nn.Module] = list(layers[len(layers) - partial.last_layers :])
    if partial.norms:
        chosen += [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    if partial.embeddings:
        chosen += [model.get_input_embeddings(), model.get_output_embeddings()]
    for module in chosen:
        module.requires_grad_(True)
    parameters = dict(model.named_parameters())
    for pattern in partial.patterns:
        matched = fnmatch.filter(parameters, pattern)
        if not matched:
            raise ConfigError(
                f"partial.patterns has {pattern}, which matches no parameter; {nearest(pattern, [*parameters])}"
            )
        for name in matched:
            parameters[name].requires_grad_(True)
