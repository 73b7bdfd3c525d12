"""PEFT's LoRA on pyquant's layers: one layer that owns the 4-bit weight and its adapter.

`register` makes every `peft.LoraConfig` know the layer, so ``get_peft_model(model, LoraConfig(...))`` uses it.
"""

import warnings

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge

from pyquant.functional import quantize_4bit, statistics
from pyquant.nn import Linear4bit

__all__ = ["LoraLinear4bit", "lora_config", "register"]


class LoraLinear4bit(torch.nn.Module, LoraLayer):
    """A `Linear4bit` with LoRA adapters (Hu et al., 2021).

    One active adapter without bias, the usual case, runs in the fused op: ``y = x·Wᵀ + s·dropout(x)·Aᵀ·Bᵀ + bias``
    and its backward. Several active adapters, adapter biases and batches that mix adapters run adapter by adapter.

    Merging adds the adapters to the dequantized 4-bit weight and quantizes the sum; unmerging restores the bytes that
    were there before.
    """

    def __init__(
        self,
        base_layer: torch.nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs,
    ):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        # The base weight's packed bytes and state while adapters are merged into it.
        self._unmerged_weight = None
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs):
        for option in ("use_dora", "alora_invocation_tokens", "arrow_config", "velora_config"):
            if getattr(config, option, None):
                raise ValueError(f"pyquant's 4-bit LoRA layer does not support {option}; leave it out of LoraConfig")

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names=adapter_names)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.merged or not active:
            return self.base_layer(x)
        if len(active) == 1 and not self.lora_bias[active[0]] and type(self.base_layer) is not LoraLinear4bit:
            return self._fused_forward(x, active[0])

        result = self.base_layer(x)
        for name in active:
            lora_A, lora_B = self.lora_A[name], self.lora_B[name]
            inputs = self._cast_input_dtype(x, lora_A.weight.dtype)
            delta = lora_B(lora_A(self.lora_dropout[name](inputs))) * self.scaling[name]
            result = result + delta.to(result.dtype)
        return result

    def _fused_forward(self, x: torch.Tensor, name: str) -> torch.Tensor:
        base = self.base_layer
        state = base.packed_state()
        compute_dtype = base.compute_dtype_for(x)
        inputs = x if x.dtype == compute_dtype else x.to(compute_dtype)
        bias = base.bias
        if bias is not None and bias.dtype != compute_dtype:
            bias = bias.to(compute_dtype)
        dropout = self.lora_dropout[name]
        p = dropout.p if self.training and isinstance(dropout, torch.nn.Dropout) else 0.0
        seed = torch.randint(2**63 - 1, (1,), device=x.device) if p > 0 else None
        n, k = state.shape
        y, _ = torch.ops.pyquant.lora_linear_4bit(
            inputs,
            base.weight,
            *statistics(state),
            state.quant_type,
            state.blocksize,
            n,
            k,
            bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            p,
            seed,
        )
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter adds to the weight: scaling · B · A, ``[N, K]``."""
        return self.lora_B[adapter].weight @ self.lora_A[adapter].weight * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the 4-bit base weight: dequantize, add, quantize again.

        The result is rounded to 4 bits, so outputs change a little. To merge into 16-bit weights, load the adapter on
        the original model, or use ``pyquant merge``.

        Args:
            safe_merge: check the merged weight for NaN and infinity before anything changes.
            adapter_names: the active adapters by default.

        Raises:
            ValueError: `safe_merge` found NaN or infinity.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.lora_A]
        if not names:
            return
        weight = self.get_base_layer().weight
        original = self._unmerged_weight or (weight.data, weight.quant_state)
        dense = torch.ops.pyquant.dequantize_4bit(
            original[0], *statistics(original[1]), original[1].quant_type, original[1].blocksize, original[1].shape,
            torch.float32,
        )  # fmt: skip
        for name in [*self.merged_adapters, *names]:
            dense += self.get_delta_weight(name).to(dense)
        if safe_merge and not torch.isfinite(dense).all():
            raise ValueError(f"merging {', '.join(names)} gives NaN or infinity; the adapter is broken")
        biases = [name for name in names if self.lora_bias[name]]
        if biases and self.get_base_layer().bias is None:
            raise ValueError(f"the adapter {biases[0]} has a bias and the base layer has none to merge it into")
        self._set_weight(
            *quantize_4bit(
                dense.to(original[1].dtype),
                blocksize=weight.blocksize,
                compress_statistics=weight.compress_statistics,
                quant_type=weight.quant_type,
                quant_storage=weight.quant_storage,
            )
        )
        for name in biases:
            self.get_base_layer().bias.data += self.lora_B[name].bias.to(self.get_base_layer().bias)
        self._unmerged_weight = original
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restores the base weight's bytes from before the first merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        device = self.get_base_layer().weight.device
        data, state = self._unmerged_weight
        self._set_weight(data.to(device), state.to(device))
        for name in self.merged_adapters:
            if self.lora_bias[name]:
                self.get_base_layer().bias.data -= self.lora_B[name].bias.to(self.get_base_layer().bias)
        self._unmerged_weight = None
        self.merged_adapters.clear()

    def _set_weight(self, data: torch.Tensor, state) -> None:
        base = self.get_base_layer()
        base.weight.data = data
        base.weight.quant_state = base.quant_state = state

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def lora_config(r: int = 16, lora_alpha: int = 32, target_modules="all-linear", **kwargs) -> LoraConfig:
    """A `peft.LoraConfig` with the usual choices for QLoRA: every linear layer but the output head, causal LM.

    Args:
        r: rank.
        lora_alpha: the adapter is scaled by lora_alpha / r.
        target_modules: names, a regular expression, or ``"all-linear"``.
        kwargs: anything else that LoraConfig takes.
    """
    kwargs.setdefault("task_type", "CAUSAL_LM")
    return LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules, **kwargs)


def register() -> None:
    """Makes every LoraConfig, loaded ones too, map `Linear4bit` to `LoraLinear4bit`."""
    if getattr(LoraConfig.__post_init__, "_pyquant", False):
        return
    post_init = LoraConfig.__post_init__

    def post_init_and_register(self):
        post_init(self)
        self._register_custom_module({Linear4bit: LoraLinear4bit})

    post_init_and_register._pyquant = True
    LoraConfig.__post_init__ = post_init_and_register


register()
