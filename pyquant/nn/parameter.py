"""The parameter of a 4-bit layer: packed bytes, and the state that gives them a meaning."""

import copy
from typing import Any

import torch

from pyquant.errors import CheckpointError
from pyquant.functional import QuantState, dequantize_4bit, quantize_4bit

__all__ = ["Params4bit"]


class Params4bit(torch.nn.Parameter):
    """A weight that quantizes itself when it is first moved to a device, as in bitsandbytes.

    Until then it holds the 16- or 32-bit weight; afterwards the packed bytes, with `quant_state` beside them.

    Args:
        data: the weight, or packed bytes if `bnb_quantized`.
        requires_grad: must stay False: a 4-bit weight has no gradient.
        quant_state: of packed bytes.
        blocksize: 64 by default.
        compress_statistics: double quantization.
        quant_type: ``"fp4"`` or ``"nf4"``.
        quant_storage: dtype that the packed bytes are viewed as.
        module: the layer that owns the weight; its `quant_state` is kept in step.
        bnb_quantized: whether `data` is packed already.
    """

    def __new__(
        cls,
        data: torch.Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: torch.nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs,
    ) -> "Params4bit":
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.quant_state = quant_state
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_storage = quant_storage
        self.module = module
        self.bnb_quantized = bnb_quantized
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: torch.Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str = "cuda",
        module: torch.nn.Module | None = None,
        **kwargs,
    ) -> "Params4bit":
        """A parameter from a checkpoint's entries.

        Args:
            data: the packed weight, in any storage dtype.
            quantized_stats: the entries beside it (`QuantState.as_dict`), keys with or without prefix.

        Raises:
            CheckpointError: entries are missing or malformed, or disagree with the packed weight.
        """
        state = QuantState.from_dict(quantized_stats, device=device)
        expected = (state.shape.numel() + 1) // 2
        if data.nbytes != expected:
            raise CheckpointError(
                f"the packed weight has {data.nbytes} bytes, its shape {tuple(state.shape)} needs {expected}; "
                f"the checkpoint is truncated or its shapes disagree"
            )
        self = cls(
            data.to(device),
            requires_grad=requires_grad,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=data.dtype,
            module=module,
            bnb_quantized=True,
        )
        if module is not None:
            module.quant_state = state
        return self

    def dequantize(self) -> torch.Tensor:
        """The weight as a dense tensor of its original shape and dtype."""
        return dequantize_4bit(self.data, self.quant_state) if self.bnb_quantized else self.data

    def _quantize(self, device: torch.device | str) -> "Params4bit":
        packed, state = quantize_4bit(
            self.data.to(device),
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        # NaN and infinity reach the scales. The CPU op has refused them by now; a GPU's is asked here, once a weight.
        # The scales' mean can also overflow by itself.
        scale = state.offset if state.nested else state.absmax
        if not torch.isfinite(scale).all():
            raise ValueError("the weight holds NaN, infinity or values near float32's largest; it cannot be quantized")
        self.data = packed
        self.quant_state = state
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = state
        return self

    def to(self, *args, **kwargs):
        """Moves the weight; the first move to a real device quantizes it there. A dtype changes nothing once packed."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if not self.bnb_quantized:
            if device is not None and device.type != "meta" and self.device.type != "meta":
                return self._quantize(device)
            return self._with_data(self.data.to(device=device, dtype=dtype, non_blocking=non_blocking))
        if device is None or device == self.device:
            return self
        moved = self._with_data(self.data.to(device=device, non_blocking=non_blocking))
        if device.type != "meta" and self.quant_state is not None:
            moved.quant_state = copy.copy(self.quant_state)
            moved.quant_state.state2 = copy.copy(self.quant_state.state2)
            moved.quant_state.to(device)
        if self.module is not None:
            self.module.quant_state = moved.quant_state
        return moved

    def cpu(self):
        return self.to(device="cpu")

    def cuda(self, device: int | torch.device | str | None = None, non_blocking: bool = False):
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    # Casts reach the parameter when the packed bytes are stored as floats: they must not touch the bytes.
    def float(self):
        return self if self.bnb_quantized else self._with_data(self.data.float())

    def double(self):
        return self if self.bnb_quantized else self._with_data(self.data.double())

    def half(self):
        return self if self.bnb_quantized else self._with_data(self.data.half())

    def bfloat16(self):
        return self if self.bnb_quantized else self._with_data(self.data.bfloat16())

    def type(self, dtype=None, non_blocking: bool = False):
        if dtype is not None and self.bnb_quantized:
            return self
        return super().type(dtype, non_blocking)

    def _with_data(self, data: torch.Tensor) -> "Params4bit":
        return type(self)(data, requires_grad=self.requires_grad, **self._attributes())

    def _attributes(self) -> dict[str, Any]:
        names = ("quant_state", "blocksize", "compress_statistics", "quant_type", "quant_storage", "module",
                 "bnb_quantized")  # fmt: skip
        return {name: self.__dict__[name] for name in names}

    # torch.save, pickle and copy. The owning layer is left out: it holds this parameter, and sets itself again.
    def __reduce_ex__(self, protocol):
        attributes = {**self._attributes(), "module": None}
        return _rebuild, (type(self), self.data, self.requires_grad, attributes)

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        attributes = {**self._attributes(), "quant_state": copy.deepcopy(self.quant_state, memo)}
        attributes["module"] = memo.get(id(self.module), self.module)
        result = type(self)(self.data.clone(), requires_grad=self.requires_grad, **attributes)
        memo[id(self)] = result
        return result

    def __copy__(self):
        return self._with_data(self.data)

    # FSDP resolves checkpoint keys such as "weight.nested_absmax" attribute by attribute. Properties, because
    # torch.compile traces them and breaks the graph at __getattr__.
    @property
    def absmax(self):
        return _statistic(self, "absmax").absmax

    @property
    def code(self):
        return _statistic(self, "code").code

    @property
    def quant_map(self):
        return _statistic(self, "quant_map").code

    @property
    def offset(self):
        return _statistic(self, "offset").offset

    @property
    def state2(self):
        return _statistic(self, "state2").state2

    @property
    def nested_absmax(self):
        return _statistic(self, "nested_absmax", nested=True).absmax

    @property
    def nested_blocksize(self):
        return _statistic(self, "nested_blocksize", nested=True).blocksize

    @property
    def nested_quant_map(self):
        return _statistic(self, "nested_quant_map", nested=True).code

    @property
    def nested_dtype(self):
        return _statistic(self, "nested_dtype", nested=True).dtype

    @property
    def nested_offset(self):
        return _statistic(self, "nested_offset").offset


def _statistic(weight: Params4bit, name: str, nested: bool = False) -> QuantState:
    state = weight.__dict__.get("quant_state")
    if nested and state is not None:
        state = state.state2
    if state is None:
        raise AttributeError(f"'{type(weight).__name__}' object has no attribute '{name}'")
    return state


def _rebuild(cls, data: torch.Tensor, requires_grad: bool, attributes: dict[str, Any]) -> Params4bit:
    return cls(data, requires_grad=requires_grad, **attributes)
