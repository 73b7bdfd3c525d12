import json

import pytest

from pyquant.training.config import DataConfig
from pyquant.training.data import load_rows, load_splits, render_prompt, row_prompt
from pyquant.training.errors import ConfigError, DataError
from pyquant.training.models import load_tokenizer
from pyquant.training.tokens import prompt_and_answer

pytest.importorskip("datasets")


def write(tmp_path, rows, name="d.jsonl"):
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def test_all_formats_give_the_same_rows(tmp_path):
    import pandas

    rows = [{"prompt": "a, b", "completion": "é"}, {"prompt": 'say "x"', "completion": "y"}]
    frame = pandas.DataFrame(rows)
    frame.to_csv(tmp_path / "d.csv", index=False)
    frame.to_csv(tmp_path / "d.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "d.parquet")
    expected = load_rows(write(tmp_path, rows)).to_list()
    assert expected == rows
    for name in ("d.csv", "d.tsv", "d.parquet"):
        assert load_rows(str(tmp_path / name)).to_list() == rows


def test_instruction_rows_and_templates(tmp_path):
    rows = [
        {"instruction": "Do", "input": "this", "output": "done"},
        {"instruction": "Go", "input": "", "output": "ok"},
    ]
    file = write(tmp_path, rows)
    assert load_rows(file)["prompt"][:] == ["Do\n\nthis", "Go"]
    assert load_rows(file)["completion"][:] == ["done", "ok"]
    config = DataConfig(prompt="{input}: {instruction}?", completion="input")
    with pytest.raises(DataError, match=r"row 2 .* has an empty input"):
        load_rows(file, config)
    config.completion = "output"
    assert load_rows(file, config)["prompt"][:] == ["this: Do?", ": Go?"]


def test_text_rows(tmp_path):
    assert load_rows(write(tmp_path, [{"text": "x", "id": 1}])).to_list() == [{"text": "x"}]


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        ([{"question": "a", "answer": "b"}], {}, r"none of the columns prompt, .* its columns are question, answer"),
        ([{"prompt": "a", "answer": "b"}], {}, r"no column completion or output; its columns are prompt, answer"),
        ([{"prompt": "a", "answer": "b"}], {"completion": "anser"}, r"no column anser, which data\.completion names"),
        ([{"prompt": "a", "completion": "b"}], {"prompt": "{q}"}, r"no column q, which data\.prompt names"),
        ([{"prompt": "a", "completion": 3}], {}, r"row 1 of .* has a int in column completion"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "c"}], {}, r"row 2 of .* has nothing in column completion"),
        ([], {}, "is empty"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, rows, config, message):
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path, rows), DataConfig(**config))


@pytest.mark.parametrize(
    ("prompt", "message"), [("{q", r"data\.prompt is not a template"), ("q", r"data\.prompt names no column")]
)
def test_a_broken_template_is_the_configurations_mistake(tmp_path, prompt, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_rows(write(tmp_path, [{"prompt": "a", "completion": "b"}]), DataConfig(prompt=prompt))
    assert error.value.exit_code == 2


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl does not exist"):
        load_rows(str(tmp_path / "absent.jsonl"))
    (tmp_path / "d.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"ends in \.xlsx"):
        load_rows(str(tmp_path / "d.xlsx"))
    (tmp_path / "d.jsonl").write_text('{"prompt": ')
    with pytest.raises(DataError, match="cannot be read as json"):
        load_rows(str(tmp_path / "d.jsonl"))
    (tmp_path / "d.csv").write_text("prompt,completion\n")
    with pytest.raises(DataError, match="has no rows"):
        load_rows(str(tmp_path / "d.csv"))
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({"prompt": [], "completion": []}, dtype=str).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet has no rows; training needs at least one"):
        load_rows(str(tmp_path / "d.parquet"))
    (tmp_path / "d.parquet").write_text("PAR1")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_rows(str(tmp_path / "d.parquet"))


def test_held_out_rows_are_not_trained_on(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(50)]
    config = DataConfig(train=write(tmp_path, rows), eval_fraction=0.2)
    train, held_out = load_splits(config, seed=3)
    assert len(held_out) == 10
    assert set(train["prompt"]) | set(held_out["prompt"]) == {row["prompt"] for row in rows}
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert load_splits(config, seed=3)[1]["prompt"][:] == held_out["prompt"][:]
    config.limit, config.eval_limit = 5, 3
    limited = load_splits(config, seed=3)
    assert [len(part) for part in limited] == [5, 3]
    assert limited[1]["prompt"][:] == held_out["prompt"][:3]


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"instruction": "say", "input": "red"}, {}),
        ({"instruction": "say", "input": ""}, {}),
        ({"prompt": "red"}, {"chat_template": "never"}),
        ({"act": "cat", "other": "x"}, {"prompt": "As {act}:", "completion": "answer"}),
    ],
)
def test_a_rows_prompt_is_the_one_that_is_trained_on(tiny_model, tmp_path, row, settings):
    tokenizer = load_tokenizer(str(tiny_model))
    config = DataConfig(**settings)
    file = write(tmp_path, [row | {config.completion or "output": "yes"}])
    prompt, _ = prompt_and_answer(load_rows(file, config)[0], tokenizer, config)
    assert row_prompt(row, tokenizer, config) == prompt


def test_a_row_without_a_prompt_is_refused(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    with pytest.raises(DataError, match=r"the row has the columns a, b, which make no prompt; set data\.prompt"):
        row_prompt({"a": "x", "b": "y"}, tokenizer)
    with pytest.raises(DataError, match=r"the row has no column act, which data\.prompt names"):
        row_prompt({"a": "x"}, tokenizer, DataConfig(prompt="{act}"))


def test_the_start_token_comes_once(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    text = render_prompt("red", tokenizer)
    assert text == "[user] red [assistant]"
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 1
    assert render_prompt("red", tokenizer, DataConfig(chat_template="never")) == "red"
    assert render_prompt("red", tokenizer, DataConfig(prompt="{x}")) == "red"
    tokenizer.chat_template = None
    assert render_prompt("red", tokenizer) == "red"
    with pytest.raises(DataError, match="no chat template"):
        render_prompt("red", tokenizer, DataConfig(chat_template="always"))
