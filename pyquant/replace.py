"""Turning a model's dense linear layers into 4-bit ones and back, in place."""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from pyquant.functional import BLOCKSIZES, FLOAT_DTYPES, QUANT_TYPES, QuantState
from pyquant.nn import Linear4bit, Params4bit
from pyquant.report import survey

__all__ = [
    "check_options",
    "dequantize_linear",
    "matches_glob",
    "name_patterns",
    "refuse_adapters",
    "replace_linear",
    "why_dense",
]


def replace_linear(
    model: torch.nn.Module,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    skip: Sequence[str] = ("lm_head",),
    targets: Sequence[str] | None = None,
    quant_storage: torch.dtype = torch.uint8,
    verbose: bool = True,
) -> torch.nn.Module:
    """Replaces a model's linear layers by 4-bit ones, in place and one at a time.

    ``torch.nn.Linear`` layers are quantized where they are; ``bitsandbytes.nn.Linear4bit`` layers are taken over with
    their storage and their own settings. Layers that are 4-bit already stay as they are, so calling it again is safe.
    At no time is there more than the model and one layer.

    A name pattern is a glob (``*`` matches anything) for a module's whole name or its end, or for a module that holds
    it: ``"q_proj"``, ``"layers.0"``, ``"*.mlp.*"``.

    Args:
        model: any module; a Hugging Face model, say. It must not have adapters yet.
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: elements that share one scale: 32, 64, 128, … 4096.
        double_quant: quantize the scales as well: 0.516 bytes a weight instead of 0.563 at block size 64.
        compute_dtype: dtype of the products; by default autocast's under autocast, else that of the inputs.
        skip: name patterns of layers to leave dense.
        targets: name patterns of the layers to replace; by default all.
        quant_storage: dtype that the packed bytes are viewed as (FSDP wants the other parameters' dtype).
        verbose: print what was done, and which matrices were left dense and why.

    Returns:
        The same model. Its ``quantization_report`` (`pyquant.QuantizationReport`) says for every module with weights
        whether it is in 4 bits, and if not, why.

    Raises:
        ValueError: an argument has an unsupported value, `targets` matches no linear layer, or a weight holds NaN or
            infinity. Nothing has been changed then.
        TypeError: a weight's dtype cannot be quantized, or the model has adapters already.
    """
    check_options(quant_type, blocksize, compute_dtype)
    skip, targets = name_patterns("skip", skip), name_patterns("targets", targets)
    refuse_adapters(model)

    if _is_linear(model):
        raise ValueError("the model is a linear layer itself; replace it with pyquant.nn.Linear4bit by hand")
    linears = {name: module for name, module in model.named_modules() if _is_linear(module)}
    # One module may stand under several names: it is replaced under all of them, and skipped by any.
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    names_of = {name: aliases[id(module)] for name, module in linears.items()}
    reasons = {name: why_dense(names_of[name], skip, targets) for name in linears}
    selected = {name: module for name, module in linears.items() if reasons[name] is None}
    if targets is not None and not selected:
        raise ValueError(
            f"targets {list(targets)} matches none of the model's linear layers"
            + (f" that skip {list(skip)} leaves" if skip else "")
            + f"; there are: {_summary(linears)}"
        )
    todo = {name: module for name, module in selected.items() if not isinstance(module, Linear4bit)}
    for name in todo:
        _check_weight(name, todo[name], quant_storage, blocksize if double_quant else None)

    before = after = 0
    shared: dict[int, Params4bit] = {}
    names = list(todo)
    already = len(selected) - len(todo)
    reasons = {name: reason for name, reason in reasons.items() if reason is not None}
    # Only `todo` refers to the dense layers from here on, so that each is freed once it has been replaced.
    del linears, selected
    for name in names:
        dense = todo.pop(name)
        before += dense.weight.nbytes
        if _is_bitsandbytes(dense):
            layer = _from_bitsandbytes(dense)
        else:
            layer = _from_dense(dense, quant_type, blocksize, double_quant, compute_dtype, quant_storage, shared)
        layer.train(dense.training)
        for alias in names_of[name]:
            _set_submodule(model, alias, layer)
        after += _nbytes(layer)
        del dense
    model.quantization_report = survey(model, reasons)
    if verbose:
        print("\n".join([_done(len(names), already, before, after), *model.quantization_report.left_dense()]))
    return model


def dequantize_linear(model: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Replaces a model's 4-bit linear layers by dense ``torch.nn.Linear`` layers with the same (rounded) weights.

    Args:
        model: a model without adapters, changed in place.
        dtype: of the dense weights; by default the dtype that each weight had before it was quantized.

    Returns:
        The same model.

    Raises:
        TypeError: the model has adapters; merge or unload them first.
    """
    refuse_adapters(model)
    # Modules under several names and weights that several layers share stay so.
    layers: dict[int, torch.nn.Linear] = {}
    weights: dict[int, torch.nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, Linear4bit):
            continue
        dense = layers.get(id(module))
        if dense is None:
            dense = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            if id(module.weight) not in weights:
                weight = module.weight.dequantize()
                weights[id(module.weight)] = torch.nn.Parameter(
                    weight if dtype is None else weight.to(dtype), requires_grad=False
                )
            dense.weight = weights[id(module.weight)]
            dense.bias = module.bias
            dense.train(module.training)
            layers[id(module)] = dense
        _set_submodule(model, name, dense)
    model.__dict__.pop("quantization_report", None)
    return model


def check_options(quant_type: str, blocksize: int, compute_dtype: torch.dtype | None) -> None:
    """Raises ValueError for an unsupported value."""
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize!r}")
    if compute_dtype is not None and compute_dtype not in FLOAT_DTYPES:
        raise ValueError(f"compute_dtype must be torch.float32, float16 or bfloat16, got {compute_dtype}")


def name_patterns(name: str, patterns: Sequence[str] | None) -> tuple[str, ...] | None:
    """The patterns as a tuple; None stays None for `targets`, and is no pattern for `skip`."""
    if patterns is None:
        return () if name == "skip" else None
    if isinstance(patterns, str):
        patterns = (patterns,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{name} must be name patterns (strings), got {patterns!r}")
    return tuple(patterns)


def matches_glob(name: str, pattern: str) -> bool:
    """Whether a glob stands for the module's whole name or its end, or for a module that holds it."""
    parts = name.split(".")
    modules = (".".join(parts[: i + 1]) for i in range(len(parts)))  # the module itself and those that hold it
    return any(fnmatch.fnmatchcase(m, pattern) or fnmatch.fnmatchcase(m, f"*.{pattern}") for m in modules)


def why_dense(
    names: Sequence[str],
    skip: Sequence[str],
    targets: Sequence[str] | None,
    skips: Callable[[str, str], bool] = matches_glob,
) -> str | None:
    """Why the linear layer that stands under `names` is left dense, or None if it is to be quantized.

    Args:
        names: of the layer.
        skip: name patterns, in the syntax that `skips` reads.
        targets: globs, or None for all layers.
        skips: whether a name matches a pattern of `skip`.
    """
    for pattern in skip:
        if any(skips(name, pattern) for name in names):
            return f"skip names it ({pattern!r})"
    if targets is None or any(matches_glob(name, pattern) for name in names for pattern in targets):
        return None
    return "targets does not name it"


def _is_bitsandbytes(module: torch.nn.Module) -> bool:
    # By name: bitsandbytes need not be installed.
    return any(
        cls.__name__ == "Linear4bit" and cls.__module__.startswith("bitsandbytes.") for cls in type(module).__mro__
    )


def _is_linear(module: torch.nn.Module) -> bool:
    # Other subclasses of nn.Linear have a forward of their own, or are read by their owner without one.
    return type(module) is torch.nn.Linear or isinstance(module, Linear4bit) or _is_bitsandbytes(module)


def _adapter_layers(model: torch.nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__):
            yield name


def refuse_adapters(
    model: torch.nn.Module,
    remedy: str = "quantize first and call get_peft_model afterwards, or merge them with merge_and_unload()",
) -> None:
    """Raises TypeError for a model with adapters."""
    name = next(_adapter_layers(model), None)
    if name is not None:
        raise TypeError(f"the model has adapters already ({name}); {remedy}")


def _check_weight(
    name: str, module: torch.nn.Module, quant_storage: torch.dtype, double_quant_blocksize: int | None
) -> None:
    weight = module.weight
    if _is_bitsandbytes(module) and getattr(weight, "quant_state", None) is not None:
        return
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}.weight is {weight.dtype}; only float32, float16 and bfloat16 can be quantized")
    if weight.numel() == 0:
        raise ValueError(f"{name}.weight of shape {tuple(weight.shape)} has no elements; add {name!r} to skip")
    if (weight.numel() + 1) // 2 % quant_storage.itemsize:
        raise ValueError(
            f"{name}.weight packs into {(weight.numel() + 1) // 2} bytes, which {quant_storage} does not divide; "
            f"use quant_storage=torch.uint8 or add {name!r} to skip"
        )
    if weight.device.type == "meta":
        return
    low, high = torch.aminmax(weight.detach())
    if not (torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError(f"{name}.weight holds NaN or infinity; mend it or add {name!r} to skip")
    if double_quant_blocksize is not None:
        # Double quantization takes the mean of the blocks' scales, whose sum must stay within float32.
        largest = torch.finfo(torch.float32).max / -(-weight.numel() // double_quant_blocksize)
        if max(-low, high) > largest:
            raise ValueError(
                f"{name}.weight holds values above {largest:.1e}, too large for double quantization; "
                f"use double_quant=False or add {name!r} to skip"
            )


def _from_dense(
    module: torch.nn.Linear,
    quant_type: str,
    blocksize: int,
    double_quant: bool,
    compute_dtype: torch.dtype | None,
    quant_storage: torch.dtype,
    shared: dict[int, Params4bit],
) -> Linear4bit:
    layer = Linear4bit(
        module.in_features,
        module.out_features,
        bias=False,
        compute_dtype=compute_dtype,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=quant_storage,
        device="meta",
        blocksize=blocksize,
    )
    layer.bias = module.bias
    # Layers that share one dense weight share the 4-bit one.
    weight = shared.get(id(module.weight))
    if weight is None:
        weight = layer.weight._with_data(module.weight.detach())
        if weight.device.type != "meta":
            weight._quantize(weight.device)
        shared[id(module.weight)] = weight
    layer.weight = weight
    layer.quant_state = weight.quant_state
    return layer


def _from_bitsandbytes(module: torch.nn.Module) -> Linear4bit:
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    compute_dtype = module.compute_dtype if module.compute_type_is_set else None
    if state is None:
        quantized = Params4bit(
            weight.detach(),
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
        )._quantize(weight.device)
        return Linear4bit.from_weight(quantized, module.bias, compute_dtype)
    data, absmax = weight.data, state.absmax
    if getattr(state, "packing_format_for_cpu", False):
        # bitsandbytes repacks a weight that it has used for inference on a CPU; its own inverse undoes that, but leaves
        # plain statistics transposed and the offset in 16 bits.
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        data, state = _convert_weight_packed_for_cpu_inverse(data, state)
        absmax = state.absmax if state.nested else absmax.t().reshape(-1).float()
    taken = QuantState(
        absmax=absmax,
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
        offset=state.offset.float() if state.nested else None,
        state2=None
        if not state.nested
        else QuantState(
            state.state2.absmax, code=state.state2.code, blocksize=state.state2.blocksize, dtype=state.state2.dtype
        ),
    )
    parameter = Params4bit(
        data,
        quant_state=taken,
        blocksize=state.blocksize,
        compress_statistics=taken.nested,
        quant_type=state.quant_type,
        quant_storage=data.dtype,
        bnb_quantized=True,
    )
    return Linear4bit.from_weight(parameter, module.bias, compute_dtype)


def _set_submodule(model: torch.nn.Module, name: str, layer: torch.nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _nbytes(layer: Linear4bit) -> int:
    state = layer.weight.quant_state
    return layer.weight.nbytes + (state.nbytes() if state is not None else 0)


def _summary(linears: Iterable[str], limit: int = 12) -> str:
    """The distinct last parts of the names, or a note that there are none."""
    names = sorted({name.rpartition(".")[2] for name in linears})
    if not names:
        return "none at all"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _done(replaced: int, already: int, before: int, after: int) -> str:
    text = f"pyquant: {replaced} linear layer{'' if replaced == 1 else 's'} replaced by 4-bit"
    if replaced:
        text += f", weights {before / 2**20:,.1f} MiB -> {after / 2**20:,.1f} MiB"
    if already:
        text += f"; {already} were 4-bit already"
    return text
