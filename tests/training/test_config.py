import re
from pathlib import Path

import pytest
import yaml

from pyquant.training.config import describe_keys, keys, load_config, parse_config, to_dict
from pyquant.training.errors import ConfigError


def test_every_key_survives_a_round_trip():
    config = parse_config({"adapter": {"r": 4, "target_modules": ["q_proj"]}, "training": {"max_steps": 7}})
    assert parse_config(to_dict(config)) == config
    assert config.adapter.target_modules == ["q_proj"]


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("training:\n  learning_rate: 2e-4\n  epochs: 3\nadapter:\n")
    config = load_config(file, ["training.epochs=0.5", "data.eval=null", "quantization.skip=[lm_head, q_proj]"])
    assert config.training.learning_rate == 2e-4  # YAML 1.1 reads this as text
    assert config.training.epochs == 0.5
    assert config.data.eval is None
    assert config.quantization.skip == ["lm_head", "q_proj"]


@pytest.mark.parametrize(
    ("tree", "overrides", "message"),
    [
        ({"training": {"learning_rat": 1}}, [], r"training\.learning_rat .* did you mean training\.learning_rate\?"),
        ({"trainig": {"epochs": 1}}, [], r"trainig .* section.* did you mean training|did you mean training\.epochs"),
        ({}, ["learning_rate=1"], r"did you mean training\.learning_rate\?"),
        ({"adapter": {"rank": 8}}, [], r"adapter\.rank is not .* did you mean adapter\.r\?"),
        ({"training": {"batch_size": "four"}}, [], r"batch_size is four \(text\); .* a whole number or auto"),
        ({"data": {"mix": {"a.jsonl": "much"}}}, [], r"data\.mix\.a\.jsonl is much .* must be a number"),
        ({"data": {"mix": ["a.jsonl"]}}, [], r"data\.mix .* must be a section of names and numbers"),
        ({"training": {"batch_size": 2.5}}, [], r"training\.batch_size is 2\.5 \(a number\)"),
        ({"training": {"batch_size": True}}, [], r"training\.batch_size is true"),
        ({"training": {"batch_size": 0}}, [], r"training\.batch_size is 0; it must be at least 1"),
        ({"data": {"eval_fraction": 1.5}}, [], r"data\.eval_fraction is 1\.5; it must be below 1"),
        ({"adapter": {"dropout": 1.5}}, [], r"adapter\.dropout is 1\.5; it must be below 1"),
        ({}, ["adapter.dropout=.nan"], r"adapter\.dropout is nan; it must be at least 0"),
        ({"training": {"save_every": "epochs"}}, [], r"save_every is epochs \(text\); .* a whole number or epoch"),
        ({"training": {"eval_every": -1}}, [], r"training\.eval_every is -1; it must be at least 0"),
        ({"training": {"batch_size": None}}, [], r"training\.batch_size is null"),
        ({"quantization": {"method": "int8"}}, [], r"quantization\.method is int8; .* nf4, fp4, none"),
        ({"quantization": {"blocksize": 60}}, [], r"quantization\.blocksize is 60; .* 64"),
        ({"quantization": {"double_quant": "yes please"}}, [], r"double_quant .* true or false"),
        ({"adapter": {"target_modules": [1]}}, [], r"target_modules"),
        ({"training": 3}, [], r"training must be a section"),
        ([1], [], r"sections model, quantization"),
        ({}, ["training.epochs"], r"section\.key=value"),
        ({}, ["training.epochs=[1"], r"training\.epochs is not valid YAML"),
    ],
)
def test_mistakes_are_named(tree, overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse_config(tree, overrides)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist"):
        load_config(tmp_path / "absent.yaml")
    file = tmp_path / "broken.yaml"
    file.write_text("a: [1\nb: 2\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML \(line 2\)"):
        load_config(file)


def test_the_documented_sections_are_valid():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        parse_config(yaml.safe_load(block))
    named = set(re.findall(r"`((?:model|quantization|adapter|partial|data|training|evaluation)\.\w+)[:`]", text))
    assert len(named) > 10
    assert named <= set(keys())


def test_every_key_is_described():
    text = describe_keys()
    assert all(f"{key} = " in text for key in keys())
