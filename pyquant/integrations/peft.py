"""PEFT's LoRA on pyquant's layers: one layer that owns the 4-bit weight and its adapter.

`register` makes every `peft.LoraConfig` know the layer, so ``get_peft_model(model, LoraConfig(...))`` uses it.
"""

import copy
import dataclasses
import os
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge

from pyquant.autograd import lora_linear_4bit
from pyquant.functional import dequantize_4bit, quantize_4bit, statistics
from pyquant.nn import Linear4bit, Params4bit
from pyquant.replace import dequantize_linear

__all__ = ["LoraLinear4bit", "lora_config", "merge_and_unload", "register"]

# The others look at the base weight.
_INITIALIZATIONS = ("gaussian", "eva")
# Options of LoraConfig that ask for another arithmetic, which would be plain LoRA here. Newer versions of PEFT tag them
# as variants, but not QALoRA's, which it has for GPTQ layers alone.
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


class LoraLinear4bit(torch.nn.Module, LoraLayer):
    """A `Linear4bit` with LoRA adapters (Hu et al., 2021).

    One active adapter without bias, the usual case, runs in the fused op: ``y = x·Wᵀ + s·dropout(x)·Aᵀ·Bᵀ + bias``
    and its backward. Several active adapters, adapter biases, DoRA (Liu et al., 2024) and batches that mix adapters run
    adapter by adapter, in PEFT's arithmetic; DoRA dequantizes the weight in each forward pass for its norm.

    Merging adds the adapters to the dequantized 4-bit weight and quantizes the sum; unmerging restores the bytes that
    were there before. `pyquant.merge_and_unload` merges into 16-bit weights.

    Raises:
        ValueError: the config asks for a variant of LoRA other than DoRA, or for an initialization that reads the base
            weight.
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
        # The base weight's packed bytes and state while adapters are merged into it, and its bias while theirs are.
        self._unmerged_weight = None
        self._unmerged_bias = None
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs) -> None:
        start = config.init_lora_weights
        if isinstance(start, str) and start.lower() not in _INITIALIZATIONS:
            raise ValueError(
                f"init_lora_weights={start!r} reads or rewrites the dense base weight, which a 4-bit layer does not "
                f"have; use True, 'gaussian' or 'eva', or initialize the adapter on the dense model and quantize then"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs):
        tagged = {field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")}
        for option in sorted(tagged.union(_VARIANTS) - {"use_dora"}):
            if getattr(config, option, None):
                raise ValueError(f"pyquant's 4-bit LoRA layer does not support {option}; leave it out of LoraConfig")
        return Dora4bitVariant() if config.use_dora else None

    def _get_base_layer_device_and_dtype(self, base_layer):
        # The dtype of a new adapter, which PEFT then raises to float32 unless autocast_adapter_dtype=False is given:
        # the products', or what the weight had before it was quantized. The packed bytes' says nothing.
        weight = base_layer.weight
        dtype = weight.quant_state.dtype if weight.bnb_quantized else weight.dtype
        return weight.device, base_layer.compute_dtype or dtype

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
        if len(active) == 1 and not self.lora_bias[active[0]] and active[0] not in self.lora_variant:
            return self._fused_forward(x, active[0])

        result = self.base_layer(x)
        for name in active:
            lora_A, lora_B = self.lora_A[name], self.lora_B[name]
            inputs = self._cast_input_dtype(x, lora_A.weight.dtype)
            if name in self.lora_variant:
                changed = self.lora_variant[name].forward(self, active_adapter=name, x=inputs, result=result)
                result = changed.to(result.dtype)
            else:
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
        y, _ = lora_linear_4bit(
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

    def _merged_weight(self, names: list[str]) -> torch.Tensor:
        """The dequantized base weight with adapters added to it: float32 ``[N, K]``."""
        base = self._dequantized()
        dense = base.clone()
        for name in names:
            delta = self.get_delta_weight(name).to(dense)
            dense += delta
            if name in self.lora_variant:
                magnitude = self.lora_magnitude_vector[name]
                norm = magnitude.get_weight_norm(base, delta, scaling=1)
                dense *= (magnitude.weight.to(dense) / norm).view(-1, 1)
        return dense

    def _dequantized(self) -> torch.Tensor:
        base = self.get_base_layer()
        data, state = self._unmerged_weight or (base.weight, base.packed_state())
        return torch.ops.pyquant.dequantize_4bit(
            data, *statistics(state), state.quant_type, state.blocksize, state.shape, torch.float32
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the 4-bit base weight: dequantize, add, quantize again.

        The result is rounded to 4 bits, so outputs change a little. `pyquant.merge_and_unload` merges into the
        dequantized or into the original weights in 16 bits.

        Args:
            safe_merge: check the merged weight for NaN and infinity before anything changes.
            adapter_names: the active adapters by default.

        Raises:
            ValueError: `safe_merge` found NaN or infinity, or an adapter has a bias and the base layer none.
            TypeError: FSDP has sharded the weight.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.lora_A]
        if not names:
            return
        warnings.warn(
            "merging into the dequantized 4-bit weights that the adapter was trained on, and rounding the sum to 4 "
            "bits again; pyquant.merge_and_unload keeps 16 bits, and can merge into the original weights",
            stacklevel=2,
        )
        self._check_biases(names)
        base = self.get_base_layer()
        if not isinstance(base.weight, Params4bit):
            raise TypeError("the 4-bit weight is sharded; save the adapter, and merge it in one process")
        original = self._unmerged_weight or (base.weight.data, base.weight.quant_state)
        with torch.no_grad():
            dense = self._merged_weight([*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(dense).all():
            raise ValueError(f"merging {', '.join(names)} gives NaN or infinity; the adapter is broken")
        self._set_weight(
            *quantize_4bit(
                dense.to(original[1].dtype),
                blocksize=base.weight.blocksize,
                compress_statistics=base.weight.compress_statistics,
                quant_type=base.weight.quant_type,
                quant_storage=base.weight.quant_storage,
            )
        )
        for name in names:
            if self.lora_bias[name]:
                if self._unmerged_bias is None:
                    self._unmerged_bias = base.bias.detach().clone()
                base.bias.data += self._bias_delta(name).to(base.bias)
        self._unmerged_weight = original
        self.merged_adapters.extend(names)

    def _check_biases(self, names: list[str]) -> None:
        for name in names:
            if self.lora_bias[name] and self.get_base_layer().bias is None:
                raise ValueError(f"the adapter {name} has a bias and the base layer has none to merge it into")

    def _bias_delta(self, name: str) -> torch.Tensor:
        return self.lora_B[name].bias.detach() * self.scaling[name]

    def unmerge(self) -> None:
        """Restores the base weight's bytes, and the base bias, from before the first merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        device = base.weight.device
        data, state = self._unmerged_weight
        self._set_weight(data.to(device), state.to(device))
        if self._unmerged_bias is not None:
            base.bias.data.copy_(self._unmerged_bias)
        self._unmerged_weight = self._unmerged_bias = None
        self.merged_adapters.clear()

    def _set_weight(self, data: torch.Tensor, state) -> None:
        base = self.get_base_layer()
        base.weight.data = data
        base.weight.quant_state = base.quant_state = state

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


class Dora4bitVariant(DoraLinearVariant):
    """PEFT's DoRA on a 4-bit base: its arithmetic is given the dequantized weight, for the time of a forward pass."""

    @staticmethod
    def init(module: LoraLinear4bit, adapter_name: str, **kwargs) -> None:
        if "lora_magnitude_vector" not in module.adapter_layer_names:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = DoraLinearLayer(fan_in_fan_out=False)
        lora_A, lora_B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        layer.update_layer(
            base_layer=_dense(module.get_base_layer()),
            lora_A=lora_A,
            lora_B=lora_B,
            scaling=module.scaling[adapter_name],
        )
        module.lora_magnitude_vector[adapter_name] = layer

    @staticmethod
    def forward(module: LoraLinear4bit, active_adapter: str, x, result, **kwargs) -> torch.Tensor:
        dropout = module.lora_dropout[active_adapter]
        drops = module.training and not isinstance(dropout, torch.nn.Identity)
        delta = module.lora_magnitude_vector[active_adapter](
            dropout(x) if drops else x,
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=_dense(module.get_base_layer()),
            base_result=None if drops else result,
            adapter_name=active_adapter,
        )
        return result + delta


def _dense(layer: Linear4bit) -> torch.nn.Linear:
    dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    weight = dequantize_4bit(layer.weight, layer.packed_state())
    dense.weight = torch.nn.Parameter(weight, requires_grad=False)
    dense.bias = layer.bias
    return dense


def merge_and_unload(
    model: PeftModel,
    base: str = "4bit",
    original: str | os.PathLike | torch.nn.Module | None = None,
    adapter_names: list[str] | None = None,
    dtype: torch.dtype | None = None,
) -> torch.nn.Module:
    """Merges adapters into 16-bit weights, and returns a model without adapters and without 4-bit layers.

    Args:
        model: from ``get_peft_model`` on a model with 4-bit layers. ``base="4bit"`` uses it up, as PEFT's own
            ``merge_and_unload`` does.
        base: ``"4bit"`` adds the adapters to the dequantized 4-bit weights, which they were trained on: the result
            computes what the adapted model did. ``"16bit"`` adds them to the weights from before quantization, whose
            precision it keeps.
        original: for ``"16bit"``, the dense model, which is left as it is, or its folder or hub name.
        adapter_names: the active adapters by default.
        dtype: of dequantized weights; by default what each had before it was quantized.

    Returns:
        The dense model. Its attribute ``merged_into`` says in words what was merged into.

    Raises:
        ValueError: another `base`, `original` missing or superfluous, or an adapter that is NaN or infinite.
        TypeError: the model has no adapters on 4-bit layers.
    """
    if base not in ("4bit", "16bit"):
        raise ValueError(f"base must be '4bit' or '16bit', got {base!r}")
    if (base == "16bit") != (original is not None):
        raise ValueError('base="16bit" needs original, the model from before quantization; base="4bit" takes none')
    if not any(isinstance(module, LoraLinear4bit) for module in model.modules()):
        raise TypeError("the model has no adapters on 4-bit layers; PEFT's own merge_and_unload merges others")
    names = list(adapter_names or model.active_adapters)
    configs = {name: copy.deepcopy(model.peft_config[name]) for name in names}
    states = {
        name: {
            key: value.detach().clone()
            for key, value in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items()
        }
        for name in names
    }
    if base == "4bit":
        if any(isinstance(module, LoraLinear4bit) and module.merged for module in model.modules()):
            model.unmerge_adapter()
        packed = model.unload()
        into = "the dequantized 4-bit weights that they were trained on"
        dense = packed.dequantize(dtype) if hasattr(packed, "hf_quantizer") else dequantize_linear(packed, dtype)
    elif isinstance(original, torch.nn.Module):
        into = "the original weights from before quantization"
        dense = copy.deepcopy(original)
    else:
        from transformers import AutoModelForCausalLM

        into = f"the original weights of {original}"
        dense = AutoModelForCausalLM.from_pretrained(original)
    # PEFT merges: it knows what else an adapter can hold, such as whole modules.
    adapted = PeftModel(dense, configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, configs[name])
    for name in names:
        set_peft_model_state_dict(adapted, states[name], adapter_name=name)
    merged = adapted.merge_and_unload(safe_merge=True, adapter_names=names)
    merged.merged_into = f"{', '.join(names)} merged into {into}"
    return merged


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
