"""Two processes over gloo train what one process trains on the same global batches, with each ready configuration."""

import json
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
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]


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
        "data": {"train": str(folder / "rows.jsonl"), "chat_template": "never", "max_length": 32},
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


def run(command, folder, output, *overrides):
    words = ["train", str(folder / "run.yaml"), f"training.output_dir={folder / output}", *overrides]
    result = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300)
    assert not result.returncode, result.stdout + result.stderr
    return result.stdout


def results(folder, output):
    """Losses of the steps, and the adapter."""
    metrics = json.loads((folder / output / "metrics.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in metrics["log"] if "loss" in entry]
    adapter = safetensors.torch.load_file(folder / output / "adapter" / "adapter_model.safetensors")
    return torch.tensor(losses), adapter


def assert_same_training(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=0)
    assert set(ours[1]) == set(theirs[1])
    for key, value in theirs[1].items():
        assert ours[1][key].shape == value.shape
        torch.testing.assert_close(ours[1][key], value, rtol=0, atol=2e-3, msg=key)


@pytest.fixture(scope="module")
def one_process(folder):
    run([sys.executable, "-m", "pyquant.cli"], folder, "one")
    losses, adapter = results(folder, "one")
    assert len(losses) == 6
    assert losses[-1] < 0.7 * losses[0]
    return losses, adapter


def resume(command, folder, output, *overrides):
    """The run again from its checkpoint in the middle, as after a kill."""
    (folder / f"{output}-again").mkdir()
    shutil.copytree(folder / output / "checkpoint-3", folder / f"{output}-again" / "checkpoint-3")
    run(command, folder, f"{output}-again", *overrides)
    metrics = json.loads((folder / f"{output}-again" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["resumed_from_step"] == 3
    return results(folder, f"{output}-again")


def test_ddp(folder, one_process):
    command = [sys.executable, "-m", "pyquant.cli"]
    engine = ("training.batch_size=4", "--config", str(CONFIGS / "ddp-cpu.yaml"))
    output = run(command, folder, "ddp", *engine)
    assert output.count("step 6/6") == 1, "one process prints"
    assert_same_training(results(folder, "ddp"), one_process)
    assert_same_training(resume(command, folder, "ddp", *engine), one_process)


FSDP2 = [*LAUNCH, str(CONFIGS / "fsdp2.yaml"), str(HERE / "cpu_fsdp.py")]


@pytest.fixture(scope="module")
def fsdp2(folder):
    """What the run printed."""
    return run(FSDP2, folder, "fsdp2", "training.batch_size=4")


def test_fsdp2(folder, fsdp2, one_process):
    assert fsdp2.count("14 sharded 4-bit weights of torch.float32") == 2
    assert_same_training(results(folder, "fsdp2"), one_process)
    assert_same_training(resume(FSDP2, folder, "fsdp2", "training.batch_size=4"), one_process)


def test_fsdp2_with_cpu_offload_in_bfloat16(folder):
    """Packed bytes viewed as bfloat16, beside bfloat16 weights and float32 adapters."""
    run([sys.executable, "-m", "pyquant.cli"], folder, "one-bf16", "model.precision=bf16")
    command = [*LAUNCH, str(CONFIGS / "fsdp2-offload.yaml"), str(HERE / "cpu_fsdp.py")]
    overrides = ("training.batch_size=4", "model.precision=bf16", "training.gradient_checkpointing=true")
    output = run(command, folder, "offload", *overrides)
    assert output.count("14 sharded 4-bit weights of torch.bfloat16") == 2
    (losses, adapter), (expected, _) = results(folder, "offload"), results(folder, "one-bf16")
    torch.testing.assert_close(losses, expected, rtol=0.03, atol=0)
    assert {value.dtype for value in adapter.values()} == {torch.float32}


def test_zero2(folder, one_process, monkeypatch):
    pytest.importorskip("deepspeed")
    if not torch.cuda.is_available():
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    command = [sys.executable, "-m", "pyquant.cli"]
    engine = ("training.batch_size=4", "--config", str(CONFIGS / "zero2.yaml"))
    run(command, folder, "zero2", *engine)
    assert_same_training(results(folder, "zero2"), one_process)
    assert_same_training(resume(command, folder, "zero2", *engine), one_process)


def test_an_adapter_trained_in_parallel_loads_elsewhere(folder, fsdp2, one_process):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.arange(12)[None]
    before = model(ids).logits
    after = PeftModel.from_pretrained(model, folder / "fsdp2" / "adapter")(ids).logits
    assert not torch.allclose(before, after, atol=1e-2)
    expected = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "one" / "adapter"
    )(ids).logits
    torch.testing.assert_close(after, expected, rtol=0.02, atol=0.02)


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
    command = [sys.executable, "-m", "pyquant.cli", "train", str(folder / "run.yaml"), "--config"]
    result = subprocess.run([*command, str(tmp_path / "none.yaml")], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "the accelerate configuration" in result.stderr
    assert "does not exist; examples/distributed/ has some." in result.stderr


def test_deepspeed_is_asked_for_by_name(folder):
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        command = [sys.executable, "-m", "pyquant.cli", "train", str(folder / "run.yaml"), "--config"]
        result = subprocess.run([*command, str(CONFIGS / "zero2.yaml")], capture_output=True, text=True, timeout=120)
        assert result.returncode == 1
        assert "deepspeed is not installed; install it with: pip install deepspeed." in result.stderr
    else:
        pytest.skip("DeepSpeed is installed")
