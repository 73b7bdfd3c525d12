"""The fine-tuning run: a configuration in, TRL's SFTTrainer, an adapter and its metrics out."""

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from rich.console import Console

from .config import Config, TrainingConfig, nearest, parse_config, to_dict
from .data import load_splits, render_prompt
from .errors import ConfigError, require
from .launch import is_main_process
from .models import (
    add_adapter,
    check_model,
    choose_device,
    choose_dtype,
    load_quantized,
    load_tokenizer,
    write_adapter_record,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTTrainer

__all__ = ["Result", "build_trainer", "find_checkpoint", "make_deterministic", "train"]

# A checkpoint may be continued longer or with another learning rate, but not on another model or other data.
_FIXED_ON_RESUME = ("model", "quantization", "adapter", "data")


@dataclass
class Result:
    """What a run gives back: the metrics that metrics.json holds, and the model with its adapter."""

    metrics: dict[str, Any]
    model: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"


def train(config: Config, console: Console | None = None, model: "PreTrainedModel | None" = None) -> Result:
    """Fine-tune as the configuration says.

    Leaves in ``training.output_dir``: ``adapter/`` (with the tokenizer), ``metrics.json``, ``loss.png``,
    ``config.yaml``, ``tensorboard/`` and the last ``checkpoint-*`` folders.

    Args:
        config: see `pyquant.training.config`.
        console: where progress is shown; standard output when None.
        model: a base model already loaded and quantized from ``config.model.path``; loaded here when None.

    Raises:
        UserError: the configuration, the data or the model cannot be used. Nothing has been written then.
    """
    console = (console or Console()) if is_main_process() else Console(quiet=True)
    for module in ("trl", "datasets", "matplotlib", *(("tensorboard",) if config.training.tensorboard else ())):
        require(module)
    # Everything a user can get wrong is checked before the weights are read.
    device = choose_device()
    choose_dtype(config.model.precision, device)
    _check_names(config)
    check_model(config.model.path)
    checkpoint = find_checkpoint(config.training)
    if checkpoint:
        _check_same_run(config, checkpoint)
    train_rows, eval_rows = load_splits(config.data, config.training.seed)
    tokenizer = load_tokenizer(config.model.path)

    if model is None:
        model = load_quantized(config.model, config.quantization, device)
    make_deterministic(config.training)
    trainer = build_trainer(config, model, tokenizer, train_rows, eval_rows, console)

    output = Path(config.training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if trainer.is_world_process_zero():
        text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
        (output / "config.yaml").write_text(text, encoding="utf-8")
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        start = f", from {checkpoint}" if checkpoint else ""
        rows = f"{len(train_rows)} rows" + (f", {len(eval_rows)} held out" if eval_rows else "")
        console.print(f"Training {trainable:,} adapter parameters on {rows}{start}", highlight=False)

    before = time.perf_counter()
    if checkpoint and _is_finished(config.training, checkpoint):
        # Trainer would take one step more. A run killed after its last checkpoint only lacks the results.
        _restore(trainer, checkpoint)
        loss = None
    else:
        loss = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).training_loss
    seconds = time.perf_counter() - before
    metrics = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": loss,
        "train_seconds": seconds,
        "train_rows": len(train_rows),
        "resumed_from_step": _step(checkpoint) if checkpoint else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(model.dtype).removeprefix("torch."),
    }
    if device.type == "cuda":
        metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    if eval_rows is not None:
        eval_loss = trainer.evaluate()["eval_loss"]
        metrics |= {"eval_loss": eval_loss, "eval_perplexity": math.exp(eval_loss), "eval_rows": len(eval_rows)}
    metrics["log"] = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]

    adapter = output / "adapter"
    trainer.save_model(str(adapter))  # by all processes: each may hold a part
    if trainer.is_world_process_zero():
        write_adapter_record(adapter, config.model, config.quantization)
        (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        if metrics["log"]:
            from .plots import plot_loss

            plot_loss(metrics["log"], output / "loss.png")
    return Result(metrics, trainer.model, tokenizer)


def build_trainer(
    config: Config,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    train_rows: "Dataset",
    eval_rows: "Dataset | None",
    console: Console,
) -> "SFTTrainer":
    """Make the SFTTrainer of a run: the adapter on the model, the rows in their chat template, the callbacks."""
    from transformers import PrinterCallback, ProgressCallback
    from transformers.integrations import TensorBoardCallback
    from trl import SFTConfig

    from .progress import ProgressDisplay
    from .trainer import CompletionTrainer

    settings = config.training
    dtype = model.dtype
    arguments = SFTConfig(
        output_dir=settings.output_dir,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size or settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        completion_only_loss=settings.completion_only_loss and "prompt" in train_rows.column_names,
        max_length=config.data.max_length,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optimizer,
        # 16-bit weights with a 32-bit adapter: autocast runs the adapter's products in 16 bits.
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # every adapter runs in every step
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=settings.log_every,
        logging_first_step=True,  # the shortest run has a curve too
        eval_strategy="steps" if eval_rows is not None and settings.eval_every else "no",
        eval_steps=settings.eval_every,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=settings.keep_checkpoints,
        seed=settings.seed,
        report_to="none",
        disable_tqdm=True,
    )

    def render(row: dict[str, str]) -> dict[str, str]:
        return {"prompt": render_prompt(row["prompt"], tokenizer, config.data)}

    if "prompt" in train_rows.column_names:
        train_rows = train_rows.map(render)
        eval_rows = eval_rows.map(render) if eval_rows is not None else None
    trainer = CompletionTrainer(
        model=add_adapter(model, config.adapter),
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressDisplay(console))
    if settings.tensorboard and trainer.is_world_process_zero():
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(Path(settings.output_dir) / "tensorboard"))))
    return trainer


def find_checkpoint(settings: TrainingConfig) -> Path | None:
    """The checkpoint that ``training.resume`` asks for, or None to start anew.

    Raises:
        ConfigError: the named folder is no complete checkpoint, or ``never`` meets a folder that holds some.
    """
    if settings.resume not in ("auto", "never"):
        folder = Path(settings.resume)
        if _is_checkpoint(folder):
            return folder
        last = _last_checkpoint(folder)
        if last is None:
            raise ConfigError(
                f"training.resume names {folder}, which holds no checkpoint; "
                "give a checkpoint-N folder, or auto or never."
            )
        return last
    last = _last_checkpoint(Path(settings.output_dir))
    if last is not None and settings.resume == "never":
        raise ConfigError(
            f"training.resume is never, but {settings.output_dir} holds {last.name}; "
            "set training.resume to auto to continue it, or choose another training.output_dir."
        )
    return last


def make_deterministic(settings: TrainingConfig) -> None:
    """Fix the seeds and the thread count, so that a run on one machine repeats."""
    from transformers import set_seed

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_seed(settings.seed)


def _check_names(config: Config) -> None:
    """Check the values that other libraries give names to, which they themselves would only refuse later."""
    from transformers import SchedulerType
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.training_args import OptimizerNames

    for key, value, known in (
        ("training.scheduler", config.training.scheduler, [item.value for item in SchedulerType]),
        ("training.optimizer", config.training.optimizer, [item.value for item in OptimizerNames]),
        ("model.attention", config.model.attention, ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]),
    ):
        if value is not None and value not in known:
            raise ConfigError(f"{key} is {value}; {nearest(value, known)}")


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; a kill in the middle of saving leaves an incomplete one, which is passed over."""
    found = [path for path in folder.glob("checkpoint-*") if _is_checkpoint(path)]
    return max(found, key=_step, default=None)


def _is_checkpoint(folder: Path) -> bool:
    # Trainer writes the trainer state after the weights, the optimizer and the random states.
    if not folder.name.removeprefix("checkpoint-").isdigit():
        return False
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # The optimizer is a file, or a folder of shards where FSDP or DeepSpeed writes it.
    optimizer = any(folder.glob("optimizer*")) or any(folder.glob("global_step*"))
    return optimizer and all((folder / name).is_file() for name in ("adapter_config.json", "scheduler.pt"))


def _is_finished(settings: TrainingConfig, checkpoint: Path) -> bool:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if settings.max_steps is not None:
        return state["global_step"] >= settings.max_steps
    return state["epoch"] >= settings.epochs


def _restore(trainer: "SFTTrainer", checkpoint: Path) -> None:
    from peft import load_peft_weights, set_peft_model_state_dict
    from transformers import TrainerState

    set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint)))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _check_same_run(config: Config, checkpoint: Path) -> None:
    """Refuse to continue a checkpoint with another model, adapter or data than it was made with."""
    file = checkpoint.parent / "config.yaml"
    if not file.is_file():
        return
    then = to_dict(parse_config(yaml.safe_load(file.read_text(encoding="utf-8"))))
    now = to_dict(config)
    for section in _FIXED_ON_RESUME:
        for key, value in now[section].items():
            if then[section][key] != value:
                raise ConfigError(
                    f"{section}.{key} is {value}, but {checkpoint} was made with {then[section][key]}; "
                    "put it back, or choose another training.output_dir."
                )
