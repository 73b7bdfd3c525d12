import json
import math

import pytest
import torch
from safetensors.torch import load_file

from pyquant.training.config import parse_config
from pyquant.training.errors import ConfigError
from pyquant.training.methods import choose_trainable, resolve_method
from pyquant.training.models import load_base, load_tokenizer

pytest.importorskip("trl")

from pyquant.training.train import train


def base_of(config):
    return load_base(config.model, torch.device("cpu"))


@pytest.mark.parametrize(
    ("partial", "expected"),
    [
        ({"last_layers": 1}, lambda name: name.startswith("model.layers.1.")),
        ({"norms": True}, lambda name: "norm" in name),
        ({"embeddings": True}, lambda name: "embed_tokens" in name or name == "lm_head.weight"),
        ({"patterns": ["*.0.mlp.*", "*q_proj.weight"]}, lambda name: ".0.mlp." in name or "q_proj" in name),
    ],
)
def test_partial_changes_what_it_names_and_nothing_else(settings, tmp_path, partial, expected):
    settings["training"] |= {"method": "partial", "max_steps": 2, "weight_decay": 0.1}
    settings["partial"] = partial
    config = parse_config(settings)
    before = base_of(config).state_dict()
    result = train(config)
    assert result.folder == tmp_path / "run" / "model"
    after = load_base(parse_config({"model": {"path": str(result.folder), "precision": "fp32"}}).model).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name].cpu())}
    assert changed == {name for name in before if expected(name)}


def test_full_trains_all_saves_a_model_and_resumes(settings, tmp_path):
    settings["training"] |= {"method": "full", "max_steps": 4, "scheduler": "constant", "learning_rate": 1e-3}
    whole = train(parse_config(settings))
    assert whole.metrics["trainable"] == whole.metrics["parameters"]
    assert whole.metrics["method"] == "full"
    settings["training"] |= {"output_dir": str(tmp_path / "parts"), "max_steps": 2}
    train(parse_config(settings))
    settings["training"]["max_steps"] = 4
    resumed = train(parse_config(settings))
    assert resumed.metrics["resumed_from_step"] == 2
    assert resumed.metrics["log"] == whole.metrics["log"]
    a, b = (load_file(folder / "model.safetensors") for folder in (whole.folder, resumed.folder))
    assert all(torch.equal(a[key], b[key]) for key in a)
    again = train(parse_config(settings))  # a run that lacked only its results
    assert again.metrics["log"] == resumed.metrics["log"]
    assert all(torch.equal(value, a[key]) for key, value in load_file(again.folder / "model.safetensors").items())


@pytest.mark.parametrize("method", ["qlora", "lora", "partial", "full"])
def test_before_and_after_are_measured_in_16_bits(settings, data_file, method):
    """Weights in float32 beside 16-bit ones, as partial has them, are measured as they are trained: under autocast."""
    settings["model"]["precision"] = "bf16"
    settings["data"]["eval"] = str(data_file)
    settings["evaluation"] = {"before": True, "classify": True}
    settings["partial"] = {"last_layers": 1}
    settings["training"] |= {"method": method, "max_steps": 1, "learning_rate": 0.0}
    metrics = train(parse_config(settings)).metrics
    before, after = metrics["before"], metrics["after"]
    assert before["loss"] == pytest.approx(after["loss"], rel=1e-6)
    assert before["confusion_matrix"] == after["confusion_matrix"]


def test_rslora_and_dora_reach_the_layers(settings):
    settings["adapter"] |= {"r": 16, "alpha": 8, "rslora": True, "dora": True}
    config = parse_config(settings)
    model = choose_trainable(base_of(config), config, "lora")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == pytest.approx(8 / math.sqrt(16))
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.detach(), layer.base_layer.weight.norm(dim=1))


def test_embeddings_have_their_own_learning_rate(settings, tiny_model):
    from rich.console import Console

    from pyquant.training.prepare import prepare_data
    from pyquant.training.train import build_trainer

    settings["adapter"]["embeddings"] = "all"
    settings["training"] |= {"embedding_learning_rate": 3e-5, "weight_decay": 0.1}
    config = parse_config(settings)
    tokenizer = load_tokenizer(str(tiny_model))
    model = choose_trainable(base_of(config), config, "lora")
    rows = prepare_data(config, tokenizer).train
    options = {"dtype": torch.float32, "batch_size": 4}
    trainer = build_trainer(config, model, tokenizer, rows, None, Console(), **options)
    trainer.create_optimizer_and_scheduler(10)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert set(rates) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        assert rate == (1e-2 if "lora_" in name else 3e-5)
    assert {name.split(".")[-4] for name in rates if "lora_" not in name} >= {"lm_head"}
    # The schedule scales both alike.
    trainer.lr_scheduler.step()
    factors = {round(g["lr"] / g["initial_lr"], 9) for g in trainer.optimizer.param_groups}
    assert len(factors) == 1


@pytest.mark.parametrize("embeddings", ["new", "all"])
def test_tied_embeddings_stay_tied(settings, embeddings):
    from transformers import MistralConfig, MistralForCausalLM

    config = parse_config(settings | {"adapter": {"embeddings": embeddings}})
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MistralForCausalLM(
        MistralConfig(vocab_size=40, num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=0, **shape)
    )
    model = choose_trainable(model, config, "lora", [38, 39])
    base = model.get_base_model()
    trained = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert [tuple(p.shape) for p in trained] == [(2, 32) if embeddings == "new" else (40, 32)]
    with torch.no_grad():
        trained[0][-1] = 7.0
    hidden, ids = torch.ones(1, 1, 32), torch.tensor([[39]])
    assert torch.equal(base.get_input_embeddings()(ids), torch.full((1, 1, 32), 7.0))
    assert base.get_output_embeddings()(hidden)[0, 0, 39].item() == pytest.approx(7 * 32)


@pytest.mark.parametrize("merge", ["16bit", "4bit"])
def test_added_tokens_are_learned_saved_merged_and_generated(settings, tmp_path, data_file, merge):
    """From <response> to <response|end>, with both rows of the embeddings and of the output layer trained."""
    from pyquant.generation import generate_text, load_for_inference

    settings["data"] |= {
        "prompt": "{prompt}<response>",
        "special_tokens": ["<response>", "<response|end>"],
        "end_token": "<response|end>",
        "eval": str(data_file),
    }
    settings["training"] |= {"max_steps": 80, "save_every": 80, "merge": merge, "learning_rate": 2e-2}
    settings["evaluation"] = {"classify": True, "before": True, "generate": 3}
    settings["evaluation"].pop("generate") if not _has_metrics() else None
    config = parse_config(settings)
    result = train(config)
    after, before = result.metrics["after"], result.metrics["before"]
    assert after["token_accuracy"] > 0.75 > before["token_accuracy"]
    assert after["accuracy"] >= 6 / 9
    adapter = load_file(result.folder / "adapter_model.safetensors")
    # The trained rows of both; PEFT saves the resized embeddings beside them.
    assert sorted(tuple(tensor.shape) for name, tensor in adapter.items() if "lora" not in name)[:2] == [
        (2, 64),
        (2, 64),
    ]

    options = {"temperature": 0.0, "chat_template": "never", "max_new_tokens": 8}
    loaded, tokenizer = load_for_inference(config.model.path, str(result.folder), "auto", "fp32")
    answer = generate_text(loaded, tokenizer, "red red<response>", **options)
    assert answer in ("yes", "no")  # ended by its own token
    trained = generate_text(result.model.eval(), result.tokenizer, "red red<response>", **options)
    assert answer == trained

    merged, tokenizer = load_for_inference(str(tmp_path / "run" / "merged"), precision="fp32")
    ids = torch.tensor([tokenizer("red blue<response>")["input_ids"]])
    assert ids.max() == len(tokenizer) - 2
    with torch.no_grad():
        theirs, ours = merged(ids).logits, result.model(ids).logits
    if merge == "4bit":
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    assert generate_text(merged, tokenizer, "red red<response>", **options) in ("yes", "no")


def _has_metrics():
    try:
        import rouge_score  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"method": "qlora"}, "quantization": {"method": "none"}}, r"training\.method is qlora, but"),
        ({"training": {"method": "partial"}}, "the section partial names nothing to train"),
        ({"training": {"method": "full", "merge": "16bit"}}, r"training\.merge is 16bit, but"),
        ({"training": {"method": "lora", "merge": "4bit"}}, r"training\.merge is 4bit, but"),
        (
            {"training": {"method": "partial"}, "partial": {"patterns": ["*.q_prj.*"]}},
            r"has \*\.q_prj\.\*, which matches",
        ),
        ({"training": {"method": "partial"}, "partial": {"last_layers": 3}}, "the model has 2 layers"),
    ],
)
def test_combinations_that_cannot_be_are_refused(settings, tmp_path, change, message):
    for section, values in change.items():
        settings[section] = settings.get(section, {}) | values
    with pytest.raises(ConfigError, match=message):
        train(parse_config(settings))
    assert not (tmp_path / "run").exists()


def test_auto_follows_the_quantization():
    assert resolve_method(parse_config({})) == "qlora"
    config = parse_config({"quantization": {"method": "none"}})
    assert resolve_method(config) == "lora"
    config = parse_config({"training": {"method": "lora"}})
    assert resolve_method(config) == "lora"
    assert config.quantization.method == "none"


def test_the_card_and_metrics_say_what_was_done(settings, data_file):
    from huggingface_hub import ModelCard

    settings["data"]["eval"] = str(data_file)
    result = train(parse_config(settings))
    card = ModelCard.load(result.folder / "README.md")
    assert card.data.library_name == "peft"
    assert "qlora" in card.data.tags
    assert card.data.base_model is None  # a path on this machine is no hub name
    scores = result.metrics["after"]
    assert f"| token accuracy |  | {scores['token_accuracy']:.4g} |" in card.text
    assert "learning_rate: 0.01" in card.text
    stored = json.loads((result.folder.parent / "metrics.json").read_text())
    assert stored["data"]["rows"] == 36
