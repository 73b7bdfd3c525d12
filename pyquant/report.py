"""Which of a model's weights are in 4 bits, which are not, and why: nothing is skipped in silence."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from pyquant.nn import Linear4bit

__all__ = ["ModuleReport", "QuantizationReport", "survey"]


@dataclass(frozen=True)
class ModuleReport:
    """One module that holds weights of its own.

    Attributes:
        name: of the module, or of the parameter where a module holds several matrices by itself, as experts do.
        kind: the module's class, with the shape for expert parameters.
        parameters: how many weights it holds, before they were packed.
        nbytes: bytes that they take now, statistics included.
        quantized: whether they are in 4 bits.
        reason: how they were quantized, or why they were not.
    """

    name: str
    kind: str
    parameters: int
    nbytes: int
    quantized: bool
    reason: str


class QuantizationReport(list[ModuleReport]):
    """A `ModuleReport` for every module with weights, in the model's order. ``print(report)`` shows them all, with the
    numbers of repeated layers folded together; `summary` is two or three lines."""

    @property
    def quantized(self) -> list[ModuleReport]:
        return [module for module in self if module.quantized]

    @property
    def dense(self) -> list[ModuleReport]:
        return [module for module in self if not module.quantized]

    @property
    def experts(self) -> list[ModuleReport]:
        """The expert parameters, which stay dense because they are no linear layers."""
        return [module for module in self if module.reason == _EXPERTS]

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def summary(self) -> str:
        """What is in 4 bits, and a line for each kind of matrix that is not."""
        packed = self.quantized
        text = f"pyquant: {len(packed)} linear layer{'' if len(packed) == 1 else 's'} in 4 bits"
        if packed:
            text += f", {_mib(sum(m.nbytes for m in packed))} for {sum(m.parameters for m in packed):,} weights"
        return "\n".join([text, *self.left_dense()])

    def left_dense(self) -> list[str]:
        """A line for each kind of matrix that is not in 4 bits; norms, which hold none, are not worth one."""
        return [f"  left dense: {line}" for line in _lines(m for m in self.dense if m.reason != _NO_MATRIX)]


_EXPERTS = "expert matrices in one parameter, not a linear layer; they cannot be quantized yet"
_STACK = "a stack of matrices in one parameter, not a linear layer"
_NO_MATRIX = "no matrix"
# Unlike type(module) is Linear: a subclass may have another forward, or be read by its owner without one.
_SUBCLASS = "a subclass of Linear with a forward of its own"


def survey(model: torch.nn.Module, reasons: Mapping[str, str] | None = None) -> QuantizationReport:
    """What a model's weights are now.

    Args:
        model: any module, before or after quantization.
        reasons: why linear layers were left dense, by their names.
    """
    reasons = reasons or {}
    report = QuantizationReport()
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [
            (key, p) for key, p in module._parameters.items() if p is not None and id(p) not in seen  # tied ones once
        ]  # fmt: skip
        seen.update(id(p) for _, p in own)
        if not own:
            continue
        if isinstance(module, Linear4bit):
            report.append(_of_linear_4bit(name, module))
            continue
        stacks = [(key, p) for key, p in own if p.dim() >= 3 and not _is_convolution(module)]
        for key, p in stacks:
            kind = f"{type(module).__name__} {'×'.join(map(str, p.shape))}"
            reason = _EXPERTS if "expert" in f"{name} {type(module).__name__}".lower() else _STACK
            report.append(ModuleReport(f"{name}.{key}".lstrip("."), kind, p.numel(), p.nbytes, False, reason))
        others = [p for _, p in own if not any(p is stacked for _, stacked in stacks)]
        if others:
            parameters, nbytes = sum(p.numel() for p in others), sum(p.nbytes for p in others)
            reason = reasons.get(name) or _reason(module, others)
            report.append(ModuleReport(name, type(module).__name__, parameters, nbytes, False, reason))
    return report


def _of_linear_4bit(name: str, layer: Linear4bit) -> ModuleReport:
    weight, state = layer.weight, layer.weight.quant_state or layer.quant_state
    bias = 0 if layer.bias is None else layer.bias.nbytes
    nested = ", double quantization" if weight.compress_statistics else ""
    return ModuleReport(
        name,
        type(layer).__name__,
        layer.in_features * layer.out_features + (0 if layer.bias is None else layer.bias.numel()),
        weight.nbytes + bias + (state.nbytes() if state is not None else 0),
        True,
        f"{weight.quant_type}, blocks of {weight.blocksize}{nested}",
    )


def _reason(module: torch.nn.Module, parameters: list[torch.Tensor]) -> str:
    if type(module) is torch.nn.Linear:
        return "a linear layer that was not chosen"
    if isinstance(module, torch.nn.Embedding):
        return "an embedding"
    if all(p.dim() < 2 for p in parameters):
        return _NO_MATRIX
    if isinstance(module, torch.nn.Linear):
        return _SUBCLASS
    return f"{type(module).__name__} is not a linear layer"


def _is_convolution(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.modules.conv._ConvNd)


def _lines(modules: Iterable[ModuleReport]) -> Iterator[str]:
    """One line for modules that differ in layer numbers alone."""
    groups: dict[tuple, list[ModuleReport]] = {}
    for module in modules:
        key = (re.sub(r"\d+", "*", module.name), module.kind, module.parameters, module.quantized, module.reason)
        groups.setdefault(key, []).append(module)
    for (name, kind, *_), group in groups.items():
        first = group[0]
        times = f"{len(group)} × " if len(group) > 1 else ""
        shown = name if len(group) > 1 else first.name
        yield f"{shown or '(the model itself)'} ({times}{kind}, {_mib(sum(m.nbytes for m in group))}): {first.reason}"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"
