"""The benchmark of loading, at its smallest."""

import json

import pytest

from benchmarks import loading


def test_it_measures_three_ways_to_load(tmp_path, capsys):
    output = tmp_path / "loading.json"
    assert loading.main(["--small", "--layers", "2", "--device", "cpu", "--repeats", "1", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(output.read_text())
    # Two layers of 2 · 256² + 2 · 256² (all heads have keys and values) + 3 · 256 · 704, embeddings and norms.
    linear = 2 * (4 * 256 * 256 + 3 * 256 * 704)
    assert document["bytes"] == 2 * (linear + 2 * 512 * 256 + (2 * 2 + 1) * 256)
    assert list(document["rows"]) == ["read", "16-bit", "4-bit"]
    assert all(row["seconds"] > 0 and row["peak_bytes"] is None for row in document["rows"].values())
    assert "4-bit " in printed
    assert document["provenance"]["arguments"]["layers"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--model", "nowhere"], "nowhere holds no .safetensors files"), (["--layers", "0"], "are at least 1")],
)
def test_bad_arguments_are_told(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        loading.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
