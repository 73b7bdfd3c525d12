"""4-bit checkpoints of whole models: read and written in bitsandbytes' format, and made without loading the model."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pyquant.errors import CheckpointError
from pyquant.nn import Linear4bit, Params4bit
from pyquant.replace import refuse_adapters, why_dense
from pyquant.report import QuantizationReport, survey

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from pyquant.integrations.transformers import PyQuantConfig

__all__ = ["FORMATS", "load_pretrained", "quantize_pretrained", "save_pretrained"]

FORMATS = ("pyquant", "bitsandbytes")
_NAME = "model.safetensors"


def load_pretrained(name: str | os.PathLike, **options) -> "PreTrainedModel":
    """Loads a 4-bit checkpoint, published ones of bitsandbytes too, which need not be installed.

    NF4 and FP4, with double quantization or without, any ``quant_storage``, sharded or not. The packed bytes are taken
    as they are.

    Args:
        name: folder or hub name.
        options: of ``from_pretrained``: ``device_map``, ``dtype``, ``revision``, ``trust_remote_code`` and so on.

    Returns:
        The model of the class that the checkpoint names.

    Raises:
        CheckpointError: the checkpoint is not in 4 bits, or in another format than pyquant's and bitsandbytes'.
        RuntimeError: an entry of a 4-bit weight is missing or damaged; the log names it.
    """
    import transformers

    from pyquant.integrations.transformers import PyQuantConfig

    name = os.fspath(name)
    known = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
    config = transformers.AutoConfig.from_pretrained(name, **{k: v for k, v in options.items() if k in known})
    stored = getattr(config, "quantization_config", None)
    stored = stored or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if stored is None:
        raise CheckpointError(
            f"{name} is not in 4 bits; load it with "
            f"from_pretrained({name!r}, quantization_config=pyquant.PyQuantConfig()), which quantizes it"
        )
    method = stored.get("quant_method", "bitsandbytes" if "load_in_4bit" in stored else None)
    if method == "bitsandbytes" and stored.get("load_in_4bit"):
        config.quantization_config = PyQuantConfig.from_bitsandbytes(stored).to_dict()
    elif method != "pyquant":
        kind = "bitsandbytes in 8 bits" if method == "bitsandbytes" else method
        raise CheckpointError(f"{name} was quantized by {kind}; pyquant reads bitsandbytes' and its own 4-bit weights")
    architecture = (config.architectures or [""])[0]
    cls = getattr(transformers, architecture, None)
    if cls is None or getattr(config, "auto_map", None):
        cls = transformers.AutoModelForCausalLM
    return cls.from_pretrained(name, config=config, **options)


def save_pretrained(model: "PreTrainedModel", folder: str | os.PathLike, format: str = "pyquant", **options) -> None:
    """Saves a model with 4-bit layers, however they came to be in it, so that ``from_pretrained`` loads it.

    The weights are the same in both formats; ``config.json`` differs in who is to load them.

    Args:
        model: a transformers model without adapters.
        folder: where to.
        format: ``"pyquant"``, or ``"bitsandbytes"`` for transformers with bitsandbytes.
        options: of the model's ``save_pretrained``, such as ``max_shard_size``.

    Raises:
        ValueError: another format, or the model has no 4-bit layers.
        TypeError: the model has adapters.
        CheckpointError: bitsandbytes could not tell the model's dense layers from its 4-bit ones by their names.
    """
    from pyquant.integrations.transformers import PyQuantConfig

    _check_format(format)
    refuse_adapters(model, "save the adapter by itself with its own save_pretrained, and the base without it")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    if not layers:
        raise ValueError("the model has no 4-bit layers; quantize it with pyquant.replace_linear first")
    dense = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    own = getattr(model.config, "quantization_config", None)
    config = own
    if not isinstance(own, PyQuantConfig):
        # Each layer's entries say how it was quantized; the configuration names the usual way.
        usual = Counter(
            (m.weight.quant_type, m.weight.blocksize, m.weight.compress_statistics, m.compute_dtype, m.quant_storage)
            for m in layers.values()
        )
        (quant_type, blocksize, double_quant, compute_dtype, storage), _ = usual.most_common(1)[0]
        config = PyQuantConfig(quant_type, blocksize, double_quant, compute_dtype, dense, quant_storage=storage)
    model.config.quantization_config = _entry(config, format, list(layers), dense, model.dtype)
    try:
        model.save_pretrained(folder, **options)
    finally:
        if own is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = own


def quantize_pretrained(
    name: str | os.PathLike,
    folder: str | os.PathLike,
    config: "PyQuantConfig",
    format: str = "bitsandbytes",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 2_000_000_000,
    device: torch.device | str = "cpu",
) -> tuple[int, int, QuantizationReport]:
    """Makes a 4-bit checkpoint of a dense one without loading the model: its size is bounded by the disk alone.

    Tensors are read one at a time; in memory are one of them and one shard of the result.

    Args:
        name: folder or hub name of the dense model, in safetensors or torch files.
        folder: for the result; new or empty. It receives the other files of the model (tokenizer, generation settings)
            as well.
        config: how to quantize.
        format: see `save_pretrained`.
        dtype: of what stays dense; by default as it is stored.
        max_shard_bytes: of a file of the result.
        device: where to quantize.

    Returns:
        Bytes of the weights before and after, and the report of what was quantized and what was not.

    Raises:
        ValueError: another format, a folder that holds something, or a weight that holds NaN or infinity.
        CheckpointError: the model is in 4 bits already, has no weights, or its layers cannot be told apart by
            bitsandbytes.
        OSError: there is no such model.
    """
    import transformers

    _check_format(format)
    output = Path(folder)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty; give a new folder")
    source = _local(os.fspath(name))
    model_config = transformers.AutoConfig.from_pretrained(source)
    if getattr(model_config, "quantization_config", None) is not None:
        raise CheckpointError(f"{name} is stored quantized; give the 16-bit model")
    files = _weight_files(source)
    skeleton, rename = _skeleton(model_config)
    reasons = _dense_reasons(skeleton, config)
    linears = {n for n, m in skeleton.named_modules() if type(m) is torch.nn.Linear and n not in reasons}

    output.mkdir(parents=True, exist_ok=True)
    shards = _Shards(output, max_shard_bytes)
    before, packed = 0, set()
    for key, read in _tensors(files):
        tensor = read()
        before += tensor.nbytes
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        module = rename(key).removesuffix(".weight")
        if module not in linears or not key.endswith(".weight"):
            shards.add({key: tensor})
            continue
        try:
            shards.add(_packed(key, tensor.to(device), config))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{key}: {error}") from error
        packed.add(module)
    shards.finish()
    for module in linears - packed:
        reasons[module] = "its weight is not stored by itself"

    dense = [n for n, m in skeleton.named_modules() if type(m) is torch.nn.Linear and n not in packed]
    model_config.quantization_config = _entry(config, format, sorted(packed), dense, dtype or model_config.dtype)
    if dtype is not None:
        model_config.dtype = dtype
    model_config.architectures = model_config.architectures or [type(skeleton).__name__]
    model_config.save_pretrained(output)
    for file in sorted(Path(source).iterdir()):
        if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja", ".py") and not (
            file.name == "config.json" or file.name.endswith(".index.json")
        ):  # fmt: skip
            shutil.copy(file, output)
    for module in packed:
        skeleton.set_submodule(module, _packed_on_meta(skeleton.get_submodule(module), config))
    return before, shards.total, survey(skeleton, reasons)


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format must be 'pyquant' or 'bitsandbytes', got {format!r}")


def _entry(
    config: "PyQuantConfig", format: str, packed: list[str], dense: list[str], dtype: torch.dtype | str | None
) -> dict[str, Any]:
    """The quantization_config of config.json, with the dense layers by their whole names."""
    if format == "pyquant":
        return {**config.to_dict(), "skip": dense, "targets": None}
    from transformers.quantizers.quantizers_utils import should_convert_module

    for name in packed:
        if not should_convert_module(name, dense):
            caught = next(other for other in dense if not should_convert_module(name, [other]))
            raise CheckpointError(
                f"bitsandbytes matches names by their ends and would leave {name} dense because {caught} is; "
                f'save with format="pyquant", or quantize both or neither'
            )
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    return config.to_bitsandbytes(dtype, dense)


def _local(name: str) -> str:
    """The folder of a model, fetched from the hub if need be."""
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
    folder = snapshot_download(name, allow_patterns=wanted)
    if not any(Path(folder).glob("*.safetensors")):
        folder = snapshot_download(name, allow_patterns=["*.bin", *wanted])
    return folder


def _weight_files(folder: str) -> list[Path]:
    for single in (_NAME, "pytorch_model.bin"):
        index = Path(folder) / f"{single}.index.json"
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [Path(folder) / name for name in sorted(set(names))]
        if (Path(folder) / single).is_file():
            return [Path(folder) / single]
    raise CheckpointError(f"{folder} has no {_NAME} and no pytorch_model.bin, nor an index of several such files")


def _tensors(files: list[Path]) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """The names of all tensors in the files, and a function that reads each."""
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  a safe_open is no dict
                    yield key, lambda key=key, opened=opened: opened.get_tensor(key)
        else:
            state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            for key in state:
                yield key, lambda key=key, state=state: state[key].contiguous()


def _skeleton(config: "PretrainedConfig") -> tuple["PreTrainedModel", Callable[[str], str]]:
    """The model without weights, and what turns a checkpoint's key into the model's."""
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    cls = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        model = cls(config) if cls is not None else transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()

    def rename(key: str) -> str:
        renamed, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        return "" if pattern is not None else renamed  # merged or split on loading: no layer's weight as it is

    return model, rename


def _dense_reasons(model: "PreTrainedModel", config: "PyQuantConfig") -> dict[str, str]:
    from transformers.quantizers.base import get_keys_to_not_convert

    skip = get_keys_to_not_convert(model) if config.skip is None else config.skip
    reasons = {
        name: why_dense([name], skip, config.targets)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _packed(key: str, weight: torch.Tensor, config: "PyQuantConfig") -> dict[str, torch.Tensor]:
    """The entries of one quantized weight."""
    parameter = Params4bit(
        weight,
        blocksize=config.blocksize,
        compress_statistics=config.double_quant,
        quant_type=config.quant_type,
        quant_storage=config.quant_storage,
    )._quantize(weight.device)
    statistics = parameter.quant_state.as_dict(packed=True)
    return {
        key: parameter.data.cpu(),
        **{f"{key}.{name}": value.cpu().contiguous() for name, value in statistics.items()},
    }


def _packed_on_meta(module: torch.nn.Linear, config: "PyQuantConfig") -> Linear4bit:
    layer = Linear4bit(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        compress_statistics=config.double_quant,
        quant_type=config.quant_type,
        device="meta",
        blocksize=config.blocksize,
    )
    layer.weight.data = layer.weight.data.new_empty(((module.weight.numel() + 1) // 2, 1), dtype=torch.uint8)
    return layer


class _Shards:
    """Writes tensors into safetensors files of a bounded size, with the index that transformers reads."""

    def __init__(self, folder: Path, limit: int):
        self.total = 0
        self._folder = folder
        self._limit = limit
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._written: list[list[str]] = []

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Tensors of one module: they stay in one file."""
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + nbytes > self._limit:
            self._write()
        self._pending.update(tensors)
        self._pending_bytes += nbytes
        self.total += nbytes

    def finish(self) -> None:
        """Writes what is left, names the files by how many they are, and indexes them."""
        if self._pending or not self._written:
            self._write()
        count = len(self._written)
        if count == 1:
            os.replace(self._temporary(0), self._folder / _NAME)
            return
        index = {}
        for i, keys in enumerate(self._written):
            name = f"model-{i + 1:05}-of-{count:05}.safetensors"
            os.replace(self._temporary(i), self._folder / name)
            index.update(dict.fromkeys(keys, name))
        entry = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(index.items()))}
        (self._folder / f"{_NAME}.index.json").write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        save_file(self._pending, self._temporary(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _temporary(self, index: int) -> Path:
        return self._folder / f"part-{index:05}.safetensors"
