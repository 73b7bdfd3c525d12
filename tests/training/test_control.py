"""Stopping, the best model, kills at bad moments, logs, uploads, and what goes wrong outside of the program."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pyquant.training.config import parse_config
from pyquant.training.errors import ConfigError, DataError, UserError, full_disk_is_an_error

pytest.importorskip("trl")

from pyquant.training.train import plan_run, train


def evaluations(metrics):
    return [entry["eval_loss"] for entry in metrics["log"] if "eval_loss" in entry]


@pytest.fixture
def worsening(settings, tmp_path):
    """A run that learns the answers of its rows, and is evaluated on the opposite ones."""
    rows = [json.loads(line) for line in Path(settings["data"]["train"]).read_text().splitlines()]
    flip = {" yes": " no", " no": " yes"}
    file = tmp_path / "opposite.jsonl"
    file.write_text("".join(json.dumps(row | {"completion": flip[row["completion"]]}) + "\n" for row in rows[:9]))
    settings["data"]["eval"] = str(file)
    settings["training"] |= {
        "max_steps": 60,
        "eval_every": 2,
        "save_every": 2,
        "early_stopping": 3,
        "scheduler": "constant",
        "learning_rate": 2e-2,
    }
    return settings


def test_early_stopping_ends_with_the_best(worsening, tmp_path):
    first = train(parse_config(worsening))
    losses = evaluations(first.metrics)[:-1]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert first.metrics["steps"] == 2 * (best + 1 + 3) < 60
    assert evaluations(first.metrics)[-1] == pytest.approx(losses[best], rel=1e-3)
    # Called again it trains no further, and gives the best again.
    again = train(parse_config(worsening))
    assert again.metrics["steps"] == first.metrics["steps"]
    a, b = load_file(again.folder / "adapter_model.safetensors"), first.model.state_dict()
    assert all(torch.equal(value, b[key.replace(".weight", ".default.weight")]) for key, value in a.items())
    assert evaluations(again.metrics)[-1] == evaluations(first.metrics)[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval_every": None}, r"training\.early_stopping compares evaluations"),
        ({"eval_every": 0}, r"training\.early_stopping compares evaluations"),
        ({"save_every": 0}, r"training\.early_stopping goes back to a checkpoint; set training\.save_every to 2"),
        ({"save_every": "epoch"}, r"save_every \(epoch\) and training\.eval_every \(2\) must both be epoch, or both"),
        ({"eval_every": "epoch"}, r"save_every \(2\) and training\.eval_every \(epoch\) must both be epoch, or both"),
        ({"save_every": 3}, r"save_every \(3\) must be a multiple of training\.eval_every \(2\)"),
    ],
)
def test_stopping_without_evaluations_is_refused(worsening, change, message):
    worsening["training"] |= change
    with pytest.raises(ConfigError, match=message):
        train(parse_config(worsening))


def test_epochs_are_saved_and_evaluated_and_the_best_is_kept(worsening, tmp_path):
    worsening["training"] |= {"max_steps": None, "epochs": 4, "eval_every": "epoch", "save_every": "epoch"}
    worsening["training"] |= {"early_stopping": 1, "keep_checkpoints": None}
    run = train(parse_config(worsening))
    losses = evaluations(run.metrics)[:-1]
    steps = [entry["step"] for entry in run.metrics["log"] if "eval_loss" in entry][:-1]
    epochs = len(losses)
    assert epochs < 4  # the next one is worse
    assert losses[-1] > min(losses)
    assert steps == [9 * (epoch + 1) for epoch in range(epochs)]
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{step}" for step in steps}
    assert evaluations(run.metrics)[-1] == pytest.approx(min(losses), rel=1e-3)


def test_a_run_of_epochs_goes_on_from_the_last(settings, tmp_path, repeated):
    settings["training"] |= {"max_steps": None, "scheduler": "constant", "save_every": "epoch", "log_every": 4}
    settings["training"] |= {"output_dir": str(tmp_path / "whole"), "epochs": 2}
    train(parse_config(settings))
    settings["training"] |= {"output_dir": str(tmp_path / "parts"), "epochs": 1}
    train(parse_config(settings))
    settings["training"]["epochs"] = 2
    assert train(parse_config(settings)).metrics["resumed_from_step"] == 9
    assert repeated(tmp_path / "parts") == repeated(tmp_path / "whole")


def test_nothing_is_saved_or_evaluated_on_the_way_where_that_is_off(settings, tmp_path, data_file):
    settings["data"]["eval"] = str(data_file)
    settings["training"] |= {"save_every": 0, "eval_every": 0, "log_every": 4}
    metrics = train(parse_config(settings)).metrics
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert [("eval_loss" in entry, entry["step"]) for entry in metrics["log"]] == [
        (False, 1),
        (False, 4),
        (False, 6),  # the last steps count in train_loss too
        (True, 6),
    ]


_KILLED_RUN = """
import os, signal, sys, yaml
from transformers import Trainer
from pyquant.training import parse_config
from pyquant.training.train import train

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

moment, file = sys.argv[1:]
if moment == "saving":  # the adapter is there, the optimizer and the state are not
    save = Trainer._save_optimizer_and_scheduler
    def dies(self, folder):
        kill() if self.state.global_step == 4 else save(self, folder)
    Trainer._save_optimizer_and_scheduler = dies
elif moment == "accumulating":
    step = Trainer.training_step
    def dies(self, *args, **kwargs):
        if self.state.global_step == 5 and getattr(self, "half", False):
            kill()
        self.half = self.state.global_step == 5
        return step(self, *args, **kwargs)
    Trainer.training_step = dies
elif moment == "merging":  # the merged weights are there, what says that they are whole is not
    from transformers import PreTrainedTokenizerBase as Tokenizer
    Tokenizer.save_pretrained_ = Tokenizer.save_pretrained
    def dies(self, folder, *args, **kwargs):
        kill() if "merged" in str(folder) else self.save_pretrained_(folder, *args, **kwargs)
    Tokenizer.save_pretrained = dies
else:  # after the last checkpoint, before the results
    Trainer.save_model_ = Trainer.save_model
    def dies(self, folder=None, *args, **kwargs):
        kill() if str(folder).endswith("adapter") else self.save_model_(folder, *args, **kwargs)
    Trainer.save_model = dies
train(parse_config(yaml.safe_load(open(file))))
"""


def test_a_run_killed_at_bad_moments_ends_as_an_undisturbed_one(settings, tmp_path, data_file, repeated):
    """While saving, within an accumulated step, before the results, while merging; with a mixture, packing, dropout,
    the best, and checkpoints between two log lines."""
    general = tmp_path / "general.jsonl"
    general.write_text("".join(json.dumps({"text": f"the cat sat on mat {i}"}) + "\n" for i in range(5)))
    settings["data"] |= {"packing": True, "max_length": 16, "mix": {str(general): 0.25}, "eval": str(data_file)}
    settings["adapter"]["dropout"] = 0.1
    settings["evaluation"] = {"general": str(general)}
    settings["training"] |= {
        "max_steps": 8,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "eval_every": 2,
        "log_every": 3,
        "keep_best": True,
        "merge": "16bit",
        "output_dir": str(tmp_path / "whole"),
    }
    train(parse_config(settings))

    settings["training"]["output_dir"] = str(tmp_path / "killed")
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(settings))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    found = []
    for moment in ("saving", "accumulating", "results", "merging"):
        run = subprocess.run([sys.executable, "-c", _KILLED_RUN, moment, str(file)], env=environment, timeout=120)
        assert run.returncode == -9
        assert (tmp_path / "killed" / "metrics.json").exists() == (moment == "merging")
        assert not (tmp_path / "killed" / "merged").exists()
        states = (tmp_path / "killed").glob("checkpoint-*/trainer_state.json")
        found.append(max(int(state.parent.name.removeprefix("checkpoint-")) for state in states))
    assert found == [2, 4, 8, 8]
    assert train(parse_config(settings)).metrics["resumed_from_step"] == 8
    assert repeated(tmp_path / "killed") == repeated(tmp_path / "whole")
    for weights in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        a, b = (load_file(tmp_path / name / weights) for name in ("whole", "killed"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    # Called once more, it replaces its own results.
    train(parse_config(settings))
    assert sorted(path.name for path in (tmp_path / "killed").glob("merged*")) == ["merged"]


def test_forgetting_is_measured_before_and_after(settings, tmp_path):
    from pyquant.training.evaluate import perplexity
    from pyquant.training.models import load_quantized, load_tokenizer

    texts = ["the cat sat on the mat", "red blue green the mat"]
    file = tmp_path / "general.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings["evaluation"] = {"general": str(file)}
    settings["training"]["max_steps"] = 30
    config = parse_config(settings)
    result = train(config)
    tokenizer = load_tokenizer(config.model.path)
    # Training ends every text with the end token, so the measure counts it too.
    texts = [text + tokenizer.eos_token for text in texts]
    base = load_quantized(config.model, config.quantization, torch.device("cpu"))
    before, after = result.metrics["before"]["general_perplexity"], result.metrics["after"]["general_perplexity"]
    assert before == pytest.approx(perplexity(base, tokenizer, texts), rel=1e-4)
    assert after == pytest.approx(perplexity(result.model, tokenizer, texts), rel=1e-4)
    assert after > before


def test_measuring_changes_no_loss(settings, tmp_path, data_file):
    settings["adapter"]["dropout"] = 0.2
    plain = train(parse_config(settings)).metrics["log"]
    settings["data"]["eval"] = str(data_file)
    settings["evaluation"] = {"before": True, "classify": True}
    settings["training"]["output_dir"] = str(tmp_path / "measured")
    run = train(parse_config(settings))
    assert [e["loss"] for e in run.metrics["log"] if "loss" in e] == [e["loss"] for e in plain]
    for file in ("confusion-before.png", "confusion.png"):
        assert (tmp_path / "measured" / file).read_bytes().startswith(b"\x89PNG")
    scores = run.metrics["after"]
    right = sum(scores["confusion_matrix"][i][i] for i in range(2))
    assert scores["accuracy"] == right / 36
    assert sum(map(sum, scores["confusion_matrix"])) == 36


def test_wandb_writes_offline(settings, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_PROJECT", "WANDB_MODE", "WANDB_SILENT"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    settings["training"] |= {"wandb": "offline", "max_steps": 2}
    train(parse_config(settings))
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_8bit_optimizers_train_where_bitsandbytes_is_and_are_refused_elsewhere(settings, monkeypatch):
    pytest.importorskip("bitsandbytes")
    settings["training"]["optimizer"] = "adamw_8bit"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(UserError, match="bitsandbytes is not installed"):
            train(parse_config(settings))
    log = train(parse_config(settings)).metrics["log"]
    assert log[-1]["loss"] < log[0]["loss"]


def test_paged_optimizers_are_known(settings):
    pytest.importorskip("bitsandbytes")
    settings["training"]["optimizer"] = "paged_adamw_8bit"
    plan = plan_run(parse_config(settings))
    assert plan.optimizer == 2 * plan.trainable


@pytest.mark.skipif(not torch.cuda.is_available(), reason="paged memory is the GPU's")
def test_paged_optimizers_train(settings):
    pytest.importorskip("bitsandbytes")
    settings["training"]["optimizer"] = "paged_adamw_8bit"
    log = train(parse_config(settings)).metrics["log"]
    assert log[-1]["loss"] < log[0]["loss"]


def test_the_result_is_uploaded(settings, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **k: calls.append(("create", name)))
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path, **k: calls.append((repo_id, sorted(os.listdir(folder_path)))),
    )
    settings["training"] |= {"max_steps": 1, "push_to_hub": "me/it"}
    train(parse_config(settings))
    assert calls[0] == ("create", "me/it")
    assert calls[1][0] == "me/it"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "pyquant.json"} <= set(calls[1][1])


def test_an_unreachable_hub_is_told_before_training(settings, tmp_path, monkeypatch):
    import huggingface_hub

    unreachable = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: unreachable)
    settings["training"]["push_to_hub"] = "me/it"
    with pytest.raises(UserError, match=r"me/it cannot be made on the hub: .* log in") as error:
        train(parse_config(settings))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    settings["training"]["push_to_hub"] = "it"
    with pytest.raises(ConfigError, match=r"training\.push_to_hub is it; write owner/name"):
        train(parse_config(settings))


def test_an_unreachable_data_set_is_told(settings, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    settings["data"]["train"] = "nobody/nothing"
    with pytest.raises(DataError, match="the data file nobody/nothing does not exist, and no hub dataset"):
        train(parse_config(settings))


def test_rows_beyond_the_context_are_counted(settings, tmp_path):
    rows = [{"prompt": "red", "completion": " yes" * n} for n in (1, 300, 400)]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings["data"] |= {"train": str(file), "max_length": 350}
    with pytest.raises(DataError, match=r"2 rows are longer than the model's context of 256 tokens, up to 350; set"):
        train(parse_config(settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json.tmp").symlink_to("/dev/full")
    settings["training"]["max_steps"] = 2
    with pytest.raises(UserError, match=r"the disk of .*run is full; free some space and start again"):
        train(parse_config(settings))
    assert not list((tmp_path / "run").glob("metrics.json*"))
    assert train(parse_config(settings)).metrics["resumed_from_step"] == 2


_FULL_DISK = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from pyquant.training.errors import FullDiskError, UserError, full_disk_is_an_error

folder = Path(sys.argv[1])

def wrapped(file):  # as the data sets' builders do
    try:
        file.write_bytes(bytes(10**5))
    except OSError as error:
        raise UserError("the data cannot be read") from error

def fill(folder):
    try:
        (folder / "filler").write_bytes(bytes(10**5))
    except OSError:
        pass

def nested(file):
    with full_disk_is_an_error(file.parent):
        wrapped(file)

for write in (
    lambda file: torch.save({"a": torch.zeros(10**5)}, file),
    lambda file: (fill(file.parent), torch.save({"a": torch.zeros(10)}, file)),
    lambda file: save_file({"a": torch.zeros(10**5)}, file),
    lambda file: file.write_bytes(bytes(10**5)),
    wrapped,
    nested,
):
    try:
        with full_disk_is_an_error("/", folder / "run"):
            write(folder / "file")
        sys.exit("written")
    except FullDiskError as error:
        assert f"the disk of {folder}" in str(error) and "is full; free some space" in str(error), error
    for file in folder.iterdir():
        file.unlink()
"""


def test_every_writer_of_a_full_disk_is_understood(tmp_path):
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=64k tmpfs {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run([*namespace, mount], capture_output=True).returncode:
        pytest.skip("to fill a disk takes a small one of its own, and here no namespace may mount one")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = f'{mount} && exec "$0" -c "$1" {tmp_path}'
    run = subprocess.run(
        [*namespace, command, sys.executable, _FULL_DISK], env=environment, timeout=120, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "text",
    [
        "PytorchStreamWriter failed writing file data/0: file write failed",  # torch 2.10
        "[enforce fail at inline_container.cc:672] . unexpected pos 43200 vs 43092",  # torch 2.13
        "basic_ios::clear: iostream error",  # of a small archive
    ],
)
def test_torchs_words_for_a_full_disk_are_understood(tmp_path, text):
    with pytest.raises(UserError, match=f"the disk of {tmp_path} is full"), full_disk_is_an_error(tmp_path):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="something else"), full_disk_is_an_error(tmp_path):
        raise RuntimeError("something else")


@pytest.mark.parametrize("call", [plan_run, train])
def test_a_full_cache_is_told_by_its_own_name(settings, tmp_path, monkeypatch, call):
    from datasets import Dataset

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Dataset, "map", full)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=0 if path.name == "cache" else 10**9))
    (tmp_path / "cache").mkdir()
    with pytest.raises(UserError, match=r"the disk of .*/cache is full; free some space"):
        call(parse_config(settings))
