"""``python -m benchmarks.plan_costs``: times plans of linear_wgmma on a Hopper GPU and fits the cost model to them.

Prints the constants that belong into `wgmma_plan` (csrc/dispatch/linear_plan.cpp), and where the fitted model would not
choose the fastest plan. ``--output`` keeps the times; ``--times FILE`` fits to times kept before, on any machine.
"""

import argparse
import json
import math
import os
import sys
from collections import defaultdict

import numpy as np

from pyquant.bench.shapes import linear_shapes

TILES = (32, 64, 128, 256)
ROWS = (32, 64, 128, 256, 512, 1024, 2048)
# Clusters of 1 … 8 of these blocks that an H200 was seen to hold at a time: they stay within a GPC.
CLUSTERS = {1: 132, 2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 7: 15, 8: 15}
TILE_W, STEP = 128, 64
TEAM_TILES = (32, 64, 128)  # for which two teams of consumers share the steps of a block with one turn


def turns(tiles: int, split: int) -> tuple[int, int]:
    """Turns of whole tiles, and of tiles that clusters of `split` blocks share, as linear_wgmma takes them."""
    clusters = CLUSTERS[split]
    if split == 1:
        return math.ceil(tiles / clusters), 0
    rounds = tiles // (clusters * split)
    if tiles - rounds * clusters * split > clusters:
        rounds = 0
    return rounds, math.ceil((tiles - rounds * clusters * split) / clusters)


def terms(case: dict, teams: dict[int, float]) -> tuple[float, int, float, float]:
    """How many steps, tiles (or parts of one) and exchanges one block goes through, and on what part of the
    multiprocessors there is a block. Steps of teams count for what they take of others, and exchanges of more than two
    parts for what they take more.
    """
    columns, reduction = (case["n"], case["k"]) if case["direction"] == "forward" else (case["k"], case["n"])
    tiles = math.ceil(case["m"] / case["tile"]) * math.ceil(columns / TILE_W)
    rounds, shared = turns(tiles, case["split"])
    steps = math.ceil(reduction / STEP)
    total = rounds * steps + shared * math.ceil(steps / case["split"])
    if rounds == (1 if case["split"] == 1 else 0) and steps >= 2 * case["split"]:
        total *= teams.get(case["tile"], 1.0)
    clusters = CLUSTERS[case["split"]]
    busy = CLUSTERS[1] if shared and rounds else min(tiles, clusters) * case["split"]
    # A block sends what it does not add up itself.
    return total, rounds + shared, shared * 2 * (case["split"] - 1) / case["split"], busy / CLUSTERS[1]


def fit(cases: list[dict]) -> dict[str, float]:
    """Costs in microseconds, by least squares of the relative error: ``launch``, what it takes more if all
    multiprocessors are ``busy``, and of each tile of tokens ``step`` (forward and dx), ``tile`` and ``exchange``. None
    is negative. And the part of a step's time that it takes with two teams, ``teams``."""
    teams = dict.fromkeys(TEAM_TILES, 0.9)
    for _ in range(2):
        for tile in TEAM_TILES:
            choices = [{**teams, tile: factor / 100} for factor in range(70, 102, 2)]
            teams = min(choices, key=lambda choice: _least_squares(cases, choice)[1])
    costs, _ = _least_squares(cases, teams)
    return costs | {f"{tile} teams": factor for tile, factor in teams.items()}


def _least_squares(cases: list[dict], teams: dict[int, float]) -> tuple[dict[str, float], float]:
    """The costs for such teams, and the sum of the squares."""
    names = ["launch", "busy"]
    for tile in TILES:
        names += [f"{tile} step forward", f"{tile} step dx", f"{tile} tile", f"{tile} exchange"]
    index = {name: i for i, name in enumerate(names)}
    matrix = np.zeros((len(cases), len(names)))
    for row, case in zip(matrix, cases, strict=True):
        steps, tiles, exchanges, busy = terms(case, teams)
        row[:2] = 1.0, busy
        row[index[f"{case['tile']} step {case['direction']}"]] = steps
        row[index[f"{case['tile']} tile"]] = tiles
        row[index[f"{case['tile']} exchange"]] = exchanges
        row /= case["us"]
    used = matrix.any(axis=0)
    while True:
        costs = np.zeros(len(names))
        costs[used] = np.linalg.lstsq(matrix[:, used], np.ones(len(cases)), rcond=None)[0]
        if (costs >= 0).all():
            return dict(zip(names, costs.tolist(), strict=True)), float(((matrix @ costs - 1) ** 2).sum())
        used &= costs >= 0


def predict(costs: dict[str, float], case: dict) -> float:
    """Microseconds."""
    steps, tiles, exchanges, busy = terms(case, {tile: costs[f"{tile} teams"] for tile in TEAM_TILES})
    tile = case["tile"]
    return (
        costs["launch"]
        + busy * costs["busy"]
        + steps * costs[f"{tile} step {case['direction']}"]
        + tiles * costs[f"{tile} tile"]
        + exchanges * costs[f"{tile} exchange"]
    )


def misses(costs: dict[str, float], cases: list[dict], tolerance: float = 0.03) -> list[tuple[dict, dict]]:
    """(fastest, chosen) of the problems for which the model's choice is slower than the fastest by more than that."""
    problems = defaultdict(list)
    for case in cases:
        problems[case["n"], case["k"], case["direction"], case["m"]].append(case)
    found = []
    for plans in problems.values():
        fastest, chosen = min(plans, key=lambda c: c["us"]), min(plans, key=lambda c: predict(costs, c))
        if chosen["us"] > (1 + tolerance) * fastest["us"]:
            found.append((fastest, chosen))
    return found


def plans(n: int, k: int, direction: str, m: int, most: int) -> list[tuple[int, int]]:
    """(tile, split) of the plans worth timing: the `most` with the fewest steps, each weighed by what it takes."""
    ranked = []
    for tile in TILES:
        if tile > 2 * m:
            continue
        for split in range(1, min(tile // 8, 8) + 1):
            case = {"n": n, "k": k, "direction": direction, "m": m, "tile": tile, "split": split}
            steps, _, exchanges, _ = terms(case, dict.fromkeys(TEAM_TILES, 0.9))
            step = 0.5 + tile / 512 if tile > 64 else 0.3 + tile / 1024
            ranked.append((steps * step + 3 * exchanges, tile, split))
    return [(tile, split) for _, tile, split in sorted(ranked)[:most]]


def measure(most: int, budget: float) -> list[dict]:
    """Times the plans of Mistral-7B's shapes on the current GPU, each compared with the dense product first.

    Raises:
        RuntimeError: a plan's result is wrong.
    """
    import torch

    import pyquant.functional as F
    from pyquant.bench.timing import CudaTimer, copies_beyond_cache

    timer, ops = CudaTimer(budget=budget), torch.ops.pyquant
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    cases = []
    for n, k in sorted(set(linear_shapes().values())):
        packed, state = F.quantize_4bit(
            torch.randn(n, k, device="cuda").bfloat16(), quant_type="nf4", compress_statistics=True
        )
        dense = F.dequantize_4bit(packed, state)
        weights = [
            (packed.clone(), *F.statistics(state), "nf4", 64, n, k)
            for _ in range(copies_beyond_cache(packed.nbytes, l2_bytes))
        ]
        for direction in ("forward", "dx"):
            for m in ROWS:
                x = torch.randn(m, k if direction == "forward" else n, device="cuda").bfloat16()
                expected = x @ (dense.T if direction == "forward" else dense)

                def run(weight, x=x, direction=direction):
                    if direction == "forward":
                        return ops.linear_4bit(x, *weight, None)
                    return ops.linear_4bit_dx(x, *weight)

                for tile, split in plans(n, k, direction, m, most):
                    os.environ["PYQUANT_KERNEL"] = f"wgmma:{tile}:{split}"
                    error = (run(weights[0]).float() - expected.float()).norm() / expected.float().norm()
                    if not error < 1e-2:
                        raise RuntimeError(f"{os.environ['PYQUANT_KERNEL']} of {m} rows, {n}x{k} {direction}: {error}")
                    us = timer.graph([lambda w=w, run=run: run(w) for w in weights]).microseconds
                    cases.append(
                        {"n": n, "k": k, "direction": direction, "m": m, "tile": tile, "split": split, "us": us}
                    )
                    print(f"{n}x{k} {direction:7} m={m:<5} tile {tile:3} split {split}  {us:8.2f} us", flush=True)
    os.environ.pop("PYQUANT_KERNEL", None)
    return cases


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_costs", description=__doc__.split("\n\n")[0])
    parser.add_argument("--times", metavar="FILE", help="fit to the times kept in FILE instead of measuring")
    parser.add_argument("--output", metavar="FILE", help="keep the times, with their provenance")
    parser.add_argument("--plans", type=int, default=4, help="timed of each problem (default 4)")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds of replays for each (default 0.02)")
    options = parser.parse_args(arguments)
    if options.times:
        with open(options.times) as file:
            cases = json.load(file)["cases"]
    else:
        import torch

        if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
            print("plan_costs: this needs a GPU of compute capability 9.0, or --times FILE", file=sys.stderr)
            return 1
        cases = measure(options.plans, options.budget)
        if options.output:
            from pyquant.bench.provenance import provenance

            with open(options.output, "w") as file:
                json.dump({"provenance": provenance(vars(options)), "cases": cases}, file, indent=1)
    costs = fit(cases)
    print(f"launch {costs['launch']:.2f}  busy {costs['busy']:.2f}")
    for tile in TILES:
        parts = ("step forward", "step dx", "tile", "exchange", *(("teams",) if tile in TEAM_TILES else ()))
        print(f"tile {tile:3}  " + "  ".join(f"{part} {costs[f'{tile} {part}']:.3f}" for part in parts))
    errors = [predict(costs, case) / case["us"] - 1 for case in cases]
    print(f"{len(cases)} plans, relative error {min(errors):+.2f} to {max(errors):+.2f}")
    for fastest, chosen in misses(costs, cases):
        where = f"{fastest['n']}x{fastest['k']} {fastest['direction']} m={fastest['m']}"
        print(
            f"{where}: {chosen['tile']}:{chosen['split']} ({chosen['us']:.1f} us) instead of "
            f"{fastest['tile']}:{fastest['split']} ({fastest['us']:.1f} us)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
