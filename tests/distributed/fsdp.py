"""Runs a pyquant command under FSDP2, checks that it shards the 4-bit weights and gathers the output layer, and prints
which files of tensors each process writes.

Without a GPU the processes talk over gloo: accelerate shards on accelerators alone, and is told that the CPU is one.
All else is the user's path: accelerate's launcher and sharding, Trainer, and the engine's configuration.
"""

import sys

import accelerate.state
import safetensors.torch
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

if not torch.cuda.is_available():
    torch.distributed.init_process_group("gloo")
    accelerate.state.PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    accelerate.state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # there is no pinned memory without an accelerator

save_file = safetensors.torch.save_file


def save_and_print(tensors, filename, *args, **kwargs):
    print(f"writes {filename}", flush=True)
    return save_file(tensors, filename, *args, **kwargs)


safetensors.torch.save_file = save_and_print  # before PEFT takes it by name

from pyquant.cli import main  # noqa: E402
from pyquant.nn import Linear4bit  # noqa: E402
from pyquant.training import trainer  # noqa: E402

train = trainer.CompletionTrainer.train


def is_sharded(weight):
    return hasattr(weight, "placements")


def train_and_check(self, *args, **kwargs):
    head = self.model.get_output_embeddings()
    gathered = []
    # The last layer before the loss, which takes the weight of the output layer as it is then.
    self.model.get_base_model().get_decoder().norm.register_forward_hook(
        lambda *_: gathered.append(not is_sharded(head.weight))
    )
    result = train(self, *args, **kwargs)
    if not gathered or not all(gathered):
        sys.exit("the loss takes a shard of the output layer")
    if not is_sharded(head.weight):
        sys.exit("the output layer stays gathered after the step")
    layers = [module for module in self.model.modules() if isinstance(module, Linear4bit)]
    sharded = [m for m in layers if is_sharded(m.weight) and m.weight.to_local().numel() < m.weight.numel()]
    if len(sharded) != len(layers) or not layers:
        sys.exit(f"{len(sharded)} of {len(layers)} 4-bit weights are sharded")
    weight = layers[0].weight
    print(f"{len(sharded)} sharded 4-bit weights of {weight.dtype} on {weight.device.type}")
    return result


trainer.CompletionTrainer.train = train_and_check
sys.argv = ["pyquant", *sys.argv[1:]]
main()
