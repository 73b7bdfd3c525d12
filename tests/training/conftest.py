"""A tiny Mistral with a tiny tokenizer, and a small task that it can learn."""

import json
import os

import pytest
import torch

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # as the command line does

ROWS = [
    {"prompt": f"{a} {b}", "completion": " yes" if a == b else " no"}
    for a in ("red", "blue", "green")
    for b in ("red", "blue", "green")
]


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["red blue green yes no the cat sat on the mat"] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    # The padding token is the end token, as in many models: only masks by length tell them apart.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} [assistant]{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a two-layer Mistral with grouped queries, random weights and a tokenizer."""
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("tiny-mistral")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.2,  # large enough that layers, positions and the adapter show in the logits
    )
    MistralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
