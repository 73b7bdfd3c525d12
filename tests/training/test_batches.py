import sys

import pytest
import torch

from pyquant.training.batches import accumulation, candidates, first_guess, largest_that_runs
from pyquant.training.config import TrainingConfig, parse_config
from pyquant.training.errors import ConfigError, UserError
from pyquant.training.plan import Plan

pytest.importorskip("trl")

from pyquant.training.train import train
from pyquant.training.trainer import CompletionTrainer


def plan_of(memory):
    zeros = dict.fromkeys(Plan.__dataclass_fields__, 0)
    return Plan(**(zeros | {"weights": memory}))


@pytest.mark.parametrize(("batch", "world", "expected"), [(4, 1, 8), (4, 4, 2), (16, 2, 1)])
def test_the_global_batch_is_reached(monkeypatch, batch, world, expected):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert accumulation(TrainingConfig(global_batch_size=32), batch) == expected


def test_a_global_batch_that_cannot_be_reached_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="no multiple of the 6 rows"):
        accumulation(TrainingConfig(global_batch_size=32), 6)
    with pytest.raises(ConfigError, match=r"gradient_accumulation is 3, but .* 32 means 8"):
        accumulation(TrainingConfig(global_batch_size=32, gradient_accumulation=3), 4)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="no multiple of the 3 devices"):
        candidates(TrainingConfig(global_batch_size=32), 100)


def test_candidates_divide_the_global_batch():
    assert candidates(TrainingConfig(global_batch_size=12), 100) == [12, 6, 4, 3, 2, 1]
    assert candidates(TrainingConfig(), 20) == [16, 8, 4, 2, 1]


def test_the_guess_leaves_a_tenth_free():
    assert first_guess([16, 8, 4, 2, 1], lambda size: plan_of(100 * size), 900) == 8
    assert first_guess([16, 8, 4, 2, 1], lambda size: plan_of(100 * size), 880) == 4
    assert first_guess([16, 8], lambda size: plan_of(100 * size), 10) == 8


def test_memory_that_runs_out_leads_to_the_next_size():
    tried = []

    def step(size):
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert largest_that_runs([12, 6, 4, 3, 2], step) == 3
    assert tried == [12, 6, 4, 3]
    with pytest.raises(UserError, match=r"a batch of 6 does not fit in memory; set training\.gradient"):
        largest_that_runs([12, 6], step)
    with pytest.raises(RuntimeError, match="another"):
        largest_that_runs([2], lambda size: (_ for _ in ()).throw(RuntimeError("another")))


def test_auto_trains_as_the_batch_that_it_finds(settings, tmp_path, monkeypatch):
    """At most two rows fit: the run is that with batch_size 2 and accumulation to 8, and goes on so after a stop."""
    settings["adapter"]["dropout"] = 0.1
    settings["training"] |= {"batch_size": 2, "gradient_accumulation": 4, "scheduler": "constant"}
    reference = train(parse_config(settings)).metrics

    compute = CompletionTrainer.compute_loss

    def limited(self, model, inputs, *args, **kwargs):
        if inputs["input_ids"].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(CompletionTrainer, "compute_loss", limited)
    settings["training"] |= {
        "batch_size": "auto",
        "gradient_accumulation": 1,
        "global_batch_size": 8,
        "output_dir": str(tmp_path / "auto"),
        "max_steps": 4,
    }
    found = train(parse_config(settings)).metrics
    assert (found["batch_size"], found["gradient_accumulation"]) == (2, 4)
    settings["training"]["max_steps"] = 6
    module = sys.modules["pyquant.training.train"]
    monkeypatch.setattr(module, "candidates", lambda *a: pytest.fail("searched again"))
    resumed = train(parse_config(settings)).metrics
    assert resumed["resumed_from_step"] == 4
    assert [e["loss"] for e in resumed["log"]] == [e["loss"] for e in reference["log"]]
