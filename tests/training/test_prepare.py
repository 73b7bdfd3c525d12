import json

import pytest
import torch

from pyquant.training.config import parse_config
from pyquant.training.errors import ConfigError, DataError
from pyquant.training.models import load_base, load_tokenizer
from pyquant.training.prepare import prepare_data
from pyquant.training.tokens import IGNORED

pytest.importorskip("trl")


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


@pytest.fixture
def write(tmp_path):
    def call(name, rows):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    return call


def prepare(tokenizer, **data):
    return prepare_data(parse_config({"data": {"chat_template": "never", **data}}), tokenizer)


def test_a_mixture_has_its_parts_and_every_form(write, tokenizer):
    train = write("task.jsonl", [{"prompt": f"q{i}", "completion": "yes"} for i in range(60)])
    general = write("general.jsonl", [{"text": f"the cat {i}"} for i in range(7)])
    chats = write("chat.jsonl", [{"messages": [{"role": "assistant", "content": f"c{i}"}]} for i in range(500)])
    prepared = prepare(tokenizer, train=train, mix={general: 0.1, chats: 0.3})
    assert prepared.report.mixed_in == {general: 10, chats: 30}
    texts = [tokenizer.decode(ids) for ids in prepared.train["input_ids"]]
    assert len(texts) == 100
    assert [f"<s>q{i}yes</s>" for i in range(60)] == texts[:60]
    # Seven rows are drawn once each before any is drawn again.
    drawn = texts[60:70]
    assert set(drawn) == set(drawn[:7]) == {f"<s>the cat {i}</s>" for i in range(7)}
    assert len(set(texts[70:])) == 30
    again = prepare(tokenizer, train=train, mix={general: 0.1, chats: 0.3})
    assert again.train["input_ids"][:] == prepared.train["input_ids"][:]


@pytest.mark.parametrize("parts", [{"a": 0.6, "b": 0.4}, {"a": 0.0}])
def test_parts_that_leave_nothing_are_refused(write, tokenizer, parts):
    with pytest.raises(ConfigError, match=r"the parts in data\.mix add up to"):
        prepare(tokenizer, train=write("t.jsonl", [{"text": "red"}]), mix=parts)


@pytest.mark.parametrize("drop", [False, True])
def test_duplicates_and_leaks_are_counted_and_dropped_where_asked(write, tokenizer, drop):
    train = write("t.jsonl", [{"prompt": p, "completion": "yes"} for p in "abbbcd"])
    held_out = write("e.jsonl", [{"prompt": "d", "completion": "yes"}, {"prompt": "a", "completion": "no"}])
    prepared = prepare(tokenizer, train=train, eval=held_out, deduplicate=drop)
    assert (prepared.report.duplicates, prepared.report.leaked) == (2, 1)
    assert [tokenizer.decode(ids)[3] for ids in prepared.train["input_ids"]] == list("abc" if drop else "abbbcd")
    assert len(prepared.eval) == 2


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_long_rows_are_counted(write, tokenizer, too_long):
    word = tokenizer("red")["input_ids"][1:]
    assert len(word) == 1
    # One start token, n words, one end token; the last row's completion lies behind the cut.
    rows = [{"prompt": "red " * n, "completion": "yes"} for n in (1, 2, 30)] + [
        {"prompt": "", "completion": "red " * 30}
    ]
    prepared = prepare(tokenizer, train=write("t.jsonl", rows), max_length=12, too_long=too_long)
    report = prepared.report
    lengths = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in rows]
    assert report.too_long == sum(length > 12 for length in lengths) == 2
    assert (report.shortest, report.longest) == (min(lengths), max(lengths))
    assert report.without_target == (1 if too_long == "cut" else 0)
    assert report.rows == len(prepared.train) == (3 if too_long == "cut" else 2)
    assert report.longest_kept == max(map(len, prepared.train["input_ids"])) <= 12
    assert report.tokens == sum(map(len, prepared.train["input_ids"]))
    assert report.targets == sum(label != IGNORED for labels in prepared.train["labels"] for label in labels)
    config = parse_config({"data": {"max_length": 12, "too_long": too_long}}).data
    done = "cut" if too_long == "cut" else "dropped"
    assert f"2 rows are longer than data.max_length (12): {done}" in report.lines(config)


def test_nothing_left_to_predict_is_an_error(write, tokenizer):
    rows = [{"prompt": "red " * 30, "completion": "yes"}]
    with pytest.raises(DataError, match=r"no row of data\.train has a token to predict within data\.max_length \(12\)"):
        prepare(tokenizer, train=write("t.jsonl", rows), max_length=12)


def test_packed_rows_do_not_see_each_other(settings, tiny_model, tokenizer):
    """The loss of packed sequences is the mean over the same rows one by one, which nothing shares."""
    from rich.console import Console

    from pyquant.training.methods import choose_trainable
    from pyquant.training.train import build_trainer

    settings["data"] |= {"packing": True, "max_length": 32}
    config = parse_config(settings)
    prepared = prepare_data(config, tokenizer)
    base = load_base(config.model, torch.device("cpu"))
    total, count = 0.0, 0
    with torch.no_grad():
        for row in prepared.train:
            logits = base(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
            for position, label in enumerate(row["labels"][1:]):
                if label != IGNORED:
                    total -= logits[position, label].item()
                    count += 1
    model = choose_trainable(base, config, "lora")
    options = {"dtype": torch.float32, "batch_size": 3}
    trainer = build_trainer(config, model, tokenizer, prepared.train, None, Console(), **options)
    packed = trainer.train_dataset
    assert len(packed) < 0.4 * len(prepared.train)
    losses = torch.zeros(())
    for at in range(0, len(packed), 3):
        batch = trainer.data_collator([packed[i] for i in range(at, min(at + 3, len(packed)))])
        losses += trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(count)).detach()
    assert losses.item() == pytest.approx(total / count, rel=1e-5)
