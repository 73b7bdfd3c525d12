"""Which of a model's weights are in 4 bits, which are not, and why: nothing is skipped in silence."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from pyquant.nn import Linear4bit

__all__ = ["ModuleReport", "QuantizationReport", "survey"]


@dataclass(frozen=True)
class ModuleReport:
    """One module that holds weights.

    Attributes:
        name: of the module, or of the parameter where a module holds several matrices by itself, as experts do.
        kind: the module's class, with the shape for expert parameters.
        parameters: how many weights it holds, before they were packed. What it shares with a module before it counts
            there, so that neither sum counts anything twice.
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
_TIED = "its weight is tied to"
# Unlike type(module) is Linear: a subclass may have another forward, or be read by its owner without one.
_SUBCLASS = "a subclass of Linear with a forward of its own"


def survey(model: torch.nn.Module, reasons: Mapping[str, str] | None = None) -> QuantizationReport:
    """What a model's weights are now.

    Args:
        model: any module, before or after quantization.
        reasons: why linear layers were left dense, by their names. That a weight is tied to one before it goes first.
    """
    reasons = reasons or {}
    report = QuantizationReport()
    owners: dict[int, str] = {}  # the first name of each parameter
    for name, module in model.named_modules():
        held = {key: p for key, p in module._parameters.items() if p is not None}
        if not held:
            continue
        own = {key: p for key, p in held.items() if id(p) not in owners}
        tied = next((owners[id(p)] for p in held.values() if id(p) in owners and p.dim() >= 2), None)
        if isinstance(module, Linear4bit):
            report.append(_of_linear_4bit(name, module, own, tied))
        else:
            report.extend(_of_dense(name, module, own, tied, reasons.get(name)))
        owners.update((id(p), f"{name}.{key}".lstrip(".").removesuffix(".weight")) for key, p in own.items())
    return report


def _of_linear_4bit(name: str, layer: Linear4bit, own: Mapping[str, torch.Tensor], tied: str | None) -> ModuleReport:
    weight, state = layer.weight, layer.weight.quant_state or layer.quant_state
    parameters, nbytes = sum(p.numel() for p in own.values()), sum(p.nbytes for p in own.values())
    if "weight" in own:
        parameters += layer.in_features * layer.out_features - weight.numel()
        nbytes += state.nbytes() if state is not None else 0
    nested = ", double quantization" if weight.compress_statistics else ""
    shared = f"; {_TIED} {tied}" if tied is not None else ""
    reason = f"{weight.quant_type}, blocks of {weight.blocksize}{nested}{shared}"
    return ModuleReport(name, type(layer).__name__, parameters, nbytes, True, reason)


def _of_dense(
    name: str, module: torch.nn.Module, own: Mapping[str, torch.Tensor], tied: str | None, reason: str | None
) -> Iterator[ModuleReport]:
    stacks = {key: p for key, p in own.items() if p.dim() >= 3 and not _is_convolution(module)}
    for key, p in stacks.items():
        kind = f"{type(module).__name__} {'×'.join(map(str, p.shape))}"
        why = _EXPERTS if "expert" in f"{name} {type(module).__name__}".lower() else _STACK
        yield ModuleReport(f"{name}.{key}".lstrip("."), kind, p.numel(), p.nbytes, False, why)
    others = [p for key, p in own.items() if key not in stacks]
    if others or not stacks:
        parameters, nbytes = sum(p.numel() for p in others), sum(p.nbytes for p in others)
        reason = f"{_TIED} {tied}" if tied is not None else reason or _reason(module, others)
        yield ModuleReport(name, type(module).__name__, parameters, nbytes, False, reason)


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
