"""Loading a base model, quantizing it and putting an adapter on it."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .config import AdapterConfig, ModelConfig, QuantizationConfig
from .errors import ModelError
from .launch import uses_fsdp

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "adapter_record",
    "adapter_tokenizer",
    "add_adapter",
    "check_adapter",
    "check_model",
    "choose_device",
    "choose_dtype",
    "load_adapter",
    "load_base",
    "load_packed",
    "load_quantized",
    "load_tokenizer",
    "quantization_of",
    "quantize",
    "quiet",
    "set_end_token",
    "write_adapter_record",
]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_RECORD = "pyquant.json"


def choose_device() -> torch.device:
    """The GPU of this process where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that ``precision`` means on ``device``.

    Raises:
        ModelError: the device does not have it.
    """
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.bfloat16 if _cpu_has_bf16() else torch.float32
    if precision == "fp16" and device.type == "cpu":
        raise ModelError("model.precision is fp16, which needs a GPU; set it to fp32 or bf16 on a CPU.")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ModelError("model.precision is bf16, which this GPU does not have; set it to fp16.")
    return _DTYPES[precision]


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; emulated, it is slower than float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def check_model(path: str) -> "PretrainedConfig":
    """Read a model's configuration, before anything large is loaded.

    Raises:
        ModelError: there is no such folder and no such hub model, or it is no transformers model.
    """
    from transformers import AutoConfig

    if not path:
        raise ModelError("no base model is named; set model.path to a folder or a hub name.")
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            remedy = (
                "it is an adapter: give it as the adapter, and its base as the model"
                if (folder / "adapter_config.json").is_file()
                else "give the folder that save_pretrained wrote"
            )
            raise ModelError(f"the model folder {path} has no config.json; {remedy}.")
    elif folder.exists() or path.count("/") > 1 or path.startswith((".", "~", "/")):
        raise ModelError(f"the model folder {path} does not exist; give a folder with config.json or a hub name.")
    try:
        return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else path)
    except (OSError, ValueError) as error:
        if folder.is_dir():
            raise ModelError(f"{path}/config.json is not a model that transformers knows: {_first(error)}") from error
        raise ModelError(f"the model {path} is neither a folder nor a hub model that can be reached.") from error


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer; one without a padding token pads with its end token.

    Raises:
        ModelError: the folder has none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} has no tokenizer that can be loaded; save one there with save_pretrained.") from error
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer in {path} has no eos_token; set one in its tokenizer_config.json.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(config: ModelConfig, device: torch.device | None = None) -> "PreTrainedModel":
    """Load the base model in 16 or 32 bits onto the device.

    Raises:
        ModelError: see `check_model` and `choose_dtype`, it is stored quantized, or its weights cannot be read.
    """
    device = device or choose_device()
    return _load(config, choose_dtype(config.precision, device)).to(device)


def load_quantized(
    config: ModelConfig, quantization: QuantizationConfig, device: torch.device | None = None
) -> "PreTrainedModel":
    """Load the base model onto the device and quantize its linear layers on the way, so that the device never holds
    more than the 4-bit model and one layer. With ``method: none`` this is `load_base`.

    Raises:
        ModelError: see `load_base`, or a weight cannot be quantized.
    """
    if quantization.method == "none":
        return load_base(config, device)
    import pyquant

    device = device or choose_device()
    dtype = choose_dtype(config.precision, device)
    settings = pyquant.PyQuantConfig(
        quantization.method,
        quantization.blocksize,
        quantization.double_quant,
        compute_dtype=dtype,
        skip=quantization.skip,
        quant_storage=_storage(dtype),
        verbose=False,
    )
    model = _load(config, dtype, quantization_config=settings, device_map={"": device})
    # TRL would round the adapters of a model that says so to bfloat16; here they stay in float32.
    model.is_loaded_in_4bit = False
    return model


def load_packed(config: ModelConfig, device: torch.device | None = None) -> "PreTrainedModel":
    """Load a model that is stored in 4 bits, by pyquant or bitsandbytes, onto the device.

    Raises:
        ModelError: it is stored otherwise, or cannot be read.
    """
    import pyquant

    device = device or choose_device()
    dtype = choose_dtype(config.precision, device)
    folder = Path(config.path).expanduser()
    try:
        with quiet():
            return pyquant.load_pretrained(
                str(folder) if folder.is_dir() else config.path, dtype=dtype, device_map={"": device}
            )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"the model {config.path} cannot be loaded: {_first(error)}") from error


def _load(config: ModelConfig, dtype: torch.dtype, **options) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    if getattr(check_model(config.path), "quantization_config", None) is not None:
        raise ModelError(f"{config.path} is stored quantized; give the 16-bit model, which is quantized on loading.")
    folder = Path(config.path).expanduser()
    path = str(folder) if folder.is_dir() else config.path
    if config.attention:
        options["attn_implementation"] = config.attention
    try:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"the model {config.path} cannot be loaded: {_first(error)}") from error


def _storage(dtype: torch.dtype) -> torch.dtype:
    # FSDP shards parameters of the same float dtype as the others.
    return dtype if uses_fsdp() else torch.uint8


def quantize(model: "PreTrainedModel", config: QuantizationConfig) -> "PreTrainedModel":
    """Quantize the linear layers in place, as the configuration says; ``method: none`` leaves the model as it is."""
    if config.method == "none":
        return model
    import pyquant

    return pyquant.replace_linear(
        model,
        quant_type=config.method,
        blocksize=config.blocksize,
        double_quant=config.double_quant,
        compute_dtype=model.dtype,
        skip=tuple(config.skip),
        quant_storage=_storage(model.dtype),
        verbose=False,
    )


def add_adapter(model: "PreTrainedModel", config: AdapterConfig, new_tokens: Sequence[int] = ()) -> "PeftModel":
    """Put a new, untrained LoRA adapter on the model.

    Args:
        new_tokens: ids of tokens that were added to the vocabulary; their rows of embeddings and output layer are
            trained with the adapter, unless ``config.embeddings`` is none.

    Raises:
        ModelError: the model has no layer of the configured names.
    """
    from peft import LoraConfig, get_peft_model

    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    embeddings = _names(model, [model.get_input_embeddings()] + ([] if tied else [model.get_output_embeddings()]))
    rows = sorted(new_tokens) if config.embeddings == "new" else []
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        use_rslora=config.rslora,
        use_dora=config.dora,
        trainable_token_indices=dict.fromkeys(embeddings, rows) if rows else None,
        modules_to_save=embeddings if config.embeddings == "all" else None,
        ensure_weight_tying=tied and config.embeddings == "all",  # rows of tied weights stay tied by themselves
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ModelError(f"adapter.target_modules is {config.target_modules}: {_first(error)}") from error


def _names(model: torch.nn.Module, modules: list[torch.nn.Module]) -> list[str]:
    """The last part of the modules' names, by which PEFT finds them."""
    return [name.rpartition(".")[2] for name, module in model.named_modules() if any(module is m for m in modules)]


def load_adapter(model: "PreTrainedModel", adapter: str | Path) -> "PeftModel":
    """Put a saved adapter on its base.

    Raises:
        ModelError: the folder holds none, or it does not fit the base.
    """
    from peft import PeftModel

    check_adapter(adapter)
    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"the adapter {adapter} does not fit the base model: {_first(error)}") from error


def check_adapter(adapter: str | Path) -> None:
    """Raise a `ModelError` unless the folder holds an adapter."""
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ModelError(
            f"{adapter} has no adapter_config.json; give the folder that pyquant train saved the adapter in."
        )


def write_adapter_record(
    adapter: Path, model: ModelConfig, quantization: QuantizationConfig, end_token: str | None = None
) -> None:
    """Write next to an adapter which base it was trained on, how that was quantized, and the token that ends an answer
    where it is not the tokenizer's.
    """
    record = {"base": model.path, "quantization": asdict(quantization), "end_token": end_token}
    (adapter / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def adapter_tokenizer(model: str, adapter: str | Path | None) -> "PreTrainedTokenizerBase":
    """The tokenizer saved with an adapter, which may have tokens that the base's does not; else the base's.

    Raises:
        ModelError: see `load_tokenizer`.
    """
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    return load_tokenizer(str(adapter) if own else model)


def adapter_record(adapter: str | Path) -> dict | None:
    """What `write_adapter_record` wrote, or None for an adapter of other origin."""
    file = Path(adapter) / _RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def set_end_token(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    adapter: str | Path | None = None,
    token: str | None = None,
) -> None:
    """Let generation stop at ``token``, or at the one that an adapter was trained with, beside the model's own."""
    token = token or ((adapter_record(adapter) if adapter else None) or {}).get("end_token")
    if token is None:
        return
    known = model.generation_config.eos_token_id
    ends = [*(known if isinstance(known, list) else [known]), tokenizer.convert_tokens_to_ids(token)]
    model.generation_config.eos_token_id = sorted({end for end in ends if end is not None})


def quantization_of(adapter: str | Path | None, method: str) -> QuantizationConfig:
    """The quantization to load a base with.

    Args:
        adapter: the adapter that will be put on it, if any.
        method: ``nf4``, ``fp4``, ``none``, or ``auto`` for what the adapter was trained on (without a record, none).
    """
    record = adapter_record(adapter) if adapter else None
    if record and method in ("auto", record["quantization"]["method"]):
        return QuantizationConfig(**record["quantization"])
    return QuantizationConfig(method="none" if method == "auto" else method)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars for loading and saving weights off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."
