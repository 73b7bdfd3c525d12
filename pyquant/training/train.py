"""The fine-tuning run: a configuration in, TRL's SFTTrainer, an adapter or a model and its metrics out."""

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import yaml
from rich.console import Console

from .batches import (
    accumulation,
    candidates,
    checkpoint_batch,
    first_guess,
    largest_that_runs,
    world_size,
)
from .card import write_card
from .config import Config, TrainingConfig, nearest, parse_config, to_dict
from .errors import ConfigError, DataError, UserError, existing_folder, full_disk_is_an_error, require
from .files import write_text
from .hub import check_hub, upload
from .launch import is_main_process, uses_fsdp
from .measure import Measurements
from .memory import peak_bytes, reset_peak
from .merge import merge
from .methods import choose_trainable, fit_vocabulary, resolve_method, uses_adapter
from .models import (
    check_model,
    choose_device,
    choose_dtype,
    load_quantized,
    load_tokenizer,
    set_end_token,
    write_adapter_record,
)
from .plan import Plan, check_disk, device_memory, make_plan, measure_rate, plan_table
from .prepare import Prepared, prepare_data
from .tokens import add_tokens

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTTrainer

__all__ = ["Result", "build_trainer", "find_checkpoint", "make_deterministic", "plan_run", "train"]

# A checkpoint may be continued longer or with another learning rate, but not on another model or other data.
_FIXED_ON_RESUME = ("model", "quantization", "adapter", "partial", "data")


# Their step is an evaluation, not one of the optimizer.
_SCHEDULED_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")


@dataclass
class Result:
    """What a run gives back: the metrics that metrics.json holds, the trained model, the folder with its weights."""

    metrics: dict[str, Any]
    model: torch.nn.Module
    tokenizer: "PreTrainedTokenizerBase"
    folder: Path


@dataclass
class _Run:
    """All that is known before weights are read."""

    config: Config
    method: str
    device: torch.device
    checkpoint: Path | None
    tokenizer: "PreTrainedTokenizerBase"
    new_tokens: list[int]
    prepared: Prepared
    measurements: Measurements
    batch_size: int
    batch_sizes: list[int]
    plan: Plan


def plan_run(config: Config, console: Console | None = None) -> Plan:
    """Check a run, print its plan and return it; nothing is written, and no weights are read.

    Raises:
        UserError: as `train`.
    """
    console = (console or Console()) if is_main_process() else Console(quiet=True)
    with _full_disks(config):
        run = _check(config, console)
    _print_plan(run, console)
    return run.plan


def train(config: Config, console: Console | None = None, model: "PreTrainedModel | None" = None) -> Result:
    """Fine-tune as the configuration says, after printing the plan.

    Leaves in ``training.output_dir``: ``adapter/``, or ``model/`` for the methods partial and full, each with the
    tokenizer and a model card; ``merged/`` where asked; ``metrics.json``, ``loss.png``, ``confusion.png`` where labels
    are ranked (``confusion-before.png`` where that was measured), ``config.yaml``, ``tensorboard/`` and the last
    ``checkpoint-*`` folders.

    Args:
        config: see `pyquant.training.config`.
        console: where progress is shown; standard output when None.
        model: a base model already loaded and quantized from ``config.model.path``; loaded here when None.

    Raises:
        UserError: the configuration, the data or the model cannot be used. Nothing has been written then, unless the
            disk was full or the hub could not be reached.
    """
    console = (console or Console()) if is_main_process() else Console(quiet=True)
    with _full_disks(config):
        run = _check(config, console)
    if run.config.training.push_to_hub and is_main_process():
        check_hub(run.config.training.push_to_hub)
    _print_plan(run, console)
    with _full_disks(config):
        return _train(run, console, model)


def _full_disks(config: Config) -> contextlib.AbstractContextManager[None]:
    """Name a full disk that a run writes to: of its results, or of the caches of data and models."""
    caches = (require("datasets.config").HF_DATASETS_CACHE, require("huggingface_hub.constants").HF_HUB_CACHE)
    return full_disk_is_an_error(config.training.output_dir, *caches, tempfile.gettempdir())


def _check(config: Config, console: Console) -> _Run:
    """Check everything that a user can get wrong before the weights are read, and print what the rows are."""
    settings = config.training
    for module in ("trl", "datasets", "matplotlib", *(("tensorboard",) if settings.tensorboard else ())):
        require(module)
    if settings.wandb != "off":
        require("wandb", "wandb")
    device = choose_device()
    choose_dtype(config.model.precision, device)
    _check_names(config)
    method = resolve_method(config)
    _check_combinations(config, method)
    _check_output(settings.output_dir)
    model_config = check_model(config.model.path)
    checkpoint = find_checkpoint(settings)
    if checkpoint:
        _check_same_run(config, checkpoint)
    tokenizer = load_tokenizer(config.model.path)
    new_tokens = tokenizer.convert_tokens_to_ids(add_tokens(tokenizer, config.data))
    prepared = prepare_data(config, tokenizer)
    _check_context(prepared, model_config)
    measurements = Measurements(config, prepared, tokenizer)
    rows = _sequences(config, prepared)

    def plan_of(batch_size: int) -> Plan:
        return make_plan(
            config,
            method,
            model_config,
            tokenizer,
            new_tokens,
            prepared.report,
            rows=rows,
            batch_size=batch_size,
            gradient_accumulation=accumulation(settings, batch_size),
            device=device,
            world_size=world_size(),
        )

    sizes: list[int] = []
    if isinstance(settings.batch_size, int):
        batch_size = settings.batch_size
    elif checkpoint:
        batch_size = checkpoint_batch(checkpoint)  # another one would change the order of the data
    else:
        sizes = candidates(settings, rows)
        batch_size = first_guess(sizes, plan_of, device_memory(device))
        sizes = sizes[sizes.index(batch_size) :]
    plan = plan_of(batch_size)
    for line in prepared.report.lines(config.data):
        console.print(line, highlight=False, soft_wrap=True)
    check_disk(config, plan)
    return _Run(
        config, method, device, checkpoint, tokenizer, new_tokens, prepared, measurements, batch_size, sizes, plan
    )


def _print_plan(run: _Run, console: Console) -> None:
    """Print the plan; once nothing more can be refused, since the device is measured for it."""
    rate = measure_rate(run.device, choose_dtype(run.config.model.precision, run.device))
    console.print(plan_table(run.plan, run.device, rate), highlight=False)


def _train(run: _Run, console: Console, model: "PreTrainedModel | None") -> Result:
    config, settings, checkpoint, prepared = run.config, run.config.training, run.checkpoint, run.prepared
    if model is None:
        model = load_quantized(config.model, config.quantization, run.device)
    dtype = model.dtype
    make_deterministic(settings)
    fit_vocabulary(model, run.tokenizer)
    set_end_token(model, run.tokenizer, token=config.data.end_token)
    model = choose_trainable(model, config, run.method, run.new_tokens)
    trainer = build_trainer(
        config, model, run.tokenizer, prepared.train, prepared.eval, console, dtype=dtype, batch_size=run.batch_size
    )
    if run.batch_sizes:
        _fit_batch(trainer, run, console)

    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if trainer.is_world_process_zero():
        text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
        write_text(output / "config.yaml", text)
        start = f", from {checkpoint}" if checkpoint else ""
        rows = f"{len(prepared.train)} rows" + (f", {len(prepared.eval)} held out" if prepared.eval else "")
        what = "adapter parameters" if uses_adapter(run.method) else "parameters"
        console.print(f"Training {run.plan.trainable:,} {what} on {rows}{start}", highlight=False)

    metrics: dict[str, Any] = {}
    before = None
    if run.measurements.before:
        # The trainer puts its autocast on the model later; float32 weights beside 16-bit ones need it here already.
        with trainer.accelerator.autocast():
            before = run.measurements.run(trainer.model, after=False)
    reset_peak(run.device)
    start_time = time.perf_counter()
    if checkpoint and _is_finished(settings, checkpoint):
        # Trainer would take one step more. A run killed after its last checkpoint only lacks the results.
        _restore(trainer, checkpoint)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics |= {
        "method": run.method,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": _mean_loss(trainer.state.log_history),
        "train_seconds": time.perf_counter() - start_time,
        "train_rows": len(prepared.train),
        "parameters": run.plan.parameters,
        "trainable": run.plan.trainable,
        "batch_size": trainer.args.per_device_train_batch_size,
        "gradient_accumulation": trainer.args.gradient_accumulation_steps,
        "resumed_from_step": _step(checkpoint) if checkpoint else None,
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu",
        "precision": str(dtype).removeprefix("torch."),
        "data": prepared.metrics(),
        "planned_memory_bytes": run.plan.memory,
        "peak_memory_bytes": peak_bytes(run.device),
    }
    after = run.measurements.run(trainer.model)
    if prepared.eval is not None:
        # Over all target tokens alike; Trainer's own value is a mean of batches.
        entry = {"eval_loss": after["loss"], "eval_mean_token_accuracy": after["token_accuracy"]}
        trainer.state.log_history.append(entry | {"step": trainer.state.global_step, "epoch": trainer.state.epoch})
        metrics |= {
            "eval_loss": after["loss"],
            "eval_perplexity": after["perplexity"],
            "eval_token_accuracy": after["token_accuracy"],
            "eval_rows": len(prepared.eval),
        }
    metrics |= {"before": before, "after": after or None}
    metrics["log"] = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    return Result(metrics, trainer.model, run.tokenizer, _save(run, trainer, metrics, dtype, console))


def _save(run: _Run, trainer: "SFTTrainer", metrics: dict[str, Any], dtype: torch.dtype, console: Console) -> Path:
    """Leave a run's results, and return the folder of its weights."""
    config, settings = run.config, run.config.training
    adapter = uses_adapter(run.method)
    output = Path(settings.output_dir)
    folder = output / ("adapter" if adapter else "model")
    if not adapter and not uses_fsdp():
        trainer.model.to(dtype)  # trained in float32, used in 16 bits
    trainer.save_model(str(folder))  # by all processes: each may hold a part
    if not trainer.is_world_process_zero():
        return folder
    if adapter:
        write_adapter_record(folder, config.model, config.quantization, config.data.end_token)
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_card(folder, config, run.method, metrics, adapter)
    if metrics["log"]:
        from .plots import plot_loss

        plot_loss(metrics["log"], output / "loss.png")
    for scores, file in ((metrics["before"], "confusion-before.png"), (metrics["after"], "confusion.png")):
        if scores and "confusion_matrix" in scores:
            from .plots import plot_confusion

            title = f"accuracy {scores['accuracy']:.3f}, macro F1 {scores['macro_f1']:.3f}"
            plot_confusion(scores["confusion_matrix"], scores["labels"], output / file, title)
    if settings.merge != "none":
        # What is there is this run's, from before it was continued.
        precision = config.model.precision
        sentence = merge(
            config.model.path, folder, output / "merged", settings.merge, precision=precision, replace=True
        )
        console.print(sentence, highlight=False, soft_wrap=True)
    if settings.push_to_hub:
        console.print(f"Uploaded to {upload(folder, settings.push_to_hub)}", highlight=False, soft_wrap=True)
    return folder


def _mean_loss(history: list[dict[str, Any]]) -> float | None:
    """The mean training loss of all steps; Trainer's own is of those since the run was last resumed.

    An entry of the log is the mean of the steps since the entry before it, and `LogAtStops` leaves no step out.
    """
    total, last = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else None


def build_trainer(
    config: Config,
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    train_rows: "Dataset",
    eval_rows: "Dataset | None",
    console: Console,
    *,
    dtype: torch.dtype,
    batch_size: int,
) -> "SFTTrainer":
    """Make the SFTTrainer of a run.

    Args:
        model: with its adapter, or with the parameters marked that are trained.
        train_rows, eval_rows: tokenized, with columns input_ids and labels.
        dtype: of the products.
    """
    from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback
    from transformers.integrations import TensorBoardCallback
    from trl import SFTConfig

    from .progress import LogAtStops, ProgressDisplay
    from .trainer import CompletionTrainer

    settings = config.training
    keep_best = settings.keep_best or settings.early_stopping is not None
    if settings.wandb != "off":
        os.environ.setdefault("WANDB_DIR", str(Path(settings.output_dir).absolute()))
        os.environ.setdefault("WANDB_PROJECT", "pyquant")
        os.environ["WANDB_MODE"] = settings.wandb
        os.environ.setdefault("WANDB_SILENT", "true")
        Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    arguments = SFTConfig(
        output_dir=settings.output_dir,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=settings.eval_batch_size or batch_size,
        gradient_accumulation_steps=accumulation(settings, batch_size),
        gradient_checkpointing=settings.gradient_checkpointing,
        max_length=config.data.max_length,
        packing=config.data.packing,
        eval_packing=False,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optimizer,
        # 16-bit weights with 32-bit trained ones: autocast runs the products in 16 bits.
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # every adapter runs in every step
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=settings.log_every,
        logging_first_step=True,  # the shortest run has a curve too
        eval_strategy=_strategy(settings.eval_every) if eval_rows is not None else "no",
        eval_steps=_interval(settings.eval_every),
        save_strategy=_strategy(settings.save_every),
        save_steps=_interval(settings.save_every) or 1,
        save_total_limit=settings.keep_checkpoints,
        load_best_model_at_end=keep_best,
        metric_for_best_model="eval_loss" if keep_best else None,
        greater_is_better=False if keep_best else None,
        restore_callback_states_from_checkpoint=True,  # early stopping goes on counting
        seed=settings.seed,
        report_to=["wandb"] if settings.wandb != "off" else "none",
        run_name=Path(settings.output_dir).name,
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        # One process uses one GPU. Trainer would spread the batches over all of them with DataParallel, whose copies of
        # 4-bit layers lack what the bytes mean; several GPUs are accelerate's.
        arguments._n_gpu = 1
    trainer = CompletionTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        embedding_learning_rate=settings.embedding_learning_rate,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LogAtStops())
    trainer.add_callback(ProgressDisplay(console))
    if settings.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping))
    if settings.tensorboard and trainer.is_world_process_zero():
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(Path(settings.output_dir) / "tensorboard"))))
    return trainer


def _strategy(every: int | str | None) -> str:
    """Trainer's name for how often something is done."""
    return "epoch" if every == "epoch" else "steps" if every else "no"


def _interval(every: int | str | None) -> int | None:
    return every if isinstance(every, int) and every else None


def _fit_batch(trainer: "SFTTrainer", run: _Run, console: Console) -> None:
    """Try the batch sizes, largest first, on the longest rows, and set the trainer to the first that fits."""
    rows = trainer.train_dataset
    longest = rows[max(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))]
    state = torch.empty(run.plan.optimizer, dtype=torch.uint8, device=run.device)  # that training will hold too
    if run.config.training.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)

    def step(batch_size: int) -> None:
        inputs = trainer._prepare_inputs(trainer.data_collator([longest] * batch_size))
        trainer.model.train()
        devices = [run.device] if run.device.type == "cuda" else []
        try:
            # Dropout draws random numbers, which the run is not to lose.
            with torch.random.fork_rng(devices=devices), trainer.accelerator.autocast():
                trainer.compute_loss(trainer.model, inputs).backward()
        finally:
            trainer.model.zero_grad(set_to_none=True)

    found = largest_that_runs(run.batch_sizes, step)
    del state
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    found = int(trainer.accelerator.gather(torch.tensor([found], device=trainer.accelerator.device)).min())
    trainer.args.per_device_train_batch_size = found
    trainer._train_batch_size = trainer.args.train_batch_size
    trainer.args.gradient_accumulation_steps = accumulation(run.config.training, found)
    steps = f"{found} rows × {trainer.args.gradient_accumulation_steps} forward passes"
    console.print(f"Batch size found: {steps} per device and step", highlight=False)


def _sequences(config: Config, prepared: Prepared) -> int:
    """Sequences in an epoch, which packing makes fewer than the rows."""
    if not config.data.packing:
        return len(prepared.train)
    from trl import pack_dataset

    rows = prepared.train.select_columns(["input_ids", "labels"])
    return len(pack_dataset(rows, config.data.max_length, "bfd", {"desc": None}))


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
    if "8bit" in config.training.optimizer or config.training.optimizer.startswith("paged"):
        require("bitsandbytes", None)
    _check_optimizer(config.training.optimizer)
    _check_scheduler(config.training.scheduler)


def _check_optimizer(name: str) -> None:
    """Refuse an optimizer that transformers cannot make, for lack of its package or of settings that it needs.

    Raises:
        ConfigError: the optimizer needs settings that a configuration does not have.
        UserError: its package is not installed.
    """
    from transformers import Trainer, TrainingArguments

    if name.startswith(("galore", "apollo")):  # they would first name their package, and then fail as well
        raise ConfigError(
            f"training.optimizer is {name}, which needs a list of layers that a configuration does not have; choose "
            "another, such as adamw_torch_fused."
        )
    # Made anew, the arguments would set up the device and the other processes.
    defaults = {item.name: item.default for item in dataclasses.fields(TrainingArguments)}
    arguments = SimpleNamespace(**defaults | {"optim": name})
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, torch.nn.Linear(1, 1))
    except ImportError as error:
        raise UserError(f"training.optimizer is {name}, which is not installed: {_first_line(error)}.") from error
    except Exception as error:
        raise ConfigError(
            f"training.optimizer is {name}, which cannot be used: {_first_line(error)}; choose another, such as "
            "adamw_torch_fused."
        ) from error


def _check_scheduler(name: str) -> None:
    """Refuse a learning-rate schedule that needs settings which a configuration does not have."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=2)
    except Exception as error:
        raise ConfigError(
            f"training.scheduler is {name}, which cannot be used: {_first_line(error)}; choose another, such as cosine."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _check_output(folder: str) -> None:
    """Refuse a folder that cannot be made or written to."""
    found = existing_folder(folder)
    if not found.is_dir():
        raise ConfigError(f"training.output_dir is {folder}, but {found} is a file; name another folder.")
    if not os.access(found, os.W_OK | os.X_OK):
        raise ConfigError(f"training.output_dir is {folder}, but {found} cannot be written to; name another folder.")


def _check_combinations(config: Config, method: str) -> None:
    """Check the values that exclude each other."""
    settings = config.training
    evaluates = config.data.eval is not None or config.data.eval_fraction > 0
    if settings.keep_best or settings.early_stopping is not None:
        key = "training.early_stopping" if settings.early_stopping is not None else "training.keep_best"
        if not evaluates or not settings.eval_every:
            raise ConfigError(
                f"{key} compares evaluations; set data.eval or data.eval_fraction, and training.eval_every."
            )
        if not settings.save_every:
            raise ConfigError(f"{key} goes back to a checkpoint; set training.save_every to {settings.eval_every}.")
        epochs = [settings.save_every == "epoch", settings.eval_every == "epoch"]
        if any(epochs) and not all(epochs):
            raise ConfigError(
                f"{key} needs an evaluation at every checkpoint; training.save_every ({settings.save_every}) and "
                f"training.eval_every ({settings.eval_every}) must both be epoch, or both be steps."
            )
        if not any(epochs) and settings.save_every % settings.eval_every:
            raise ConfigError(
                f"{key} needs an evaluation at every checkpoint; training.save_every ({settings.save_every}) must be a "
                f"multiple of training.eval_every ({settings.eval_every})."
            )
    if settings.scheduler in _SCHEDULED_BY_EVALUATION and not (evaluates and settings.eval_every):
        raise ConfigError(
            f"training.scheduler is {settings.scheduler}, which follows evaluations; set data.eval or "
            "data.eval_fraction, and training.eval_every."
        )
    if settings.merge != "none" and not uses_adapter(method):
        raise ConfigError(
            f"training.merge is {settings.merge}, but the method {method} leaves a model; set it to none."
        )
    if settings.merge == "4bit" and method != "qlora":
        raise ConfigError(f"training.merge is 4bit, but the method {method} trains on 16-bit weights; set it to 16bit.")
    if settings.batch_size == "auto" and uses_fsdp():
        raise ConfigError("training.batch_size is auto, which cannot be found for a sharded model; set a number.")


def _check_context(prepared: Prepared, model_config: "PretrainedConfig") -> None:
    """Refuse rows that the model's positions do not reach."""
    context = getattr(model_config, "max_position_embeddings", None)
    if context is None:
        return
    count = sum(len(ids) > context for ids in prepared.train["input_ids"])
    if count:
        raise DataError(
            f"{count:,} rows are longer than the model's context of {context} tokens, up to "
            f"{prepared.report.longest_kept}; set data.max_length to {context}."
        )


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
    weights = any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))
    return optimizer and weights and (folder / "scheduler.pt").is_file()


def _is_finished(settings: TrainingConfig, checkpoint: Path) -> bool:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    stopping = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback")
    if settings.early_stopping is not None and isinstance(stopping, dict):
        waited = stopping["attributes"]["early_stopping_patience_counter"]
        if waited >= settings.early_stopping:
            return True
    if settings.max_steps is not None:
        return state["global_step"] >= settings.max_steps
    return state["epoch"] >= settings.epochs


def _restore(trainer: "SFTTrainer", checkpoint: Path) -> None:
    """Put a finished run's weights and state into the trainer; with keep_best those of the best checkpoint."""
    from peft import load_peft_weights, set_peft_model_state_dict
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    weights = checkpoint
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        weights = Path(trainer.state.best_model_checkpoint)
    if (weights / "adapter_config.json").is_file():
        set_peft_model_state_dict(trainer.model, load_peft_weights(str(weights)))
    else:
        trainer._load_from_checkpoint(str(weights))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _check_same_run(config: Config, checkpoint: Path) -> None:
    """Refuse to continue a checkpoint with another model, adapter or data than it was made with."""
    file = checkpoint.parent / "config.yaml"
    if not file.is_file():
        return
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not tree:
            raise ConfigError("it is empty")
        then = to_dict(parse_config(tree))
    except (yaml.YAMLError, UnicodeDecodeError, ConfigError) as error:
        reason = str(error) if isinstance(error, ConfigError) else "it is not valid YAML"
        raise ConfigError(
            f"{file}, which says what {checkpoint} was made with, cannot be read: {reason.rstrip('.')}; write "
            "that run's configuration there again, or delete the file if nothing in it was changed."
        ) from error
    now = to_dict(config)
    methods = [resolve_method(parse_config(tree)) for tree in (then, now)]
    if methods[0] != methods[1]:
        raise ConfigError(
            f"training.method is {methods[1]}, but {checkpoint} was made with {methods[0]}; "
            "put it back, or choose another training.output_dir."
        )
    for section in _FIXED_ON_RESUME:
        for key, value in now[section].items():
            if then[section][key] != value:
                raise ConfigError(
                    f"{section}.{key} is {value}, but {checkpoint} was made with {then[section][key]}; "
                    "put it back, or choose another training.output_dir."
                )
