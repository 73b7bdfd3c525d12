"""Two processes train what one process trains on the same global batches, with each ready configuration: on CPUs over
gloo, and on two GPUs over NCCL. Each run is a command of its own, as a user starts it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from tiny import ROWS, make_tiny_model

pytest.importorskip("trl")
pytest.importorskip("accelerate")

HERE = Path(__file__).parent
CONFIGS = HERE.parent.parent / "examples" / "distributed"
PYQUANT = [sys.executable, "-m", "pyquant.cli"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
FSDP2 = [*LAUNCH, str(CONFIGS / "fsdp2.yaml"), str(HERE / "fsdp.py")]
OFFLOAD = [*LAUNCH, str(CONFIGS / "fsdp2-offload.yaml"), str(HERE / "fsdp.py")]
DDP = {"cpu": CONFIGS / "ddp-cpu.yaml", "cuda": CONFIGS / "ddp.yaml"}
# Of losses, and of adapters by their norm, in float32. Two processes add up in another order than one; on a GPU the
# kernels differ too, which are chosen by the number of rows. Gradients that are not averaged show in per cents.
TOLERANCE = {"cpu": (1e-4, 1e-3), "cuda": (1e-3, 1e-2)}
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])])
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, 48 rows of a task, and the file of a run of 6 steps of 8 rows."""
    folder = tmp_path_factory.mktemp("engines")
    make_tiny_model(folder / "model")
    rows = [{**row, "completion": row["completion"] * (1 + i % 3)} for i, row in enumerate(ROWS * 6)][:48]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = {
        "model": {"path": str(folder / "model"), "precision": "fp32"},
        "adapter": {"r": 8, "alpha": 16},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "eval": str(folder / "rows.jsonl"),
            "chat_template": "never",
            "max_length": 32,
        },
        "training": {
            "max_steps": 6,
            "batch_size": 8,
            "learning_rate": 1e-2,
            "log_every": 1,
            "save_every": 3,
            "threads": 1,
            "tensorboard": False,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    return folder


class Runs:
    """The runs on one kind of device."""

    def __init__(self, device, folder):
        self.device, self.file, self.folder = device, folder / "run.yaml", folder / device

    def train(self, output, *overrides, command=PYQUANT, gpus=None):
        """What the run printed.

        Args:
            gpus: that it may see, by number; None: all. On the CPU none.
        """
        environment = dict(os.environ)
        if self.device == "cpu" or gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = "" if self.device == "cpu" else gpus
        words = ["train", str(self.file), f"training.output_dir={self.folder / output}", *overrides]
        result = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300, env=environment)
        assert not result.returncode, result.stdout + result.stderr
        return result.stdout

    def train_again(self, output, *overrides, command=PYQUANT):
        """The run again from its checkpoint in the middle, as after a kill."""
        again = self.folder / f"{output}-again"
        shutil.copytree(self.folder / output / "checkpoint-3", again / "checkpoint-3")
        self.train(again.name, *overrides, command=command)
        assert self.metrics(again.name)["resumed_from_step"] == 3
        return self.results(again.name)

    def metrics(self, output):
        return json.loads((self.folder / output / "metrics.json").read_text(encoding="utf-8"))

    def results(self, output):
        """Losses of the steps and of the evaluation, and the adapter."""
        metrics = self.metrics(output)
        losses = [entry["loss"] for entry in metrics["log"] if "loss" in entry]
        adapter = safetensors.torch.load_file(self.folder / output / "adapter" / "adapter_model.safetensors")
        return torch.tensor([*losses, metrics["eval_loss"]]), adapter

    def assert_same(self, ours, theirs):
        losses, distance = TOLERANCE[self.device]
        torch.testing.assert_close(ours[0], theirs[0], rtol=losses, atol=0)
        assert set(ours[1]) == set(theirs[1])
        for key, value in theirs[1].items():
            assert ours[1][key].shape == value.shape
            assert (ours[1][key] - value).norm() <= distance * value.norm(), key


@pytest.fixture(scope="module")
def runs(device, folder):
    return Runs(device, folder)


@pytest.fixture(scope="module")
def one_process(runs):
    runs.train("one", gpus="0")
    losses, adapter = runs.results("one")
    assert len(losses) == 7
    assert losses[5] < 0.7 * losses[0]
    return losses, adapter


def test_ddp(runs, one_process):
    engine = ("training.batch_size=4", "--config", str(DDP[runs.device]))
    output = runs.train("ddp", *engine)
    assert output.count("step 6/6  loss") == 1, "one process prints"
    runs.assert_same(runs.results("ddp"), one_process)
    runs.assert_same(runs.train_again("ddp", *engine), one_process)


def test_torchrun(runs, one_process):
    """torch's own launcher, which knows no engine but DDP."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pyquant.cli"]
    runs.train("torchrun", "training.batch_size=4", command=command)
    runs.assert_same(runs.results("torchrun"), one_process)


@pytest.fixture(scope="module")
def fsdp2(runs):
    """What the run printed."""
    return runs.train("fsdp2", "training.batch_size=4", command=FSDP2)


def test_fsdp2(runs, fsdp2, one_process):
    assert fsdp2.count(f"14 sharded 4-bit weights of torch.float32 on {runs.device}") == 2
    assert fsdp2.count(f"writes {runs.folder / 'fsdp2' / 'adapter' / 'adapter_model.safetensors'}") == 1
    runs.assert_same(runs.results("fsdp2"), one_process)
    runs.assert_same(runs.train_again("fsdp2", "training.batch_size=4", command=FSDP2), one_process)


def test_fsdp2_with_cpu_offload(runs, one_process):
    output = runs.train("offload-fp32", "training.batch_size=4", command=OFFLOAD)
    assert output.count("14 sharded 4-bit weights of torch.float32 on cpu") == 2
    runs.assert_same(runs.results("offload-fp32"), one_process)
    runs.assert_same(runs.train_again("offload-fp32", "training.batch_size=4", command=OFFLOAD), one_process)


@pytest.mark.gpu
@TWO_GPUS
@pytest.mark.parametrize("file", ["fsdp2.yaml", "fsdp2-offload.yaml"])
def test_fsdp2_by_the_configuration_alone(folder, file):
    """As a user starts it, without what the other tests watch."""
    runs = Runs("cuda", folder)
    runs.train(f"alone-{file}", "training.batch_size=4", "--config", str(CONFIGS / file))
    losses, _ = runs.results(f"alone-{file}")
    assert losses[5] < 0.7 * losses[0]


def test_fsdp2_with_cpu_offload_in_bfloat16(runs):
    """Packed bytes viewed as bfloat16, beside bfloat16 weights and float32 adapters."""
    runs.train("one-bf16", "model.precision=bf16", gpus="0")
    overrides = ("training.batch_size=4", "model.precision=bf16", "training.gradient_checkpointing=true")
    output = runs.train("offload", *overrides, command=OFFLOAD)
    assert output.count("14 sharded 4-bit weights of torch.bfloat16 on cpu") == 2
    (losses, adapter), (expected, _) = runs.results("offload"), runs.results("one-bf16")
    torch.testing.assert_close(losses, expected, rtol=0.03, atol=0)
    assert {value.dtype for value in adapter.values()} == {torch.float32}


def test_fsdp2_averages_the_gradients_of_embeddings_and_output_layer(folder):
    """TRL's loss takes the weight of the output layer without calling it."""
    runs = Runs("cpu", folder)
    runs.train("one-embeddings", "adapter.embeddings=all")
    runs.train("embeddings", "adapter.embeddings=all", "training.batch_size=4", command=FSDP2)
    assert any("lm_head" in key for key in runs.results("embeddings")[1])
    runs.assert_same(runs.results("embeddings"), runs.results("one-embeddings"))


@pytest.mark.gpu
@TWO_GPUS
def test_one_process_takes_one_of_the_gpus(folder):
    """Trainer would spread the batches over all that it sees, and 4-bit layers with them."""
    runs = Runs("cuda", folder)
    runs.train("one-of-two")
    losses, _ = runs.results("one-of-two")
    assert losses[5] < 0.7 * losses[0]


def test_zero2(runs, one_process, monkeypatch):
    pytest.importorskip("deepspeed")
    if runs.device == "cpu":
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    engine = ("training.batch_size=4", "--config", str(CONFIGS / "zero2.yaml"))
    runs.train("zero2", *engine)
    runs.assert_same(runs.results("zero2"), one_process)
    runs.assert_same(runs.train_again("zero2", *engine), one_process)


def test_an_adapter_trained_in_parallel_loads_elsewhere(runs, folder, fsdp2, one_process):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    saved, expected = runs.folder / "fsdp2" / "adapter", runs.folder / "one" / "adapter"
    assert {file.name for file in saved.iterdir()} == {file.name for file in expected.iterdir()}

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.arange(12)[None]
    before = model(ids).logits
    after = PeftModel.from_pretrained(model, saved)(ids).logits
    assert not torch.allclose(before, after, atol=1e-2)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.testing.assert_close(after, PeftModel.from_pretrained(model, expected)(ids).logits, rtol=0.02, atol=0.02)


def test_an_adapter_trained_in_parallel_gives_its_loss_in_a_plain_process(runs, folder, fsdp2):
    from pyquant.training.config import ModelConfig, QuantizationConfig
    from pyquant.training.evaluate import perplexity
    from pyquant.training.models import load_adapter, load_quantized, load_tokenizer

    path = str(folder / "model")
    device = torch.device("cuda:0" if runs.device == "cuda" else "cpu")
    base = load_quantized(ModelConfig(path, "fp32"), QuantizationConfig(), device)
    model = load_adapter(base, runs.folder / "fsdp2" / "adapter")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    found = perplexity(model, load_tokenizer(path), completions, prompts)
    assert found == pytest.approx(runs.metrics("fsdp2")["eval_perplexity"], rel=1e-3)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_accelerate_takes_the_configuration(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes == 2
    if config.distributed_type == "FSDP":
        # What 4-bit weights need: no pass through meta, and an adapter that is saved whole.
        assert not config.fsdp_config["fsdp_cpu_ram_efficient_loading"]
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


def test_a_missing_engine_is_named(folder, tmp_path):
    command = [*PYQUANT, "train", str(folder / "run.yaml"), "--config"]
    result = subprocess.run([*command, str(tmp_path / "none.yaml")], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "the accelerate configuration" in result.stderr
    assert "does not exist; examples/distributed/ has some." in result.stderr


def test_deepspeed_is_asked_for_by_name(folder):
    without = "import sys; sys.modules['deepspeed'] = None; from pyquant.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        without,
        "train",
        str(folder / "run.yaml"),
        "--config",
        str(CONFIGS / "zero2.yaml"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "deepspeed is not installed; install it with: pip install deepspeed." in result.stderr
