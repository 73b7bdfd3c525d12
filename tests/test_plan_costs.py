"""The fit of the cost model, on times that follow it."""

import json

import pytest

from benchmarks import plan_costs

COSTS = {"launch": 1.0, "busy": 2.0} | {
    f"{tile} {part}": value
    for tile, values in {
        32: (0.2, 0.25, 1.0, 0.5),
        64: (0.3, 0.3, 1.5, 1.0),
        128: (0.4, 0.5, 2.0, 2.0),
        256: (0.6, 0.7, 3.0, 4.0),
    }.items()
    for part, value in zip(("step forward", "step dx", "tile", "exchange"), values, strict=True)
}
COSTS |= {"32 teams": 0.86, "64 teams": 0.9, "128 teams": 0.94}


def cases():
    found = []
    for n, k in ((4096, 4096), (14336, 4096), (1024, 4096)):
        for direction in ("forward", "dx"):
            for m in (32, 100, 256, 1024, 4096):
                for tile, split in plan_costs.plans(n, k, direction, m, most=8):
                    case = {"n": n, "k": k, "direction": direction, "m": m, "tile": tile, "split": split}
                    found.append(case | {"us": plan_costs.predict(COSTS, case)})
    return found


def test_turns_are_those_of_the_kernel():
    assert plan_costs.turns(128, 1) == (1, 0)
    assert plan_costs.turns(448, 1) == (4, 0)
    assert plan_costs.turns(448, 2) == (3, 1)  # three whole turns of 132, and 52 tiles on 66 clusters
    assert plan_costs.turns(32, 4) == (0, 2)  # 30 clusters
    assert plan_costs.turns(336, 2) == (0, 6)  # a rest of 72 tiles is too much for 66 clusters: all are shared


def test_the_fit_finds_the_costs_behind_the_times():
    fitted = plan_costs.fit(cases())
    assert fitted == pytest.approx(COSTS, rel=1e-6)
    assert plan_costs.misses(fitted, cases()) == []


def test_a_model_that_chooses_badly_is_told():
    wrong = COSTS | {"256 step forward": 0.1}
    found = plan_costs.misses(wrong, cases())
    assert found
    assert all(chosen["us"] > fastest["us"] and chosen["tile"] == 256 for fastest, chosen in found)


def test_kept_times_are_fitted_anywhere(tmp_path, capsys):
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"cases": cases()}))
    assert plan_costs.main(["--times", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "launch 1.00  busy 2.00" in printed
    assert "tile 256  step forward 0.600  step dx 0.700  tile 3.000  exchange 4.000" in printed


def test_without_a_gpu_it_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert plan_costs.main([]) == 1
    assert "compute capability 9.0" in capsys.readouterr().err
