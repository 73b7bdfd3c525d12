"""What the README tells a newcomer to type does work, on the tiny model in the place of Mistral-7B."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest

from pyquant.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
HUB_NAME = "mistralai/Mistral-7B-v0.3"
CHAT_NAME = "mistralai/Mistral-7B-Instruct-v0.3"
ROWS = [{"prompt": f"{a} {b}", "completion": " yes" if a == b else " no"} for a in "abc" for b in "abc"]


def block(language):
    """The one fenced block of the README in a language."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return text


def test_the_drop_in_runs_as_written(tiny_model, capsys):
    code = block("python")
    assert code.count(HUB_NAME) == 1
    names = {}
    exec(code.replace(HUB_NAME, str(tiny_model)), names)
    assert "14 linear layers in 4 bits" in capsys.readouterr().out
    layer = names["model"].base_model.model.model.layers[0].mlp.down_proj
    assert type(layer).__name__ == "LoraLinear4bit"


def test_the_commands_run_as_written(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    config = block("yaml").replace(HUB_NAME, str(tiny_model)).replace("max_steps: 100", "max_steps: 2")
    Path("run.yaml").write_text(config, encoding="utf-8")
    for line in block("sh").splitlines():
        line = line.replace(HUB_NAME, str(tiny_model)).replace(CHAT_NAME, str(tiny_model))
        monkeypatch.setattr("sys.argv", shlex.split(line))
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\n"))
        try:
            main()
        except SystemExit as end:
            if end.code:
                pytest.fail(f"{line}: exit code {end.code}\n{capsys.readouterr().err}")
    assert Path("runs/first/adapter/adapter_config.json").is_file()
    assert Path("runs/first/loss.png").is_file()
    assert Path("merged/model.safetensors").is_file()
    assert Path("in-4-bit/model.safetensors").is_file()


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_are_targets_of_the_makefile(target):
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    assert f"make {target}\n" in README
    assert re.search(rf"^{target}: ", makefile, re.MULTILINE)


def test_every_link_leads_to_a_file():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (Path(__file__).parents[2] / target).exists()] == []


def test_the_drivers_python_runs_as_written(tiny_model, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"What is {i}?", "input": "A stone.", "output": "yes"} for i in range(8)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {"model": {"path": str(tiny_model)}, "data": {"train": "train.jsonl"}}
    Path("run.yaml").write_text(json.dumps(config), encoding="utf-8")
    exec(code.replace("max_steps=100", "max_steps=1"), {})
    assert capsys.readouterr().out.rstrip().endswith(("True", "False"))
    assert Path("runs/pyquant/metrics.json").is_file()
