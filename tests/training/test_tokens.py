import json

import pytest

from pyquant.training.config import DataConfig, parse_config
from pyquant.training.errors import ConfigError, DataError
from pyquant.training.models import load_tokenizer
from pyquant.training.prepare import prepare_data
from pyquant.training.tokens import IGNORED, add_tokens, encode_row, prompt_and_answer

pytest.importorskip("trl")

CHAT = [
    {"role": "user", "content": "red"},
    {"role": "assistant", "content": "yes yes"},
    {"role": "user", "content": "blue"},
    {"role": "assistant", "content": "no"},
]


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


def targets(row, tokenizer):
    """The text of each run of target tokens."""
    runs, last = [], None
    for index, label in enumerate(row["labels"]):
        if label != IGNORED:
            assert label == row["input_ids"][index]
            runs[-1:] = [[*runs[-1], label]] if last == index - 1 else [*runs[-1:], [label]]
            last = index
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("completion_only", [True, False])
def test_prompt_and_completion_as_trl_encodes_them(tokenizer, tiny_model, tmp_path, completion_only):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": "red blue", "completion": " yes"}, {"prompt": "", "completion": "the cat sat"}]
    rows += [{"prompt": "ca", "completion": "t"}]  # the tokens merge across the boundary: the merged one is a target
    theirs = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=SFTConfig(output_dir=str(tmp_path), completion_only_loss=completion_only, report_to="none", use_cpu=True),
        train_dataset=Dataset.from_list(rows[:2]),
        processing_class=tokenizer,
    ).train_dataset
    config = DataConfig(chat_template="never")
    ours = [encode_row(row, tokenizer, config, completion_only) for row in rows]
    for row, reference in zip(ours, theirs, strict=False):
        assert row["input_ids"] == reference["input_ids"]
        assert row["labels"] == reference["labels"]
    assert targets(ours[2], tokenizer)[0].endswith("cat</s>")


def test_messages_are_trained_on_where_the_assistant_speaks(tokenizer):
    row = encode_row({"messages": CHAT}, tokenizer, DataConfig())
    whole = tokenizer.decode(row["input_ids"])
    assert whole == "<s>[user] red[assistant] yes yes</s>[user] blue[assistant] no</s>"
    assert targets(row, tokenizer) == [" yes yes</s>", " no</s>"]
    everything = encode_row({"messages": CHAT}, tokenizer, DataConfig(), completion_only=False)
    assert everything["labels"] == everything["input_ids"]
    assert prompt_and_answer({"messages": CHAT}, tokenizer, DataConfig()) == (
        "[user] red[assistant] yes yes</s>[user] blue [assistant]",
        "no",
    )
    # A template that begins the answer as it asks for it: the header is no target.
    tokenizer.chat_template = tokenizer.chat_template.replace("[{{ m", " [{{ m")
    assert targets(encode_row({"messages": CHAT}, tokenizer, DataConfig()), tokenizer) == [" yes yes</s>", " no</s>"]


def test_a_template_that_rewrites_the_past_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="renders a conversation's beginning otherwise"):
        encode_row({"messages": CHAT}, tokenizer, DataConfig())
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        encode_row({"messages": CHAT}, tokenizer, DataConfig())


def test_added_tokens_are_single_and_end_the_completion(tokenizer):
    config = DataConfig(
        prompt="{prompt}<response>", special_tokens=["<response>", "<response|end>"], end_token="<response|end>"
    )
    size = len(tokenizer)
    assert add_tokens(tokenizer, config) == ["<response>", "<response|end>"]
    assert len(tokenizer) == size + 2
    row = encode_row({"prompt": "red<response>", "completion": " yes"}, tokenizer, config)
    assert row["input_ids"][-1] == tokenizer.convert_tokens_to_ids("<response|end>")
    assert row["input_ids"].count(size) == 1
    assert targets(row, tokenizer) == [" yes<response|end>"]
    assert add_tokens(tokenizer, config) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt": "{q}<response>"},
            r"data\.prompt has the token <response>, which is not in the tokenizer; add",
        ),
        ({"end_token": "<|end|>"}, r"data\.end_token has the token <\|end\|>, which is not in the tokenizer"),
        ({"special_tokens": ["<a> "]}, r"data\.special_tokens holds '<a> '"),
    ],
)
def test_a_template_token_that_is_missing_is_named(tokenizer, options, message):
    with pytest.raises(ConfigError, match=message):
        add_tokens(tokenizer, DataConfig(**options))


def test_tags_can_be_plain_text(tokenizer):
    assert add_tokens(tokenizer, DataConfig(prompt="<b>{q}</b> a < b", special_tokens=[])) == []
    assert add_tokens(tokenizer, DataConfig(prompt="<s>{q} a < b > c")) == []


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ([{"role": "user", "content": "x"}], "no message of the assistant"),
        ([{"role": "assistant", "text": "x"}], "a message without role and content"),
    ],
)
def test_bad_messages_are_named(tiny_model, tmp_path, tokenizer, messages, message):
    file = tmp_path / "d.jsonl"
    rows = [{"messages": CHAT}, {"messages": messages}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = parse_config({"data": {"train": str(file)}})
    with pytest.raises(DataError, match=rf"row 2 of .*d\.jsonl has {message} in column messages"):
        prepare_data(config, tokenizer)
