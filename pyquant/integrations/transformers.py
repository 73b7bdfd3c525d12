"""Loading Hugging Face models in 4 bits: ``from_pretrained(..., quantization_config=PyQuantConfig())``.

transformers replaces the linear layers of a model without weights, then hands each weight to `QuantizeOnLoad` (or, from
a 4-bit checkpoint, its entries to `ReadPacked`): at no time is there more than the 4-bit model and one layer.
"""

import os
import re
from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyquant.errors import CheckpointError
from pyquant.nn import Linear4bit, Params4bit
from pyquant.replace import check_options, dequantize_linear, matches_glob, name_patterns, why_dense
from pyquant.report import survey

__all__ = ["PyQuantConfig", "PyQuantQuantizer", "bits_and_bytes_config", "register"]

METHOD = "pyquant"
SKIP_SYNTAXES = ("glob", "bitsandbytes")
_STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What a weight is in a checkpoint; see pyquant.functional.QuantState.as_dict.
_ENTRIES = [
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_map",
    "weight.absmax",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "weight",
]
_JSON_ENTRY = re.compile(r"\.weight\.quant_state\.bitsandbytes__(nf4|fp4)$")


class PyQuantConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of ``from_pretrained`` that loads a model's linear layers in 4 bits.

    Args:
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: elements that share one scale: 32, 64, 128, … 4096.
        double_quant: quantize the scales as well.
        compute_dtype: dtype of the products, or its name. By default the dtype that the model is loaded in, if that has
            16 bits, whatever is cast to float32 later on (PEFT's ``prepare_model_for_kbit_training`` does that to
            norms); else that of the inputs.
        skip: name patterns of layers to leave dense, as in `pyquant.replace_linear`. By default the output layer and
            whatever shares its weight.
        targets: name patterns of the layers to quantize; by default all.
        quant_storage: dtype that the packed bytes are viewed as, or its name. FSDP wants the other parameters' dtype.
        verbose: print what was quantized, which matrices were left dense and why, and the patterns of `skip` that
            match no linear layer.
        skip_syntax: how `skip` is read. ``"glob"``, or ``"bitsandbytes"`` for the meaning that transformers gives
            ``llm_int8_skip_modules``: a pattern matches a layer's whole name from its start, as a regular expression,
            or is the end of the name. ``"proj"`` then matches ``q_proj``, and ``"mlp"`` no layer within an ``mlp``.

    Raises:
        ValueError: an argument has an unsupported value.
        TypeError: an unknown argument.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | str | None = None,
        skip: list[str] | None = None,
        targets: list[str] | None = None,
        quant_storage: torch.dtype | str = torch.uint8,
        verbose: bool = True,
        quant_method: str = METHOD,
        skip_syntax: str = "glob",
    ):
        if quant_method != METHOD:
            raise ValueError(f"a PyQuantConfig has quant_method {METHOD!r}, got {quant_method!r}")
        self.quant_method = METHOD
        self.quant_type = quant_type
        self.blocksize = blocksize
        self.double_quant = double_quant
        self.compute_dtype = None if compute_dtype is None else _dtype("compute_dtype", compute_dtype)
        self.skip = None if skip is None else list(name_patterns("skip", skip))
        self.targets = None if targets is None else list(name_patterns("targets", targets))
        self.quant_storage = _dtype("quant_storage", quant_storage)
        self.verbose = verbose
        self.skip_syntax = skip_syntax
        if skip_syntax not in SKIP_SYNTAXES:
            raise ValueError(f"skip_syntax must be 'glob' or 'bitsandbytes', got {skip_syntax!r}")
        if skip_syntax == "bitsandbytes":
            for pattern in self.skip or ():
                _check_regular_expression(pattern)
        check_options(quant_type, blocksize, self.compute_dtype)
        if self.quant_storage not in _STORAGE:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _STORAGE)
            raise ValueError(f"quant_storage must be one of {names}, got {quant_storage}")

    @classmethod
    def from_bitsandbytes(cls, config: Any, **options) -> "PyQuantConfig":
        """What a ``transformers.BitsAndBytesConfig`` says, or the dictionary that a checkpoint's config.json holds.

        The compute dtype float32 becomes None, the dtype of the inputs: it is what a BitsAndBytesConfig has when
        nothing was chosen, and would make a 16-bit model compute in 32 bits without a word. The patterns of
        ``llm_int8_skip_modules`` keep their meaning, by ``skip_syntax="bitsandbytes"``.

        Args:
            config: the configuration.
            options: arguments of this class to set besides. `skip` takes the place of ``llm_int8_skip_modules``; its
                patterns are globs.

        Raises:
            ValueError: the configuration is not for 4 bits, or has a pattern that is no regular expression.
        """
        get = config.get if isinstance(config, dict) else lambda name, default=None: getattr(config, name, default)
        if not get("load_in_4bit", False):
            raise ValueError(
                "pyquant quantizes to 4 bits alone, and this configuration does not say load_in_4bit=True"
                + ("; for 8 bits stay with bitsandbytes" if get("load_in_8bit", False) else "")
            )
        compute = get("bnb_4bit_compute_dtype")
        compute = None if compute is None else _dtype("bnb_4bit_compute_dtype", compute)
        if "skip" not in options:
            options = {"skip": get("llm_int8_skip_modules"), "skip_syntax": "bitsandbytes", **options}
        return cls(
            **{
                "quant_type": get("bnb_4bit_quant_type", "fp4"),
                "double_quant": get("bnb_4bit_use_double_quant", False),
                "compute_dtype": None if compute == torch.float32 else compute,
                "quant_storage": get("bnb_4bit_quant_storage") or torch.uint8,
                **options,
            }
        )

    def to_bitsandbytes(self, dtype: torch.dtype, skip: list[str]) -> dict[str, Any]:
        """The ``quantization_config`` entry of config.json under which bitsandbytes loads the same weights.

        Args:
            dtype: of the model. It is the compute dtype if there is none here: bitsandbytes' own default is float32.
            skip: names of the layers left dense.
        """
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": _name(self.compute_dtype or dtype),
            "bnb_4bit_quant_storage": _name(self.quant_storage),
            "llm_int8_skip_modules": skip,
        }

    def skips(self, name: str, pattern: str) -> bool:
        """Whether a pattern of `skip` names the layer."""
        if self.skip_syntax == "bitsandbytes":
            return not should_convert_module(name, [pattern])
        return matches_glob(name, pattern)

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json."""
        entries = {name: value for name, value in vars(self).items() if name != "verbose"}
        return {name: _name(v) if isinstance(v, torch.dtype) else v for name, v in entries.items()}

    def to_diff_dict(self) -> dict[str, Any]:
        default = PyQuantConfig().to_dict()
        return {name: v for name, v in self.to_dict().items() if name == "quant_method" or v != default[name]}


def bits_and_bytes_config(
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    llm_int8_skip_modules: list[str] | None = None,
    bnb_4bit_compute_dtype: torch.dtype | str | None = None,
    bnb_4bit_quant_type: str = "fp4",
    bnb_4bit_use_double_quant: bool = False,
    bnb_4bit_quant_storage: torch.dtype | str | None = None,
    **llm_int8,
) -> PyQuantConfig:
    """A `PyQuantConfig` from the arguments and defaults of ``transformers.BitsAndBytesConfig``; see
    `PyQuantConfig.from_bitsandbytes`. Arguments for 8 bits (``llm_int8_…``) have no effect there, and none here."""
    unknown = [name for name in llm_int8 if not name.startswith("llm_int8_")]
    if unknown:
        raise TypeError(f"BitsAndBytesConfig has no argument {unknown[0]!r}")
    return PyQuantConfig.from_bitsandbytes(
        {
            "load_in_8bit": load_in_8bit,
            "load_in_4bit": load_in_4bit,
            "llm_int8_skip_modules": llm_int8_skip_modules,
            "bnb_4bit_compute_dtype": bnb_4bit_compute_dtype,
            "bnb_4bit_quant_type": bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": bnb_4bit_use_double_quant,
            "bnb_4bit_quant_storage": bnb_4bit_quant_storage,
        }
    )


class PyQuantQuantizer(HfQuantizer):
    """What transformers asks while it loads, saves and trains a model with a `PyQuantConfig`."""

    requires_calibration = False
    quantization_config: PyQuantConfig

    def param_element_size(self, model, param_name: str, param: torch.Tensor) -> float:
        """Bytes an element on the device: of what an automatic device_map adds up, and the loader allocates at once."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        scale = 1 + 4 / 256 if self.quantization_config.double_quant else 4
        return 0.5 + scale / self.quantization_config.blocksize

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                "device_map puts some layers on the CPU or the disk and others on a GPU; 4-bit weights are not "
                "offloaded. Use a device_map that fits on the GPUs, or one device"
            )

    def update_device_map(self, device_map):
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear4bit) and name == "weight"

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = dtype  # the other methods are not told
        return dtype

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs) -> None:
        config, dtype = self.quantization_config, self._dtype
        self._dtype_plan = model._get_dtype_plan(dtype)
        skip = self.get_modules_to_not_convert(model) if config.skip is None else config.skip
        keep = model._keep_in_fp32_modules or []
        tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
        compute_dtype = config.compute_dtype or (dtype if dtype in (torch.float16, torch.bfloat16) else None)
        stored = _stored_in_4_bits(checkpoint_files) if self.pre_quantized else None
        if stored is not None:
            _refuse_merging_packed(model, stored)
        self._reasons = {}
        linears = {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear}
        self._unmatched = [p for p in config.skip or () if not any(config.skips(name, p) for name in linears)]
        for name, module in linears.items():
            reason = why_dense([name], skip, config.targets, config.skips)
            if reason is None and name in tied:
                reason = "its weight is tied to another"
            if reason is None and not should_convert_module(name, keep):
                reason = "the model keeps it in float32"
            if reason is not None and config.skip is None:
                reason = reason.replace("skip names it", "the output layer, or one that shares its weight")
            # The checkpoint knows best, where it names its entries as the model does.
            if stored is not None and name in stored:
                reason = None if stored[name] else "it is dense in the checkpoint"
            if reason is not None:
                self._reasons[name] = reason
                continue
            layer = Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=compute_dtype,
                compress_statistics=config.double_quant,
                quant_type=config.quant_type,
                quant_storage=config.quant_storage,
                device="meta",
                blocksize=config.blocksize,
            )
            model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model, **kwargs):
        # Saving takes the layers' own entries; there is no conversion to undo.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not any(isinstance(op, ReadPacked) for op in getattr(conversion, "operations", ()))
        ]
        model.is_loaded_in_4bit = True  # what PEFT, TRL and accelerate ask
        _count_without_bitsandbytes()
        model.quantization_report = survey(model, self._reasons)
        if self.quantization_config.verbose and not self.pre_quantized and _is_first_process():
            print(model.quantization_report.summary())
            if self._unmatched:
                print(f"  no linear layer matches, of skip: {', '.join(map(repr, self._unmatched))}")
        return model

    def _dequantize(self, model, dtype=None):
        # save_pretrained leaves the dtype as a name in the configuration.
        model = dequantize_linear(model, None if dtype is None else _dtype("dtype", dtype))
        model.is_loaded_in_4bit = False
        return model

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeOnLoad(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [WeightConverter(_ENTRIES, "weight", [ReadPacked(self)])] if self.pre_quantized else []

    def dtype_of(self, model, name: str) -> torch.dtype:
        """The dtype that the loader would give a dense tensor."""
        if self._dtype_plan:
            pattern, by_group, _ = build_glob_alternation(list(self._dtype_plan))
            match = pattern.search(name)
            if match is not None:
                return self._dtype_plan[by_group[match.lastgroup]]
        return model.get_parameter_or_buffer(name).dtype


class QuantizeOnLoad(ConversionOps):
    """Quantizes one dense weight where it was put by the loader."""

    def __init__(self, hf_quantizer: PyQuantQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model=None, **kwargs) -> dict[str, Any]:
        result = {}
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            layer, _ = get_module_from_name(model, name)
            layer._is_hf_initialized = True
            weight = layer.weight._with_data(dense)
            result[name] = weight._quantize(weight.device)
        return result


class ReadPacked(ConversionOps):
    """Puts a 4-bit weight together from its entries in a checkpoint; casts the other weights as the loader would."""

    def __init__(self, hf_quantizer: PyQuantQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model=None, full_layer_name=None, **kwargs) -> dict[str, Any]:
        entries = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        data = entries.pop("weight")
        layer, _ = get_module_from_name(model, full_layer_name)
        if not isinstance(layer, Linear4bit):
            if data.is_floating_point():
                data = data.to(self.hf_quantizer.dtype_of(model, full_layer_name))
            return {"weight": data}
        weight = Params4bit.from_prequantized(data, entries, device=data.device, module=layer)
        stored, expected = tuple(weight.quant_state.shape), (layer.out_features, layer.in_features)
        if stored != expected:
            raise CheckpointError(f"{full_layer_name} has shape {stored} in the checkpoint, {expected} in the model")
        layer.quant_storage = weight.quant_storage
        layer._is_hf_initialized = True
        return {"weight": weight}


def _dtype(name: str, value: torch.dtype | str) -> torch.dtype:
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} must be a torch.dtype or its name, such as 'bfloat16', got {value!r}")
    return dtype


def _check_regular_expression(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"a pattern for bitsandbytes is a regular expression, {pattern!r} is not: {error}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stored_in_4_bits(files: list[str] | None) -> dict[str, bool]:
    """For each module with a weight in the safetensors files, whether that is packed. Reads their headers alone."""
    keys: set[str] = set()
    for file in files or ():
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                keys.update(opened.keys())
    packed = {_JSON_ENTRY.sub("", key) for key in keys if _JSON_ENTRY.search(key)}
    return {
        key.removesuffix(".weight"): key.removesuffix(".weight") in packed for key in keys if key.endswith(".weight")
    }


def renaming(model) -> Callable[[str], tuple[str, bool]]:
    """What turns a checkpoint's key into the model's, as the loader does, and says whether the tensor becomes a part of
    that parameter, or several, instead of the whole."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()

    def rename(key: str) -> tuple[str, bool]:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        return name, pattern is not None

    return rename


def _refuse_merging_packed(model, stored: dict[str, bool]) -> None:
    """Raises CheckpointError for a packed weight that the model holds in one parameter with others, as experts are."""
    rename = renaming(model)
    for name in sorted(name for name, packed in stored.items() if packed):
        target, merged = rename(f"{name}.weight")
        if merged:
            raise CheckpointError(
                f"{name}.weight is in 4 bits by itself, as older versions of transformers stored experts; here it is "
                f"part of {target}, which cannot be put together from 4-bit matrices. Quantize the 16-bit model "
                f"instead: load it with quantization_config=pyquant.PyQuantConfig()"
            )


def _is_first_process() -> bool:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # models are loaded before the processes know of each other


def _count_without_bitsandbytes() -> None:
    """Makes ``model.num_parameters()`` count packed weights; transformers imports bitsandbytes to do it."""
    from transformers.modeling_utils import ModuleUtilsMixin

    theirs = ModuleUtilsMixin.num_parameters
    if getattr(theirs, "_pyquant", False):
        return

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        if getattr(self, "quantization_method", None) != METHOD:
            return theirs(self, only_trainable, exclude_embeddings)
        said, self.is_loaded_in_4bit = getattr(self, "is_loaded_in_4bit", False), False
        try:
            count = theirs(self, only_trainable, exclude_embeddings)
        finally:
            self.is_loaded_in_4bit = said
        if only_trainable:
            return count
        packed = {id(m.weight): m for m in self.modules() if isinstance(m, Linear4bit) and m.quant_state is not None}
        return count + sum(m.in_features * m.out_features - m.weight.numel() for m in packed.values())

    num_parameters._pyquant = True
    num_parameters.__doc__ = theirs.__doc__
    ModuleUtilsMixin.num_parameters = num_parameters


def register() -> None:
    """Makes transformers know ``quant_method`` pyquant. Safe to call again."""
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(PyQuantConfig)
        auto.register_quantizer(METHOD)(PyQuantQuantizer)


register()
