import json

import pytest

from pyquant.demo import tasks
from pyquant.demo.tasks import write_chats, write_general, write_questions, write_roles, write_task
from pyquant.training.errors import ConfigError

DIALOGUES = [
    *[("trivia", [f"Question {i}?", f"Answer {i}."]) for i in range(120)],
    *[("trivia", [f"question {i}?", f"Another {i}."]) for i in range(120)],
    *[("trivia", ["Question 1?", "Answer 1."])] * 5,  # repeated rows
    ("coding", ["Sort?", "def sort(): ..."]),
    ("computers", ["What is it?", "One.", "Two.", "Three."]),  # answers, not turns
    ("conversations", ["Hello", "Hi", "How are you?", "Fine.", "Good."]),
    ("tech_support", ["It is broken.", "Repair it."]),
]


@pytest.fixture(autouse=True)
def few_dialogues(monkeypatch):
    monkeypatch.setattr(tasks, "dialogues", lambda assets=None: DIALOGUES)


def read(files):
    return [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]


def test_no_held_out_question_is_trained_on(tmp_path):
    train, held_out = read(write_questions(tmp_path))
    questions = {row["input"].lower() for row in train}
    assert len(held_out) == 100 == len({row["input"].lower() for row in held_out})
    assert not questions & {row["input"].lower() for row in held_out}
    assert len(questions) == 21
    assert {tuple(row) for row in train} == {("instruction", "input", "output")}
    assert not any(row["output"].startswith("Another") for row in held_out)  # the first of two answers
    assert len({json.dumps(row) for row in train}) == len(train)
    assert read(write_questions(tmp_path)) == [train, held_out]


def test_roles_name_the_subject(tmp_path):
    train, held_out = read(write_roles(tmp_path))
    rows = train + held_out
    assert {row["act"] for row in rows} == {"trivia", "tech support"}
    assert {"act": "tech support", "prompt": "It is broken.\nRepair it."} in rows
    assert len(rows) == 241
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_the_assistant_has_the_last_word(tmp_path):
    train, held_out = read(write_chats(tmp_path))
    chats = [row["messages"] for row in train + held_out]
    assert max(map(len, chats)) == 4  # the fifth line has no answer
    assert all([m["role"] for m in chat] == ["user", "assistant"] * (len(chat) // 2) for chat in chats)
    assert not {c["messages"][0]["content"].lower() for c in train} & {
        c["messages"][0]["content"].lower() for c in held_out
    }


def test_a_task_names_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("PYQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(tasks, "model_folder", lambda assets: tmp_path / "model")
    monkeypatch.setattr(tasks, "news_passages", lambda count, assets: ["One.", "Two."])
    keys = write_task("chats")
    assert keys["model.path"] == str(tmp_path / "model")
    assert keys["data.train"] == str(tmp_path / "chats" / "train.jsonl")
    assert read([tmp_path / "general" / "news.jsonl"]) == [[{"text": "One."}, {"text": "Two."}]]
    assert keys["evaluation.general"] == str(write_general(tmp_path / "general"))
    monkeypatch.setenv("PYQUANT_ASSETS", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"assets folder .* does not exist"):
        write_task("chats")


@pytest.mark.assets
def test_the_dialogues_are_chatterbots(fetched):
    from pyquant.demo import assets

    found = fetched(assets.dialogues)
    assert len(found) == 2026
    assert ("science", ["what is chemistry", "the science of mixing chemicals."]) in found
