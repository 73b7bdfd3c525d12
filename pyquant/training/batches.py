"""How many rows a forward pass and an optimizer step take."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from .config import TrainingConfig
from .errors import ConfigError, UserError
from .plan import Plan

__all__ = ["accumulation", "candidates", "checkpoint_batch", "first_guess", "largest_that_runs", "world_size"]

_LARGEST = 256


def world_size() -> int:
    """Processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation(settings: TrainingConfig, batch_size: int) -> int:
    """Forward passes per optimizer step, which ``global_batch_size`` sets where it is given.

    Raises:
        ConfigError: the global batch is no multiple of the rows of one forward pass on all devices, or
            gradient_accumulation is set too, to another number.
    """
    if settings.global_batch_size is None:
        return settings.gradient_accumulation
    rows = batch_size * world_size()
    count, rest = divmod(settings.global_batch_size, rows)
    if rest or count == 0:
        raise ConfigError(
            f"training.global_batch_size is {settings.global_batch_size}, which is no multiple of the {rows} rows of a "
            "forward pass on all devices; change it, or set training.batch_size to auto."
        )
    if settings.gradient_accumulation not in (1, count):
        raise ConfigError(
            f"training.gradient_accumulation is {settings.gradient_accumulation}, but training.global_batch_size "
            f"{settings.global_batch_size} means {count}; leave one of them out."
        )
    return count


def candidates(settings: TrainingConfig, rows: int) -> list[int]:
    """Batch sizes to try, largest first: powers of two up to the rows of a step, or what divides the global batch.

    Raises:
        ConfigError: the global batch is no multiple of the devices.
    """
    if settings.global_batch_size is None:
        top = max(1, min(_LARGEST, rows // world_size()))
        return [2**power for power in range(top.bit_length() - 1, -1, -1)]
    each, rest = divmod(settings.global_batch_size, world_size())
    if rest:
        raise ConfigError(
            f"training.global_batch_size is {settings.global_batch_size}, which is no multiple of the {world_size()} "
            "devices; change it."
        )
    return [size for size in range(each, 0, -1) if each % size == 0]


def first_guess(sizes: list[int], plan_of: Callable[[int], Plan], memory: int) -> int:
    """The largest size whose planned peak leaves a tenth of the memory free, or the smallest."""
    return next((size for size in sizes if plan_of(size).memory <= 0.9 * memory), sizes[-1])


def largest_that_runs(sizes: list[int], step: Callable[[int], None]) -> int:
    """The first of the sizes, largest first, for which ``step`` does not run out of memory.

    Raises:
        UserError: even the last one does.
    """
    from accelerate.utils import find_executable_batch_size

    remaining = iter(sizes[1:])

    def attempt(batch_size: int) -> int:
        step(batch_size)
        return batch_size

    run = find_executable_batch_size(
        attempt, starting_batch_size=sizes[0], reduce_batch_size_fn=lambda: next(remaining, 0)
    )
    try:
        return run()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "No executable batch size" not in str(error):
            raise
        raise UserError(
            f"a batch of {sizes[-1]} does not fit in memory; set training.gradient_checkpointing to true, or lower "
            "data.max_length."
        ) from error


def checkpoint_batch(checkpoint: Path) -> int:
    """The batch size that a checkpoint was made with, which must stay for the data order to stay."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["train_batch_size"]
