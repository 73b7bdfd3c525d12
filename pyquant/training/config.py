"""The configuration of a fine-tuning run: dataclasses, read from YAML and from ``key=value`` words."""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import ConfigError

__all__ = [
    "AdapterConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "PartialConfig",
    "QuantizationConfig",
    "TrainingConfig",
    "describe_keys",
    "keys",
    "load_config",
    "nearest",
    "parse_config",
    "to_dict",
]


def _option(default: Any, help: str, minimum: float | None = None, below: float | None = None) -> Any:
    """A field with its description; a list or dict is copied for every configuration."""
    metadata = {"help": help, "minimum": minimum, "below": below}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """The base model."""

    path: str = _option("", "folder or hub name of the base model (required)")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = _option(
        "auto", "dtype of weights and arithmetic; auto: bf16 where the device has it, else fp16 on a GPU, fp32 on a CPU"
    )
    attention: str | None = _option(
        None, "attention implementation (sdpa, eager, flash_attention_2); null: the model's"
    )


@dataclass
class QuantizationConfig:
    """How the base model's linear layers are quantized."""

    method: Literal["nf4", "fp4", "none"] = _option("nf4", "4-bit type, or none for 16-bit LoRA")
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = _option(64, "values that share one absmax")
    double_quant: bool = _option(True, "quantize the absmax values too")
    skip: list[str] = _option(["lm_head"], "names of layers left in 16 bits")  # noqa: RUF009


@dataclass
class AdapterConfig:
    """The LoRA adapter."""

    r: int = _option(16, "rank", minimum=1)
    alpha: float = _option(32, "scaling is alpha / r", minimum=0)
    dropout: float = _option(0.0, "dropout on the adapter's input", minimum=0, below=1)
    target_modules: str | list[str] = _option("all-linear", "all-linear, or names of layers to adapt")  # noqa: RUF009
    rslora: bool = _option(False, "rank-stabilized LoRA: scaling is alpha / sqrt(r)")
    dora: bool = _option(False, "DoRA: a trained magnitude per output, and LoRA for the direction")
    embeddings: Literal["none", "new", "all"] = _option(
        "new", "embedding rows trained beside the adapter: none, those of data.special_tokens that are new, or all"
    )


@dataclass
class PartialConfig:
    """What training.method partial trains; all other weights stay as they are."""

    last_layers: int = _option(0, "train this many of the last decoder layers whole", minimum=0)
    norms: bool = _option(False, "train every normalization layer")
    embeddings: bool = _option(False, "train the embeddings and the output layer")
    patterns: list[str] = _option([], "train parameters whose name matches one of these globs")  # noqa: RUF009


@dataclass
class DataConfig:
    """The data files and how their columns become a prompt and a completion."""

    train: str = _option("", "JSONL, CSV or Parquet file, or hub dataset (owner/name or owner/name:split) (required)")
    eval: str | None = _option(None, "the same for evaluation; null: none, unless eval_fraction")
    eval_fraction: float = _option(0.0, "part of the training rows to hold out when eval is null", minimum=0, below=1)
    prompt: str | None = _option(
        None, "template of the prompt with {column} fields; null: the columns prompt, or instruction and input"
    )
    completion: str | None = _option(None, "column of the completion; null: completion or output")
    text: str | None = _option(None, "column of plain text, trained on in full; null: text, when there is no prompt")
    messages: str | None = _option(None, "column of chat messages (role, content); null: messages, if there is one")
    special_tokens: list[str] | None = _option(  # noqa: RUF009
        None, "tokens such as <response> to add to the vocabulary; []: none, and tags in templates are plain text"
    )
    end_token: str | None = _option(None, "token that ends a completion and stops generation; null: the tokenizer's")
    mix: dict[str, float] = _option({}, "further data to mix in: {file: part of all training rows}, columns by name")  # noqa: RUF009
    deduplicate: bool = _option(False, "drop rows that repeat another one, and training rows that evaluation holds")
    packing: bool = _option(False, "several rows in one sequence of max_length, which do not attend to each other")
    chat_template: Literal["auto", "always", "never"] = _option(
        "auto", "put the prompt into the tokenizer's chat template; auto: if it has one and data.prompt is null"
    )
    limit: int | None = _option(None, "use only the first so many training rows", minimum=1)
    eval_limit: int | None = _option(None, "use only the first so many evaluation rows", minimum=1)
    max_length: int = _option(512, "tokens a row is cut to", minimum=2)
    too_long: Literal["cut", "drop"] = _option("cut", "what becomes of rows above max_length")


@dataclass
class TrainingConfig:
    """The optimization and what it leaves behind."""

    method: Literal["auto", "qlora", "lora", "partial", "full"] = _option(
        "auto", "qlora, lora (on 16-bit weights), partial or full; auto: qlora, or lora if quantization.method is none"
    )
    output_dir: str = _option("runs/pyquant", "folder for checkpoints, adapter, metrics.json, loss.png, tensorboard/")
    epochs: float = _option(1.0, "passes over the data, unless max_steps", minimum=0)
    max_steps: int | None = _option(None, "optimizer steps; overrides epochs", minimum=1)
    batch_size: int | Literal["auto"] = _option(
        8, "rows per device and forward pass; auto: as many as fit in memory", minimum=1
    )
    global_batch_size: int | None = _option(
        None, "rows per optimizer step over all devices; sets gradient_accumulation", minimum=1
    )
    eval_batch_size: int | None = _option(None, "the same for evaluation; null: batch_size", minimum=1)
    gradient_accumulation: int = _option(1, "forward passes per optimizer step", minimum=1)
    gradient_checkpointing: bool = _option(False, "recompute activations to save memory")
    completion_only_loss: bool = _option(True, "no loss on the prompt's tokens")
    learning_rate: float = _option(2e-4, "peak learning rate", minimum=0)
    embedding_learning_rate: float | None = _option(
        None, "that of embeddings and output layer, where they are trained; null: learning_rate", minimum=0
    )
    scheduler: str = _option("cosine", "learning-rate schedule, any of transformers' (linear, cosine, constant, …)")
    warmup: float = _option(0.03, "warm-up steps, or below 1 their part of all steps", minimum=0)
    weight_decay: float = _option(0.0, "AdamW weight decay", minimum=0)
    max_grad_norm: float = _option(1.0, "gradient norm is clipped to this; 0: not clipped", minimum=0)
    optimizer: str = _option(
        "adamw_torch_fused", "any of transformers' optimizers; adamw_8bit and paged_adamw_8bit need bitsandbytes"
    )
    log_every: int = _option(10, "steps between two log lines", minimum=1)
    eval_every: int | Literal["epoch"] | None = _option(
        None, "steps between two evaluations, or epoch; null or 0: only at the end", minimum=0
    )
    save_every: int | Literal["epoch"] = _option(
        100, "steps between two checkpoints, or epoch; 0: none, so that a killed run starts anew", minimum=0
    )
    keep_checkpoints: int | None = _option(2, "checkpoints kept; null: all", minimum=1)
    keep_best: bool = _option(False, "end with the weights of the lowest evaluation loss")
    early_stopping: int | None = _option(
        None, "stop after this many evaluations without a lower loss; keeps the best", minimum=1
    )
    resume: str = _option(
        "auto", "auto: from the last checkpoint in output_dir, if any; never; or a checkpoint's folder"
    )
    seed: int = _option(0, "seed of data order, adapter and dropout", minimum=0)
    threads: int | None = _option(None, "CPU threads; null: torch's choice. Fix it for results that repeat", minimum=1)
    tensorboard: bool = _option(True, "write TensorBoard logs")
    wandb: Literal["off", "offline", "online"] = _option("off", "log to Weights & Biases; offline: to output_dir/wandb")
    merge: Literal["none", "16bit", "4bit"] = _option(
        "none", "also save the adapter merged into the original or the dequantized 4-bit weights, in merged/"
    )
    push_to_hub: str | None = _option(None, "hub name (owner/name) that the result is uploaded to")


@dataclass
class EvaluationConfig:
    """What is measured beside the loss, before (where said) and after training."""

    before: bool = _option(False, "measure the evaluation rows before training too")
    classify: bool = _option(False, "rank the labels: accuracy, macro F1, confusion.png")
    labels: list[str] | None = _option(None, "the labels; null: the completions of the evaluation rows")  # noqa: RUF009
    generate: int | None = _option(None, "answer this many evaluation rows: BLEU and ROUGE-L", minimum=1)
    max_new_tokens: int = _option(64, "longest of these answers, in tokens", minimum=1)
    general: str | None = _option(
        None, "data file of general text, whose perplexity before and after shows what was forgotten"
    )
    general_rows: int = _option(64, "use only the first so many rows of it", minimum=1)


@dataclass
class Config:
    """All of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    partial: PartialConfig = field(default_factory=PartialConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


_PATHS = {"model.path", "data.train", "data.eval", "training.output_dir", "training.resume", "evaluation.general"}


def load_config(file: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply ``section.key=value`` overrides, whose values are YAML too.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value has the wrong type.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"the configuration file {file} does not exist; give the path of a YAML file.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise ConfigError(f"{file} is not valid YAML{line}; correct it.") from error
    return parse_config(tree, overrides)


def parse_config(tree: Any, overrides: Iterable[str] = ()) -> Config:
    """Check a tree of dicts (as YAML gives it) and return the configuration; see `load_config`."""
    config = Config()
    if tree is not None:
        if not isinstance(tree, dict):
            raise ConfigError(f"a configuration holds the sections {_listed(_sections())}, not a {_kind(tree)}.")
        for name, section in tree.items():
            if section is None:
                continue
            if not isinstance(section, dict):
                _check_section(name)
                raise ConfigError(
                    f"{name} must be a section of keys, not {section!r}; write {name}: with keys below it."
                )
            for key, value in section.items():
                _set(config, f"{name}.{key}", value)
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not an override; write section.key=value, such as training.max_steps=10.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of {key} is not valid YAML: {text!r}; quote it.") from error
        _set(config, key.strip(), value)
    return config


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The configuration as a tree that YAML and JSON can hold."""
    return dataclasses.asdict(config)


def describe_keys() -> str:
    """One line per key: its name, default and meaning."""
    lines = []
    for section in _sections():
        cls = _section_class(section)
        for item in dataclasses.fields(cls):
            default = item.default_factory() if item.default is dataclasses.MISSING else item.default
            lines.append(f"{section}.{item.name} = {_yaml_value(default)}: {item.metadata['help']}")
    return "\n".join(lines)


def keys() -> Iterator[str]:
    """All dotted keys."""
    for section in _sections():
        for item in dataclasses.fields(_section_class(section)):
            yield f"{section}.{item.name}"


def _sections() -> list[str]:
    return [item.name for item in dataclasses.fields(Config)]


def _section_class(name: str) -> type:
    return get_type_hints(Config)[name]


def _check_section(name: Any) -> None:
    if name not in _sections():
        raise ConfigError(f"{name} is not a configuration section; {nearest(str(name), _sections())}")


def _set(config: Config, key: str, value: Any) -> None:
    section, _, name = key.partition(".")
    if key not in set(keys()):
        if section in _sections():
            # Within a section its own keys are the likeliest, so that adapter.rank finds adapter.r.
            candidates = [k for k in keys() if k.startswith(section + ".")]
            close = difflib.get_close_matches(name, [k.partition(".")[2] for k in candidates], 3, 0.4)
            close.sort(key=lambda known: not name.startswith(known))  # rank begins with r, as no other key
            hint = f"did you mean {section}.{close[0]}?" if close else nearest(key, candidates)
        else:
            same_name = [k for k in keys() if k.partition(".")[2] == (name or section)]
            hint = f"did you mean {same_name[0]}?" if same_name else nearest(key, list(keys()))
        raise ConfigError(f"{key} is not a configuration key; {hint}")
    part = getattr(config, section)
    item = next(f for f in dataclasses.fields(part) if f.name == name)
    value = _coerce(key, value, get_type_hints(type(part))[name])
    minimum, below = item.metadata["minimum"], item.metadata["below"]
    if isinstance(value, (int, float)):
        if minimum is not None and not value >= minimum:  # NaN is neither
            raise ConfigError(f"{key} is {value}; it must be at least {minimum}.")
        if below is not None and not value < below:
            raise ConfigError(f"{key} is {value}; it must be below {below}.")
    if key in _PATHS and isinstance(value, str):
        value = str(Path(value).expanduser()) if value.startswith("~") else value
    setattr(part, name, value)


def _coerce(key: str, value: Any, expected: Any) -> Any:
    """Return ``value`` as ``expected``, or raise a `ConfigError` that names both."""
    origin, choices = get_origin(expected), get_args(expected)
    if origin is Literal:
        if value in choices and not isinstance(value, bool):
            return value
        # YAML reads "no" and "none" as they are, but null is what many write for none.
        if value is None and "none" in choices:
            return "none"
        raise ConfigError(f"{key} is {_yaml_value(value)}; it must be one of {', '.join(map(str, choices))}.")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        for choice in choices:
            if choice is not type(None):
                try:
                    return _coerce(key, value, choice)
                except ConfigError:
                    continue
    elif origin is list:
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return value
    elif origin is dict:
        if isinstance(value, dict):
            return {str(name): _coerce(f"{key}.{name}", part, choices[1]) for name, part in value.items()}
    elif expected is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):  # YAML 1.1 reads 2e-4, which has no dot, as text
            try:
                return float(value)
            except ValueError:
                pass
    elif origin is None and isinstance(value, expected) and not (expected is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key} is {_yaml_value(value)} ({_kind(value)}); it must be {_type_name(expected)}.")


def _type_name(expected: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    if get_origin(expected) in (Union, types.UnionType):
        return " or ".join(_type_name(choice) for choice in get_args(expected))
    if get_origin(expected) is Literal:
        return " or ".join(map(str, get_args(expected)))
    if get_origin(expected) is dict:
        return "a section of names and numbers"
    if get_origin(expected) is list:
        return "a list of text"
    return names[expected]


def _kind(value: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
    return names.get(type(value), "null" if value is None else "a section")


def _yaml_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("\n").removesuffix("\n...")


def nearest(name: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name: the known one that is meant, or all."""
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {close[0]}?" if close else f"the known ones are {_listed(known)}."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
