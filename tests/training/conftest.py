"""A tiny Mistral with a tiny tokenizer, and a small task that it can learn."""

import json

import pytest
from tiny import ROWS, make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a two-layer Mistral with grouped queries, random weights and a tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-mistral"))


@pytest.fixture
def data_file(tmp_path):
    """JSONL of a task with two answers."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4), encoding="utf-8")
    return file


@pytest.fixture
def settings(tiny_model, data_file, tmp_path):
    """The tree of a short run's configuration."""
    return {
        "model": {"path": str(tiny_model), "precision": "fp32"},
        "adapter": {"r": 8, "alpha": 16},
        "data": {"train": str(data_file), "chat_template": "never", "max_length": 32},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 6,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "log_every": 1,
            "save_every": 2,
            "threads": 1,
            "tensorboard": False,
        },
    }


@pytest.fixture
def repeated():
    """All that metrics.json of a folder holds except what no two runs share: times, memory, where it was resumed."""

    def read(folder):
        metrics = json.loads((folder / "metrics.json").read_text())
        varying = {"train_seconds", "peak_memory_bytes", "resumed_from_step"}
        times = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
        assert varying <= metrics.keys()
        kept = {key: value for key, value in metrics.items() if key not in varying}
        return kept | {
            "log": [{key: value for key, value in e.items() if key not in times} for e in metrics["log"]],
        }

    return read


@pytest.fixture(scope="session")
def adapter(tiny_model, tmp_path_factory):
    """Folder of an adapter trained on FP4 weights, with the blocksize 128 that nothing has by default."""
    pytest.importorskip("trl")
    from pyquant.training import parse_config, train

    folder = tmp_path_factory.mktemp("trained")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4), encoding="utf-8")
    training = {"max_steps": 30, "learning_rate": 1e-2, "batch_size": 4, "tensorboard": False}
    train(
        parse_config(
            {
                "model": {"path": str(tiny_model), "precision": "fp32"},
                "quantization": {"method": "fp4", "blocksize": 128},
                "data": {"train": str(file), "chat_template": "never"},
                "training": training | {"output_dir": str(folder / "run"), "resume": "never"},
            }
        )
    )
    return folder / "run" / "adapter"
