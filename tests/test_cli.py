import re

import pytest
from typer.testing import CliRunner

from pyquant.cli import app
from pyquant.training.config import keys

COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)


def help_of(*words):
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def test_every_command_is_listed():
    text = help_of()
    names = ["train", "evaluate", "generate", "merge", "quantize", "info", "demo"]
    assert {name if name != "evaluate" else "eval" for name in names} <= set(COMMANDS)
    assert all(re.search(rf"│ {command} +\w", text) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_parameter_is_explained(command):
    text = help_of(command)
    options = [line for line in text.splitlines() if re.match(r"│ +\*? *(--|\w)", line)]
    assert options
    for line in options:
        assert re.search(r"> .*\w+ \w+|\] .*\w+ \w+|--help|(--\S+ +)+\S+ \w+|KEY=VALUE", line), line


def test_train_lists_every_key():
    text = help_of("train")
    assert all(key in text for key in keys())


def test_a_missing_argument_is_a_usage_error():
    assert CliRunner().invoke(app, ["train"]).exit_code == 2
    assert CliRunner().invoke(app, ["no-such-command"]).exit_code == 2
