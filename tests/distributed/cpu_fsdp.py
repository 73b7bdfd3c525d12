"""Runs a pyquant command under FSDP2 on CPUs, over gloo. accelerate shards on accelerators alone; it is told that the
CPU is one. All else is the user's path: accelerate's launcher and sharding, Trainer, and the engine's configuration."""

import sys

import accelerate.state
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

torch.distributed.init_process_group("gloo")
accelerate.state.PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
accelerate.state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
CPUOffloadPolicy.__init__.__defaults__ = (False,)  # there is no pinned memory without an accelerator

from pyquant.cli import main  # noqa: E402
from pyquant.nn import Linear4bit  # noqa: E402
from pyquant.training import trainer  # noqa: E402

train = trainer.CompletionTrainer.train


def train_and_check(self, *args, **kwargs):
    result = train(self, *args, **kwargs)
    layers = [module for module in self.model.modules() if isinstance(module, Linear4bit)]
    sharded = [m for m in layers if hasattr(m.weight, "placements") and m.weight.to_local().numel() < m.weight.numel()]
    if len(sharded) != len(layers) or not layers:
        sys.exit(f"{len(sharded)} of {len(layers)} 4-bit weights are sharded")
    print(f"{len(sharded)} sharded 4-bit weights of {layers[0].weight.dtype}")
    return result


trainer.CompletionTrainer.train = train_and_check
sys.argv = ["pyquant", *sys.argv[1:]]
main()
