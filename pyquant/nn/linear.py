"""Linear layers with a 4-bit weight."""

from typing import Any

import torch

from pyquant.errors import CheckpointError
from pyquant.functional import QuantState, matmul_4bit
from pyquant.nn.parameter import Params4bit

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4"]


class Linear4bit(torch.nn.Linear):
    """``y = x · Wᵀ + bias`` with a frozen 4-bit weight, under bitsandbytes' name, arguments and defaults.

    The layer starts with a dense weight, which is quantized by the first move to a device (``.to("cuda")``,
    ``.to("cpu")``); loading a checkpoint of either kind works before and after.

    Args:
        input_features: K.
        output_features: N.
        bias: whether there is one; it stays dense.
        compute_dtype: dtype that inputs are cast to for the product; the result is cast back. None: autocast's dtype
            under autocast, else the input's.
        compress_statistics: double quantization.
        quant_type: ``"fp4"`` or ``"nf4"``.
        quant_storage: dtype that the packed bytes are viewed as.
        device: of the dense weight.
        blocksize: elements that share one scale. bitsandbytes' layer has 64 alone.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        blocksize: int = 64,
    ):
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage

    @classmethod
    def from_weight(
        cls, weight: Params4bit, bias: torch.nn.Parameter | None, compute_dtype: torch.dtype | None
    ) -> "Linear4bit":
        """A layer around a weight that is quantized already."""
        n, k = weight.quant_state.shape
        layer = cls(
            k,
            n,
            bias=False,
            compute_dtype=compute_dtype,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
            device="meta",
            blocksize=weight.blocksize,
        )
        weight.module = layer
        layer.weight = weight
        layer.bias = bias
        layer.quant_state = weight.quant_state
        return layer

    @property
    def compute_type_is_set(self) -> bool:
        """Whether a compute dtype was chosen, under bitsandbytes' name."""
        return self.compute_dtype is not None

    def compute_dtype_for(self, x: torch.Tensor) -> torch.dtype:
        """The dtype that the product with `x` runs in."""
        if self.compute_dtype is not None:
            return self.compute_dtype
        # No input decides for later ones, as bitsandbytes' first does: an evaluation in float32 before training would
        # make every product under autocast one in float32.
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    def packed_state(self) -> QuantState:
        """What the weight's bytes mean.

        Raises:
            RuntimeError: the weight is not quantized yet.
        """
        # FSDP replaces parameters by plain ones; the layer remembers what the bytes mean.
        state = getattr(self.weight, "quant_state", None) or self.quant_state
        if state is None:
            raise RuntimeError(
                "this Linear4bit's weight is not quantized yet; move the layer or the model to a device first, "
                f'for example .to("{self.weight.device}")'
            )
        return state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.packed_state()
        dtype = x.dtype
        compute_dtype = self.compute_dtype_for(x)
        if dtype == compute_dtype:
            return matmul_4bit(x, self.weight, state, bias=self.bias)
        return matmul_4bit(x.to(compute_dtype), self.weight, state, bias=self.bias).to(dtype)

    def _apply(self, fn, recurse=True):
        # The weight is one object with its state: move it whole, and keep the parameter that others may refer to.
        weight = self._parameters.pop("weight")
        try:
            super()._apply(fn, recurse)
            with torch.no_grad():
                moved = fn(weight)
            if moved is not weight:
                if not isinstance(moved, Params4bit):
                    moved = weight._with_data(moved)
                if torch._has_compatible_shallow_copy_type(weight, moved):
                    weight.data, weight.quant_state = moved.data, moved.quant_state
                else:  # To or from meta: one object cannot hold both.
                    weight = moved
                    weight.module = self
        finally:
            self._put_back(weight)
        self.quant_state = weight.quant_state
        return self

    def _put_back(self, weight: Params4bit) -> None:
        # In its place ahead of the bias: the order of parameters is the order of checkpoints and optimizers.
        bias = self._parameters.pop("bias")
        self._parameters.update(weight=weight, bias=bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # FSDP2's checkpoints know parameters alone: the statistics of a sharded weight, which training does not change,
        # stay with the layer.
        state = getattr(self.weight, "quant_state", None) or self.quant_state
        if state is not None and not _is_sharded(self.weight):
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        own = f"{prefix}weight"
        others = {key: value for key, value in state_dict.items() if key != own and not key.startswith(f"{own}.")}
        statistics = {key[len(own) + 1 :]: value for key, value in state_dict.items() if key.startswith(f"{own}.")}
        weight = self._parameters.pop("weight")
        try:
            super()._load_from_state_dict(
                others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._put_back(weight)
        if own not in state_dict:
            if strict:
                missing_keys.append(own)
            return
        try:
            self._load_weight(state_dict[own], statistics, bool(local_metadata.get("assign_to_params_buffers")))
        except (CheckpointError, ValueError, RuntimeError) as error:
            error_msgs.append(f"{own}: {error}")

    def _load_weight(self, data: torch.Tensor, statistics: dict[str, Any], assign: bool) -> None:
        shape = (self.out_features, self.in_features)
        weight = self.weight
        if _is_sharded(weight):  # and so is what FSDP2 loads
            if data.shape != weight.shape or data.dtype != weight.dtype:
                raise CheckpointError(f"expected the packed bytes as {weight.dtype} {tuple(weight.shape)}")
            with torch.no_grad():
                weight.copy_(data)
            return
        device = data.device if assign or weight.device.type == "meta" else weight.device
        if statistics:
            if not assign:  # The layer must not share storage with the checkpoint.
                data = data.clone()
                statistics = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in statistics.items()}
            loaded = Params4bit.from_prequantized(data.detach(), statistics, device=device)
            if tuple(loaded.quant_state.shape) != shape:
                raise CheckpointError(
                    f"the checkpoint's weight has shape {tuple(loaded.quant_state.shape)}, the layer {shape}"
                )
        elif not data.is_floating_point() or tuple(data.shape) != shape:
            raise CheckpointError(
                f"expected a dense weight of shape {shape}, or packed bytes with the entries weight.absmax, "
                f"weight.quant_map and weight.quant_state.bitsandbytes__nf4 (or __fp4) beside them; "
                f"got {str(data.dtype).removeprefix('torch.')} {tuple(data.shape)} alone"
            )
        else:
            loaded = weight._with_data(data.detach().clone())
            loaded.module, loaded.quant_state, loaded.bnb_quantized = None, None, False
            if weight.bnb_quantized:
                loaded.to(device)
            else:
                loaded.data = loaded.data.to(device, weight.dtype if weight.device.type != "meta" else None)
        # All checks have passed: nothing before this line changed the layer.
        if assign or weight.device.type == "meta":
            weight = loaded
            weight.module = self
            self.weight = weight
        else:
            weight.data = loaded.data
            weight.__dict__.update({**loaded._attributes(), "module": self})
        self.quant_state = weight.quant_state
        self.quant_storage = weight.quant_storage

    def extra_repr(self) -> str:
        state = getattr(self.weight, "quant_state", None) or self.quant_state
        if state is None:
            weight = self.weight
            kind = f"{weight.quant_type}, blocksize={weight.blocksize}, double_quant={weight.compress_statistics}"
            return f"{super().extra_repr()}, {kind}, not quantized yet"
        return f"{super().extra_repr()}, {state.quant_type}, blocksize={state.blocksize}, double_quant={state.nested}"


def _is_sharded(weight: torch.Tensor) -> bool:
    """Whether FSDP2 has put a DTensor in the parameter's place."""
    return hasattr(weight, "placements")


class LinearFP4(Linear4bit):
    """`Linear4bit` with ``quant_type="fp4"``."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ):
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )


class LinearNF4(Linear4bit):
    """`Linear4bit` with ``quant_type="nf4"``: NormalFloat4, whose codes are quantiles of a normal distribution."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ):
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )
