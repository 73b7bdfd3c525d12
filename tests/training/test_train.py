import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pyquant.training.config import parse_config
from pyquant.training.errors import ConfigError, DataError, ModelError, UserError
from pyquant.training.models import adapter_record

pytest.importorskip("trl")

from pyquant.training.train import find_checkpoint, plan_run, train

QUANTIZATIONS = ["none", "nf4"]


@pytest.mark.parametrize("method", QUANTIZATIONS)
def test_a_run_learns_and_leaves_its_results(settings, tmp_path, data_file, method):
    settings["quantization"] = {"method": method, "blocksize": 64}
    settings["data"]["eval"] = str(data_file)
    settings["training"] |= {"max_steps": 40, "save_every": 100, "eval_every": 20, "tensorboard": True}
    result = train(parse_config(settings))
    run = tmp_path / "run"

    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics == result.metrics
    first, last = (next(e["loss"] for e in log if "loss" in e) for log in (metrics["log"], metrics["log"][::-1]))
    assert last < 0.3 * first
    fused = sum(type(module).__name__ == "LoraLinear4bit" for module in result.model.modules())
    assert fused == (14 if method == "nf4" else 0)
    assert metrics["steps"] == 40
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert [e["step"] for e in metrics["log"] if "eval_loss" in e] == [20, 40, 40]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.*"))
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "adapter" / "tokenizer.json").is_file()
    assert adapter_record(run / "adapter")["quantization"]["method"] == method
    assert parse_config(yaml.safe_load((run / "config.yaml").read_text())).adapter.r == 8


def test_a_run_repeats_exactly(settings, tmp_path):
    losses = []
    for name in ("a", "b"):
        settings["training"]["output_dir"] = str(tmp_path / name)
        settings["adapter"]["dropout"] = 0.1
        losses.append([e["loss"] for e in train(parse_config(settings)).metrics["log"]])
    assert losses[0] == losses[1]


def test_another_seed_is_another_run(settings, tmp_path):
    """Another order of the rows, which the losses show; and other first weights of the adapter."""
    runs = []
    for seed in (0, 1):
        settings["training"] |= {
            "output_dir": str(tmp_path / str(seed)),
            "seed": seed,
            "learning_rate": 0,
            "max_steps": 2,
        }
        runs.append(train(parse_config(settings)))
    losses = [[e["loss"] for e in run.metrics["log"]] for run in runs]
    assert losses[0] != losses[1]
    a, b = (load_file(run.folder / "adapter_model.safetensors") for run in runs)
    assert all(torch.equal(a[key], b[key]) == ("lora_B" in key) for key in a)


def test_rates_clipping_and_kept_checkpoints_are_those_asked_for(settings, tmp_path):
    settings["training"] |= {
        "warmup": 2,
        "scheduler": "linear",
        "learning_rate": 0.3,
        "optimizer": "sgd",
        "max_grad_norm": 1e-3,
        "save_every": 1,
        "keep_checkpoints": 3,
    }
    result = train(parse_config(settings))
    log = result.metrics["log"]
    # Up over two steps, down over the four others; the rate of a line is that of its own step.
    rates = [0.0, 0.15, 0.3, 0.225, 0.15, 0.075]
    assert [entry["learning_rate"] for entry in log] == pytest.approx(rates)
    assert min(entry["grad_norm"] for entry in log) > 1e-3
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (4, 5, 6)}
    # Each step of SGD is as long as its rate times the clipped norm.
    before, after = (
        load_file(tmp_path / "run" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (4, 5)
    )
    length = sum((after[key] - before[key]).square().sum() for key in before).sqrt().item()
    assert length == pytest.approx(rates[4] * 1e-3, rel=1e-2)


def test_the_curves_are_those_of_the_metrics(settings, data_file, monkeypatch):
    from pyquant.training import plots

    figures, figure = [], plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *size: figures.append(figure(*size)) or figures[-1])
    settings["data"]["eval"] = str(data_file)
    settings["training"]["eval_every"] = 2
    log = train(parse_config(settings)).metrics["log"]
    names = [
        ["loss", "eval_loss"],
        ["mean_token_accuracy", "eval_mean_token_accuracy"],
        ["learning_rate"],
    ]
    (drawn,) = figures
    for axes, keys in zip(drawn.axes, names, strict=True):
        assert len(axes.lines) == len(keys)
        for line, key in zip(axes.lines, keys, strict=True):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            assert len(points) >= 4
            assert list(map(tuple, line.get_xydata())) == points


def test_the_loss_is_trls(settings, tiny_model, data_file):
    """On a CPU the loss takes a shorter way than TRL's, to the same value and gradients."""
    from rich.console import Console
    from trl import SFTTrainer

    from pyquant.training.data import load_splits
    from pyquant.training.methods import choose_trainable
    from pyquant.training.models import load_base, load_tokenizer
    from pyquant.training.prepare import prepare_data
    from pyquant.training.train import build_trainer

    config = parse_config(settings)
    rows, _ = load_splits(config.data, 0)
    tokenizer = load_tokenizer(str(tiny_model))
    model = choose_trainable(load_base(config.model, torch.device("cpu")), config, "lora")
    tokenized = prepare_data(config, tokenizer).train
    options = {"dtype": torch.float32, "batch_size": 4}
    trainer = build_trainer(config, model, tokenizer, tokenized, None, Console(), **options)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
    # Each answer is one word and the end token, though the end token is also the padding token.
    assert (batch["labels"] != -100).sum(1).tolist() == [
        len(trainer.processing_class(row["completion"], add_special_tokens=False)["input_ids"]) + 1
        for row in rows.select(range(5))
    ]
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    grads, losses = [], []
    for compute in (trainer.compute_loss, lambda *a, **k: SFTTrainer.compute_loss(trainer, *a, **k)):
        trainer.model.zero_grad()
        loss = compute(trainer.model, dict(batch), num_items_in_batch=torch.tensor(17))
        loss.backward()
        losses.append(loss.item())
        grads.append([p.grad.clone() for p in parameters])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, trls in zip(*grads, strict=True):
        torch.testing.assert_close(ours, trls, rtol=1e-3, atol=1e-6)


def test_accumulated_steps_equal_large_batches(settings, tmp_path):
    curves = []
    for name, batch, accumulation in (("large", 4, 1), ("accumulated", 2, 2)):
        settings["training"] |= {
            "output_dir": str(tmp_path / name),
            "batch_size": batch,
            "gradient_accumulation": accumulation,
            "gradient_checkpointing": accumulation > 1,
        }
        curves.append([e["loss"] for e in train(parse_config(settings)).metrics["log"]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


_SLOW_RUN = """
import sys, time, yaml
from transformers import TrainerCallback
from pyquant.training import parse_config
import pyquant.training.progress as progress

class Slow(progress.ProgressDisplay):
    def on_step_end(self, *args, **kwargs):
        time.sleep(0.5)  # so that the kill falls between two steps

progress.ProgressDisplay = Slow
from pyquant.training.train import train
train(parse_config(yaml.safe_load(open(sys.argv[1]))))
"""


def test_a_killed_run_ends_as_an_undisturbed_one(settings, tmp_path, repeated):
    settings["adapter"]["dropout"] = 0.1  # so that the random state matters
    settings["quantization"] = {"method": "nf4"}
    settings["training"] |= {"max_steps": 8, "output_dir": str(tmp_path / "whole")}
    whole = train(parse_config(settings)).metrics
    assert whole["train_loss"] == pytest.approx(sum(e["loss"] for e in whole["log"]) / 8)

    settings["training"]["output_dir"] = str(tmp_path / "killed")
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(settings))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-c", _SLOW_RUN, str(file)], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "checkpoint-4" / "trainer_state.json").is_file():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "metrics.json").exists()

    resumed = train(parse_config(settings)).metrics
    assert resumed["resumed_from_step"] in (4, 6)
    assert repeated(tmp_path / "killed") == repeated(tmp_path / "whole")
    a, b = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_resume_finds_only_complete_checkpoints(settings, tmp_path):
    run = tmp_path / "run"
    for step, files in {2: 4, 10: 4, 12: 3}.items():
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ["adapter_config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json"][:files]:
            (folder / name).write_text("{}")
    training = parse_config(settings).training
    assert find_checkpoint(training) == run / "checkpoint-10"
    training.resume = str(run / "checkpoint-2")
    assert find_checkpoint(training) == run / "checkpoint-2"
    training.resume = str(run / "checkpoint-12")
    with pytest.raises(ConfigError, match="checkpoint-12, which holds no checkpoint"):
        find_checkpoint(training)
    training.resume = "never"
    with pytest.raises(ConfigError, match=r"holds checkpoint-10; set training\.resume to auto"):
        find_checkpoint(training)


def test_a_finished_run_can_be_called_again_and_lengthened(settings, tmp_path):
    settings["training"] |= {"max_steps": 4, "scheduler": "constant"}
    first = train(parse_config(settings)).metrics
    again = train(parse_config(settings)).metrics
    assert again["resumed_from_step"] == again["steps"] == 4
    assert again["log"] == first["log"]
    adapters = [load_file(tmp_path / "run" / f / "adapter_model.safetensors") for f in ("checkpoint-4", "adapter")]
    assert all(torch.equal(adapters[1][key], value) for key, value in adapters[0].items())
    settings["training"]["max_steps"] = 6
    longer = train(parse_config(settings)).metrics
    assert longer["steps"] == 6
    assert longer["log"][:4] == first["log"]
    settings["training"] |= {"output_dir": str(tmp_path / "whole")}
    assert train(parse_config(settings)).metrics["log"] == longer["log"]


def test_another_adapter_is_not_resumed(settings):
    settings["training"]["max_steps"] = 2
    train(parse_config(settings))
    settings["adapter"]["r"] = 4
    with pytest.raises(ConfigError, match=r"adapter\.r is 4, but .*checkpoint-2 was made with 8"):
        train(parse_config(settings))


@pytest.mark.parametrize("inside", ["", "deep/run"])
def test_a_file_in_the_place_of_the_results_is_named(settings, tmp_path, inside):
    file = tmp_path / "file"
    file.write_text("")
    settings["training"]["output_dir"] = str(file / inside)
    for call in (plan_run, train):
        with pytest.raises(ConfigError, match=r"training\.output_dir is .*, but .*file is a file; name another"):
            call(parse_config(settings))


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "it is empty"), ("data: {train: [", "it is not valid YAML"), ("data: {x: 1}", r"data\.x is not")],
)
def test_a_broken_record_of_a_run_is_named(settings, tmp_path, text, reason):
    settings["training"]["max_steps"] = 2
    train(parse_config(settings))
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"config\.yaml, which says what .*checkpoint-2 .*: {reason}") as error:
        plan_run(parse_config(settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "error", "message"),
    [
        ("model", "path", "./absent", ModelError, r"the model folder \./absent does not exist"),
        ("model", "path", "", ModelError, "set model.path"),
        ("data", "train", "absent.jsonl", DataError, r"absent\.jsonl does not exist"),
        ("data", "train", "", DataError, r"data\.train is not set"),
        ("data", "completion", "answer", DataError, "no column answer"),
        ("training", "resume", "./absent", ConfigError, "holds no checkpoint"),
        ("training", "scheduler", "cosin", ConfigError, r"did you mean cosine\?"),
        ("training", "optimizer", "adamw", ConfigError, r"training\.optimizer is adamw"),
        ("training", "scheduler", "cosine_with_min_lr", ConfigError, r"is cosine_with_min_lr, which cannot .*min"),
        ("training", "scheduler", "warmup_stable_decay", ConfigError, r"warmup_stable_decay, .*num_decay_steps"),
        ("training", "scheduler", "reduce_lr_on_plateau", ConfigError, r"which follows evaluations; set data\.eval or"),
        ("training", "optimizer", "galore_adamw", ConfigError, r"optimizer is galore_adamw, which needs a list"),
        ("training", "optimizer", "grokadamw", UserError, r"training\.optimizer is grokadamw, .*install grokadamw"),
        ("data", "prompt", "{prompt", ConfigError, r"data\.prompt is not a template"),
        ("model", "attention", "flesh", ConfigError, r"model\.attention is flesh"),
        ("adapter", "target_modules", ["q_prj"], ModelError, r"q_prj"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(settings, tmp_path, section, key, value, error, message):
    settings[section][key] = value
    with pytest.raises(error, match=message):
        train(parse_config(settings))
    assert not (tmp_path / "run").exists()
