"""What a run will do, told before it starts: parameters, memory, tokens, time."""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from .activations import Shape, step_activations
from .config import Config
from .errors import UserError, existing_folder
from .memory import estimate_bytes, format_bytes
from .methods import choose_trainable, fit_vocabulary, uses_adapter
from .models import choose_dtype
from .prepare import LengthReport

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["Plan", "check_disk", "device_memory", "make_plan", "measure_rate", "plan_table"]

# cuBLAS's workspace and the buffers of a step that grow with nothing much: what the measured peaks of Mistral-7B, in
# activations.py, have beyond all the other terms.
_WORKSPACE = 100 * 2**20
# Bytes of optimizer state per trained parameter, by the beginning of the optimizer's name: two moments in float32
# unless the name says otherwise. Paged ones can move to the host, and are counted as if they did not.
_STATE_BYTES = {"sgd": 0, "adafactor": 0, "lion_8bit": 1, "lion": 4, "paged_lion_8bit": 1, "paged_lion": 4}
# The part of its matrix product's rate that a device reaches over a whole step; the peers reach 0.5 to 0.65 on an H200.
_EFFICIENCY = 0.6


@dataclass(frozen=True)
class Plan:
    """Counts of a run. Bytes are of one device, without sharding.

    Attributes:
        parameters, trainable: all, and those that the optimizer changes.
        weights: base weights as they are held, statistics and 16-bit copies included.
        trained: weights of an adapter.
        gradients, optimizer, activations: at the step's peak; gradients are 0 where that is in the loss.
        tokens_per_epoch, rows_per_epoch: after packing, a row is a sequence.
        steps: optimizer steps of the whole run.
        flops_per_token: of a training step.
        checkpoint, result: bytes on the disk, of one checkpoint and of what the run leaves at its end.
    """

    method: str
    parameters: int
    trainable: int
    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    batch_size: int
    gradient_accumulation: int
    world_size: int
    tokens_per_epoch: int
    rows_per_epoch: int
    steps: int
    epochs: float
    flops_per_token: float
    checkpoint: int
    result: int

    @property
    def memory(self) -> int:
        """Bytes at the peak of a step."""
        return self.weights + self.trained + self.gradients + self.optimizer + self.activations + self.workspace

    def seconds(self, flops: float) -> float:
        """Expected time of training at ``flops`` operations a second in matrix products, evaluation left out."""
        return self.flops_per_token * self.tokens_per_epoch * self.epochs / (self.world_size * flops * _EFFICIENCY)


def make_plan(
    config: Config,
    method: str,
    model_config: "PretrainedConfig",
    tokenizer: "PreTrainedTokenizerBase",
    new_tokens: Sequence[int],
    report: LengthReport,
    *,
    rows: int,
    batch_size: int,
    gradient_accumulation: int,
    device: torch.device,
    world_size: int = 1,
) -> Plan:
    """Count what a run needs, on a model without weights.

    Args:
        report: of the training rows.
        rows: sequences of an epoch, which packing makes fewer than the rows.
        batch_size, gradient_accumulation: as they will be used.

    Raises:
        ConfigError, ModelError: see `choose_trainable`.
    """
    from transformers import AutoModelForCausalLM

    settings = config.training
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
        model.tie_weights()
        rows_before = model.get_input_embeddings().weight.shape[0]
        fit_vocabulary(model, tokenizer)
        tables = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
        grown = model.get_input_embeddings().weight.shape[0] > rows_before
        base_parameters = sum(p.numel() for p in model.parameters())
        model = choose_trainable(model, config, method, new_tokens)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapter = uses_adapter(method)
    # Rows of the embeddings are looked up, and norms multiply element by element.
    products = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.requires_grad and p.dim() == 2 and "embed_tokens" not in name
    )
    element = choose_dtype(config.model.precision, device).itemsize
    counts = estimate_bytes(model_config, config.quantization)
    dense = base_parameters - counts["linear_parameters"]
    # Trained weights are float32. PEFT's layers and nn.Linear compute with 16-bit copies, which autocast keeps for the
    # backward pass; pyquant's layer makes none.
    copies = element if element < 4 else 0
    if method == "qlora":
        packed = counts["bytes_4bit"] - 2 * (counts["parameters"] - counts["linear_parameters"])
        weights, trained = packed + element * dense, 4 * trainable
    elif method == "lora":
        weights, trained = element * base_parameters, (4 + copies) * trainable
    else:
        weights = element * (base_parameters - trainable) + (4 + copies) * trainable
        trained = 0

    fused = method == "qlora" and not config.adapter.dora
    shape = Shape.of(model_config)
    longest = config.data.max_length if config.data.packing else report.longest_kept
    loss, backward = step_activations(
        shape,
        batch_size * longest,
        element,
        fused=fused,
        rank=config.adapter.r if adapter else 0,
        checkpointing=settings.gradient_checkpointing,
        loss="fused" if device.type == "cuda" else "full",
        targets=math.ceil(batch_size * longest * report.targets / report.tokens),
    )
    # The disk holds no copies: an adapter, or what is trained in float32 and all else in 16 bits. At the end a model is
    # in 16 bits as a whole.
    state = _state_bytes(settings.optimizer) * trainable
    saved = 4 * trainable if adapter else element * (base_parameters - trainable) + 4 * trainable
    if adapter and grown and config.adapter.embeddings != "all":
        saved += element * sum(table.numel() for table in tables.values())  # PEFT saves whole tables that were resized
    result = saved if adapter else element * base_parameters
    if settings.merge != "none":
        result += element * base_parameters
    gradients = 4 * trainable
    # Between two optimizer steps gradients exist during the loss, too.
    in_loss = loss + (gradients if gradient_accumulation > 1 else 0) > backward + gradients
    # Products: forward, and the gradient of every input; those of trained weights; with checkpointing forward again.
    matrix = counts["linear_parameters"] + model_config.vocab_size * model_config.hidden_size
    passes = 2 + bool(settings.gradient_checkpointing)
    # Attention: queries by keys and weights by values, over half of the sequence on average; the backward pass is two
    # and a half times that. A packed batch is one sequence, of which a mask hides the most, unless the kernel knows.
    attended = longest / 2
    if config.data.packing and "flash" not in (config.model.attention or ""):
        attended = batch_size * longest
    attention = 4.0 * shape.layers * shape.queries * attended * (passes + 1.5)
    steps_per_epoch = math.ceil(rows / (batch_size * world_size * gradient_accumulation))
    steps = settings.max_steps or math.ceil(steps_per_epoch * settings.epochs)
    return Plan(
        method=method,
        parameters=base_parameters + (trainable if adapter else 0),
        trainable=trainable,
        weights=weights,
        trained=trained,
        gradients=gradients if not in_loss or gradient_accumulation > 1 else 0,
        optimizer=state,
        activations=loss if in_loss else backward,
        workspace=_WORKSPACE if device.type == "cuda" else 0,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        world_size=world_size,
        tokens_per_epoch=report.tokens,
        rows_per_epoch=rows,
        steps=steps,
        epochs=steps / steps_per_epoch,
        flops_per_token=2.0 * passes * matrix + (2.0 * (passes + 1) if adapter else 2.0) * products + attention,
        checkpoint=saved + state,
        result=result,
    )


def device_memory(device: torch.device) -> int:
    """Bytes of the GPU, or those that are free on the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().available


def measure_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that the device reaches in a large matrix product, in a fifth of a second."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def seconds(count: int) -> float:
        before = time.perf_counter()
        for _ in range(count):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - before

    seconds(3)
    count = max(1, round(0.1 / max(seconds(1), 1e-5)))
    return 2.0 * size**3 * count / seconds(count)


def plan_table(plan: Plan, device: torch.device, rate: float) -> Table:
    """The plan as it is printed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    table = Table(title=f"The plan: {plan.method} on {name}", show_header=False, title_justify="left")
    part = 100 * plan.trainable / plan.parameters
    table.add_row("parameters", f"{plan.parameters:,}, trained {plan.trainable:,} ({part:.2f} %)")
    batch = f"{plan.batch_size} rows × {plan.gradient_accumulation} forward passes"
    batch += f" × {plan.world_size} devices" if plan.world_size > 1 else ""
    table.add_row("a step", batch)
    table.add_row("an epoch", f"{plan.rows_per_epoch:,} sequences, {plan.tokens_per_epoch:,} tokens")
    table.add_row("the run", f"{plan.steps:,} steps, {plan.epochs:.3g} epochs")
    for part_name, count in (
        ("weights", plan.weights),
        ("adapter", plan.trained),
        ("gradients", plan.gradients),
        ("optimizer", plan.optimizer),
        ("activations", plan.activations),
        ("workspace", plan.workspace),
    ):
        if count:
            table.add_row(f"memory: {part_name}", format_bytes(count))
    available = device_memory(device)
    verdict = "fits" if plan.memory <= available else "does not fit"
    kind = "has" if device.type == "cuda" else "has free"
    table.add_row("memory, peak", f"{format_bytes(plan.memory)}: {verdict}, {name} {kind} {format_bytes(available)}")
    table.add_row(
        "expected time", f"{_duration(plan.seconds(rate))} of training, at {rate / 1e12:.3g} TFLOP/s measured"
    )
    return table


def check_disk(config: Config, plan: Plan) -> None:
    """Refuse a run whose checkpoints do not fit on the disk.

    Raises:
        UserError: less is free than the kept checkpoints and the result need.
    """
    settings = config.training
    free = shutil.disk_usage(existing_folder(settings.output_dir)).free
    if settings.save_every == "epoch":
        count = math.ceil(plan.epochs)
    else:
        count = math.ceil(plan.steps / settings.save_every) if settings.save_every else 0
    if settings.keep_checkpoints is not None:
        count = min(count, settings.keep_checkpoints + 1)  # one more is written before the oldest is removed
    needed = count * plan.checkpoint + plan.result
    if needed > free:
        raise UserError(
            f"the checkpoints and the result need {format_bytes(needed)}, but the disk of {config.training.output_dir} "
            f"has {format_bytes(free)} free; free some, keep fewer checkpoints (training.keep_checkpoints), or choose "
            "another training.output_dir."
        )


def _state_bytes(optimizer: str) -> int:
    for name in sorted(_STATE_BYTES, key=len, reverse=True):
        if optimizer.startswith(name):
            return _STATE_BYTES[name]
    return 2 if "8bit" in optimizer else 8


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
