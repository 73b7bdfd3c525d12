"""The commands as a user runs them, on the tiny model."""

import json

import pytest
import yaml

from pyquant.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line; returns exit code, standard output and standard error."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["pyquant", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(autouse=True)
def _wide_console(monkeypatch):
    monkeypatch.setattr("pyquant.cli._console", __import__("rich.console").console.Console(width=200))


def test_train_with_overrides(run, settings, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(settings))
    code, out, err = run("train", file, "training.max_steps=2", f"training.output_dir={tmp_path / 'other'}")
    assert code == 0, err
    assert "step 2/2" in out
    assert json.loads((tmp_path / "other" / "metrics.json").read_text())["steps"] == 2


def test_eval_classifies_with_the_adapter(run, tiny_model, adapter, data_file, tmp_path):
    common = ("eval", tiny_model, data_file, "--chat-template", "never", "--precision", "fp32", "--classify")
    results = []
    for words in ((), ("--adapter", adapter)):
        code, _, err = run(*common, *words, "--output", tmp_path / "r.json")
        assert code == 0, err
        results.append(json.loads((tmp_path / "r.json").read_text()))
    assert results[0]["labels"] == [" no", " yes"]
    assert results[1]["perplexity"] < 0.5 * results[0]["perplexity"]
    assert results[1]["accuracy"] >= 6 / 9  # as many as always answering no
    code, _, err = run(*common, "--labels", "no,maybe")
    assert (code, err) == (2, "Error: the rows have the completion ' yes', which is none of the labels; add it.\n")


def test_chat_answers_line_by_line(run, tiny_model, monkeypatch):
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("red\n\n/reset\nred\n/what\n/exit\nblue\n"))
    code, out, err = run("chat", tiny_model, "--precision", "fp32", "-n", 4)
    assert code == 0, err
    first, second = out.splitlines()
    assert first == second
    assert "/what is no command; there are /reset and /exit." in err


def test_generate_prints_the_answer_alone(run, tiny_model, adapter):
    words = ("generate", tiny_model, "red blue", "-a", adapter, "--chat-template", "never", "--precision", "fp32")
    code, out, _ = run(*words)
    assert code == 0
    assert out.strip() in ("yes", "no")


def test_merge_says_the_base(run, tiny_model, adapter, tmp_path):
    code, out, err = run("merge", tiny_model, adapter, tmp_path / "m", "--base", "4bit", "--precision", "fp32")
    assert code == 0, err
    assert "dequantized FP4 weights" in out


def test_info(run, tiny_model):
    code, out, _ = run("info", tiny_model)
    assert code == 0
    assert "4-bit, double quantization" in out
    code, out, _ = run("info")
    assert code == 0
    assert "torch:" in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("train", "absent.yaml"), 2, "the configuration file absent.yaml does not exist"),
        (("train", "{config}", "training.max_step=3"), 2, "did you mean training.max_steps?"),
        (("train", "{config}", "data.train=absent.csv"), 1, "absent.csv does not exist"),
        (("train", "{config}", "--config", "{data}"), 2, "is not valid YAML; correct it"),
        (("train", "{config}", "data.prompt=a {{prompt"), 2, "data.prompt is not a template"),
        (("train", "{config}", "data.eval_fraction=1.5"), 2, "data.eval_fraction is 1.5; it must be below 1"),
        (("train", "{config}", "adapter.dropout=1.5"), 2, "adapter.dropout is 1.5; it must be below 1"),
        (("train", "{config}", "data.completion=label"), 1, "its columns are prompt, completion"),
        (("train", "{config}", "training.resume=./absent"), 2, "holds no checkpoint"),
        (("train", "{config}", "model.path=./absent"), 1, "the model folder ./absent does not exist"),
        (("eval", "./absent", "{data}"), 1, "the model folder ./absent does not exist"),
        (("generate", "{model}", " "), 2, "the prompt is empty"),
        (("generate", "{model}", "x", "--adapter", "./absent"), 1, "./absent has no adapter_config.json"),
        (("merge", "{model}", "./absent", "out"), 1, "./absent has no adapter_config.json"),
        (("info", "./absent"), 1, "the model folder ./absent does not exist"),
        (("quantize", "{model}", "out", "--blocksize", "60"), 2, "quantization.blocksize is 60"),
        (("demo", "--assets", "./absent"), 2, "the assets folder absent does not exist"),
    ],
)
def test_mistakes_end_with_one_sentence(run, settings, tiny_model, data_file, tmp_path, words, code, message):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings))
    found, _, err = run(*(word.format(config=config, model=tiny_model, data=data_file) for word in words))
    assert found == code
    assert message in err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1


def test_quantize_says_what_stays_dense(run, tiny_model, tmp_path):
    options = ("--skip", "lm_head", "--skip", "v_proj", "--format", "pyquant", "--max-shard-gb", "0.001")
    code, out, err = run("quantize", tiny_model, tmp_path / "q", *options)
    assert code == 0, err
    assert "left dense: model.layers.*.self_attn.v_proj (2 × Linear, 0.0 MiB): skip names it ('v_proj')" in out
    assert "12 layers in 4 bits" in out
    entry = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "pyquant"
    assert (tmp_path / "q" / "tokenizer.json").is_file()
    code, _, err = run("quantize", tiny_model, tmp_path / "q")
    assert code == 2
    assert "q exists and is not empty; give a new folder for the 4-bit model." in err
