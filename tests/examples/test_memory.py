"""memory.py measures the driver's step in every case, not in a process's first one alone."""

import importlib.util
from pathlib import Path

import pytest
import torch

from pyquant.training import parse_config
from pyquant.training.activations import Shape, layer_saved
from pyquant.training.methods import choose_trainable
from pyquant.training.models import choose_device

pytest.importorskip("trl")

SCRIPT = Path(__file__).parents[2] / "examples" / "chat_assistant" / "memory.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def loss_of_a_gpu(monkeypatch):
    """TRL's loss, which leaves autocast to the wrapped model; the driver's own for a CPU enters autocast itself."""
    from trl import SFTTrainer

    from pyquant.training.trainer import CompletionTrainer

    monkeypatch.setattr(CompletionTrainer, "compute_loss", SFTTrainer.compute_loss)


class Saved:
    """Bytes that a decoder's last layer saves in its latest forward pass, but for weights and what the first saves."""

    def __init__(self, model, layers):
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.own |= {s.data_ptr() for p in model.parameters() for s in _statistics(p)}
        self.found = {}
        for layer in (layers[0], layers[-1]):
            layer.register_forward_pre_hook(self._enter)
            layer.register_forward_hook(self._leave)

    def _enter(self, *_):
        self.shared, self.found = set(self.found), {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()

    def _leave(self, *_):
        self.hooks.__exit__(None, None, None)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.found[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, so that no address is used twice
        return tensor

    @property
    def bytes(self):
        return sum(size for address, (size, _) in self.found.items() if address not in self.shared)


def _statistics(parameter):
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        for tensor in (state.absmax, state.code, state.offset):
            if isinstance(tensor, torch.Tensor):
                yield tensor.untyped_storage()
        state = state.state2


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what attention saves on a CPU")
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_every_case_saves_what_the_plan_counts(script, tiny_model, loss_of_a_gpu, method):
    config = parse_config(
        {
            "model": {"path": str(tiny_model), "precision": "bf16"},
            "quantization": {"method": "nf4" if method == "qlora" else "none"},
            "training": {"method": method, "tensorboard": False},
        }
    )
    dense = script.load(config, False, torch.device("cpu"))
    shape = Shape.of(dense.config)
    model = choose_trainable(dense, config, method).train()
    saved = Saved(model, dense.model.layers)
    # Autocast's 16-bit copies of PEFT's adapter, which do not grow with the tokens.
    adapter = sum(p.numel() for name, p in model.named_parameters() if "layers.1." in name and p.requires_grad)
    copies = 2 * adapter if method == "lora" else 0
    for batch, tokens in ((1, 16), (1, 48), (4, 48)):
        script.measure_case(config, model, torch.bfloat16, batch, tokens, steps=1)
        counted = batch * tokens * layer_saved(shape, 2, fused=method == "qlora", rank=16)
        assert saved.bytes - copies == counted, f"{batch} × {tokens}"


def test_every_case_of_full_fine_tuning_multiplies_in_16_bits(script, tiny_model, loss_of_a_gpu):
    config = parse_config(
        {
            "model": {"path": str(tiny_model), "precision": "bf16"},
            "quantization": {"method": "none"},
            "training": {"method": "full", "tensorboard": False},
        }
    )
    model = choose_trainable(script.load(config, False, choose_device()), config, "full").train()
    outputs = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *call: outputs.append(call[-1].dtype))
    for _ in range(2):
        script.measure_case(config, model, torch.bfloat16, 1, 16, steps=1)
    assert outputs == [torch.bfloat16] * 4
