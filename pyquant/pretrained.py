"""4-bit checkpoints of whole models: read and written in bitsandbytes' format, and made without loading the model."""

import contextlib
import json
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pyquant.errors import CheckpointError
from pyquant.nn import Linear4bit, Params4bit
from pyquant.replace import refuse_adapters
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
        CheckpointError: the checkpoint is not in 4 bits, in another format than pyquant's and bitsandbytes', or has
            each expert's matrix in 4 bits by itself, as transformers stored them before version 5.
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
    tied = next((name for name in layers if f"{name}.weight" in model.all_tied_weights_keys), None)
    if tied is not None:
        raise CheckpointError(
            f"{tied} is in 4 bits, but the model's configuration ties it to the embeddings; "
            f"leave it dense, or load the model with tie_word_embeddings=False before it is quantized"
        )
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

    Tensors are read one at a time; in memory are one of them and one shard of the result. The checkpoint is that which
    `save_pretrained` writes of the model that ``from_pretrained`` loads with `config`, but for layers whose weight that
    splits or merges: they stay dense. If anything fails, no part of it is left.

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
        CheckpointError: the model is in 4 bits already, has no weights or files that cannot be read, or its layers
            cannot be told apart by bitsandbytes.
        OSError: there is no such model, or the result cannot be written.
        safetensors.SafetensorError: a file of the result cannot be written.
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
    skeleton = _Skeleton(model_config, config, dtype)
    renamed = {key: skeleton.rename(key) for key, _ in _tensors(files)}
    names = {key: name for key, (name, _) in renamed.items()}
    packed = skeleton.quantized({name for name, merged in renamed.values() if not merged})
    entry = _entry(config, format, sorted(packed.values()), skeleton.dense, dtype or model_config.dtype)
    copies = _tied_copies(files, names, skeleton.tied)

    with _undone_on_failure(output):
        shards = _Shards(output, max_shard_bytes)
        before = 0
        for key, read in _tensors(files):
            if key in copies:
                continue
            tensor = read()
            before += tensor.nbytes
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(skeleton.dtype_of(names[key]))
            if names[key] not in packed:
                shards.add({key: tensor})
                skeleton.put(names[key], tensor)
                continue
            try:
                weight = _packed(tensor.to(device), config)
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"{key}: {error}") from error
            shards.add(_entries(key, weight))
            skeleton.put(names[key], weight)
        shards.finish()

        model_config.quantization_config = entry
        if dtype is not None:
            model_config.dtype = dtype
        model_config.architectures = model_config.architectures or [type(skeleton.model).__name__]
        model_config.save_pretrained(output)
        for file in sorted(Path(source).iterdir()):
            if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja", ".py") and not (
                file.name == "config.json" or file.name.endswith(".index.json")
            ):  # fmt: skip
                shutil.copy(file, output)
    return before, shards.total, skeleton.report()


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format must be 'pyquant' or 'bitsandbytes', got {format!r}")


def _entry(
    config: "PyQuantConfig", format: str, packed: list[str], dense: list[str], dtype: torch.dtype | str | None
) -> dict[str, Any]:
    """The quantization_config of config.json, with the dense layers by their whole names."""
    if format == "pyquant":
        return {**config.to_dict(), "skip": dense, "skip_syntax": "glob", "targets": None}
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
        with contextlib.ExitStack() as stack:
            with _reading(file):
                if file.suffix == ".safetensors":
                    opened = stack.enter_context(safe_open(file, framework="pt"))
                    reads = {key: partial(opened.get_tensor, key) for key in opened.keys()}  # noqa: SIM118  no dict
                else:
                    # What torch wrote before version 1.6 is no zip file, and cannot be mapped.
                    mapped = zipfile.is_zipfile(file)
                    state = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
                    reads = {key: tensor.contiguous for key, tensor in state.items()}
            for key, read in reads.items():
                yield key, _reading(file)(read)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise CheckpointError(f"{file} cannot be read ({reason}); fetch the model again") from error


@contextlib.contextmanager
def _undone_on_failure(folder: Path) -> Iterator[None]:
    """Makes a folder, and takes away what was written into it and itself unless all went well.

    If it was there, it was empty, and stays so.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(OSError):  # the first failure is the one to tell
            for file in folder.iterdir():
                file.unlink()
            for path in made:
                path.rmdir()
        raise


class _Skeleton:
    """The model without weights, with the layers that the loader would quantize.

    The loader's own quantizer chooses them, so that streaming and loading leave the same layers dense. Its parameters,
    on the meta device, follow what is written, so that the report says what the checkpoint takes once it is loaded.
    """

    def __init__(self, model_config: "PretrainedConfig", config: "PyQuantConfig", dtype: torch.dtype | None):
        import transformers
        from transformers.modeling_utils import local_torch_dtype

        from pyquant.integrations.transformers import PyQuantQuantizer, renaming

        self._dtype = dtype or model_config.dtype or torch.float32
        self._quantizer = PyQuantQuantizer(config, pre_quantized=False)
        cls = getattr(transformers, (model_config.architectures or [""])[0], None)
        with torch.device("meta"), local_torch_dtype(self._dtype):
            if cls is not None:
                self.model = cls(model_config)
            else:
                self.model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=self._dtype)
            self.model.tie_weights()
            self._quantizer.update_dtype(self._dtype)
            self._quantizer.preprocess_model(self.model)
        self.rename = renaming(self.model)
        self._reasons = dict(self._quantizer._reasons)
        self._state = self.model.state_dict()
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._written: dict[int, str] = {}

    @property
    def tied(self) -> dict[str, str]:
        """Names of weights that are tied to others, and those others."""
        return self.model.all_tied_weights_keys

    @property
    def dense(self) -> list[str]:
        """The linear layers that are not to be quantized."""
        return [name for name, module in self.model.named_modules() if type(module) is torch.nn.Linear]

    def quantized(self, stored: Collection[str]) -> dict[str, str]:
        """The layers to quantize, by the names of their weights. Those without a stored one are made dense again."""
        result = {}
        for name, layer in list(self.model.named_modules()):
            if not isinstance(layer, Linear4bit):
                continue
            if f"{name}.weight" in stored:
                result[f"{name}.weight"] = name
                continue
            dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            dense.weight, dense.bias = torch.nn.Parameter(layer.weight.data, requires_grad=False), layer.bias
            self.model.set_submodule(name, dense)
            self._parameters[f"{name}.weight"] = dense.weight
            self._reasons[name] = "its weight is not stored by itself"
        return result

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype to which the loader would cast a tensor, which is not the model's for what it keeps in float32."""
        return self._quantizer.dtype_of(self.model, name) if name in self._state else self._dtype

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Takes note of what was written for a parameter: its kind and size, not its data."""
        parameter = self._parameters.get(name)
        if parameter is None:
            return
        module = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(tensor, Params4bit):
            tensor.quant_state.to("meta")
            module.weight = tensor.to("meta")
            return
        if self._written.setdefault(id(parameter), name) != name:
            # Tied by the configuration, but stored with another value than its twin: the loader does not tie them.
            parameter = torch.nn.Parameter(parameter.data, requires_grad=False)
            setattr(module, name.rpartition(".")[2], parameter)
        parameter.data = parameter.data.to(tensor.dtype)

    def report(self) -> QuantizationReport:
        return survey(self.model, self._reasons)


def _tied_copies(files: list[Path], names: dict[str, str], tied: dict[str, str]) -> set[str]:
    """The keys of tensors that equal the one they are tied to, which is stored as well.

    The loader ties them, and saving the model then writes one of them; where they differ it does not tie them.
    """
    sources = set(tied.values())
    found: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    for key, read in _tensors(files) if sources else ():
        source = tied.get(names[key], names[key])
        if source in sources:
            found.setdefault(source, {})[names[key]] = key, read()
    copies = set()
    for source, members in found.items():
        kept, *others = sorted(members, key=lambda name: name != source)
        weight = members[kept][1]
        for key, other in (members[name] for name in others):
            if other.dtype == weight.dtype and torch.equal(other, weight):
                copies.add(key)
    return copies


def _packed(weight: torch.Tensor, config: "PyQuantConfig") -> Params4bit:
    return Params4bit(
        weight,
        blocksize=config.blocksize,
        compress_statistics=config.double_quant,
        quant_type=config.quant_type,
        quant_storage=config.quant_storage,
    )._quantize(weight.device)


def _entries(key: str, weight: Params4bit) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a 4-bit weight."""
    statistics = weight.quant_state.as_dict(packed=True)
    return {
        key: weight.data.cpu(),
        **{f"{key}.{name}": value.cpu().contiguous() for name, value in statistics.items()},
    }


class _Shards:
    """Writes tensors into safetensors files of a bounded size, with the index that transformers reads."""

    def __init__(self, folder: Path, limit: int):
        self.total = 0
        self._folder = folder
        self._limit = limit
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._pending_memory: set[int] = set()
        self._written: list[list[str]] = []

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Tensors of one module: they stay in one file."""
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + nbytes > self._limit:
            self._write()
        for key, tensor in tensors.items():
            memory = tensor.untyped_storage().data_ptr()
            # Those of a torch file may share memory, which safetensors refuses.
            self._pending[key] = tensor.clone() if memory in self._pending_memory else tensor
            self._pending_memory.add(memory)
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
        self._pending, self._pending_bytes, self._pending_memory = {}, 0, set()

    def _temporary(self, index: int) -> Path:
        return self._folder / f"part-{index:05}.safetensors"
