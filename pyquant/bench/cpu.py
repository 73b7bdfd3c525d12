"""pyquant's CPU kernels against bitsandbytes' and dense torch, in one run.

    python -m benchmarks.cpu [--shape 4096 4096] [--dtypes float32 bfloat16] [--rows 1 8 256] [--check] [--output FILE]

Rows of the table are quantize and dequantize (NF4 with double quantization) and the linear y = x · Wᵀ for several
numbers of rows of x. bitsandbytes is measured as its users run it: `quantize_4bit` and `dequantize_4bit` of its
`functional`, and for the linear two ways: `matmul_4bit` on the stored format, which is what training runs, and an
`nn.Linear4bit` in eval mode under `inference_mode`, which on some processors repacks the weight at the first call and
computes in bfloat16 from then on ("repacked"). The goals are against the first.

The contenders take turns, and a time is the median over the turns. Before anything is timed, the results are checked:
quantized bytes and statistics equal bitsandbytes', dequantized values equal too, and a linear is within the error
bound, 1.25 times the error of the dense product in the same dtype.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import bitsandbytes
import torch

import pyquant
from pyquant.bench.provenance import provenance

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ERROR_BOUND = 1.25


@dataclass
class Row:
    """One line of the table: milliseconds a call."""

    operation: str
    dtype: str
    pyquant: float
    bitsandbytes: float
    repacked: float | None  # bitsandbytes' layer in eval mode
    dense: float | None
    goal: float  # times faster than bitsandbytes
    error: float | None = None  # of the linear, relative to the dense product's

    @property
    def ratio(self) -> float:
        return self.bitsandbytes / self.pyquant

    @property
    def met(self) -> bool:
        return self.ratio >= self.goal


def median_times(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds a call of each contender, which take turns so that a disturbance meets all of them alike."""
    calls = {}
    for name, call in contenders.items():
        call()
        start = time.perf_counter()
        call()
        # A turn lasts a few milliseconds at least: shorter ones would measure the clock.
        calls[name] = max(1, min(50, int(0.005 / max(time.perf_counter() - start, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                call()
            times[name].append((time.perf_counter() - start) / calls[name] * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    return ((value.double() - reference).norm() / reference.norm()).item()


def require(condition: bool, what: str) -> None:
    if not condition:
        sys.exit(f"benchmarks.cpu: wrong result, nothing was timed: {what}")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def measure_quantization(weight: torch.Tensor, options: dict, repeats: int) -> list[Row]:
    ours, our_state = pyquant.functional.quantize_4bit(weight, **options)
    theirs, their_state = bitsandbytes.functional.quantize_4bit(weight, **options)
    require(same_bits(ours, theirs), "quantized bytes differ from bitsandbytes'")
    for name, a, b in (
        ("absmax", our_state.absmax, their_state.absmax),
        ("offset", our_state.offset, their_state.offset),
        ("nested absmax", our_state.state2.absmax, their_state.state2.absmax),
    ):
        require(same_bits(a, b), f"{name} differs from bitsandbytes'")
    require(
        same_bits(
            pyquant.functional.dequantize_4bit(ours, our_state),
            bitsandbytes.functional.dequantize_4bit(theirs, their_state),
        ),
        "dequantized values differ from bitsandbytes'",
    )
    dtype = str(weight.dtype).removeprefix("torch.")
    quantize = {
        "pyquant": lambda: pyquant.functional.quantize_4bit(weight, **options),
        "bitsandbytes": lambda: bitsandbytes.functional.quantize_4bit(weight, **options),
    }
    dequantize = {
        "pyquant": lambda: pyquant.functional.dequantize_4bit(ours, our_state),
        "bitsandbytes": lambda: bitsandbytes.functional.dequantize_4bit(theirs, their_state),
    }
    return [
        Row("quantize", dtype, **median_times(quantize, repeats), repacked=None, dense=None, goal=10.0),
        Row("dequantize", dtype, **median_times(dequantize, repeats), repacked=None, dense=None, goal=1.5),
    ]


def bitsandbytes_layer(weight: torch.Tensor, options: dict) -> torch.nn.Module:
    n, k = weight.shape
    layer = bitsandbytes.nn.Linear4bit(
        k,
        n,
        bias=False,
        compute_dtype=weight.dtype,
        compress_statistics=options["compress_statistics"],
        quant_type=options["quant_type"],
    )
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **options)
    return layer.to("cpu").eval()


def measure_linear(weight: torch.Tensor, options: dict, rows: list[int], repeats: int) -> list[Row]:
    k = weight.shape[1]
    packed, state = pyquant.functional.quantize_4bit(weight, **options)
    dense = pyquant.functional.dequantize_4bit(packed, state)
    # The exact weight: the same bytes decoded to float32.
    exact_state = pyquant.functional.quantize_4bit(weight.float(), **options)[1]
    exact = pyquant.functional.dequantize_4bit(packed, exact_state).double()
    their_packed, their_state = bitsandbytes.functional.quantize_4bit(weight, **options)
    layer = bitsandbytes_layer(weight, options)
    table = []
    for m in rows:
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(weight.dtype)
        reference = x.double() @ exact.T
        with torch.inference_mode():
            contenders = {
                "pyquant": lambda x=x: pyquant.matmul_4bit(x, packed, state),
                "bitsandbytes": lambda x=x: bitsandbytes.matmul_4bit(x, their_packed.t(), their_state),
                "repacked": lambda x=x: layer(x),
                "dense": lambda x=x: torch.nn.functional.linear(x, dense),
            }
            error = relative_error(contenders["pyquant"](), reference)
            dense_error = relative_error(contenders["dense"](), reference)
            require(
                error <= ERROR_BOUND * dense_error,
                f"linear of {m} rows, {weight.dtype}: error {error:.2e}, dense {dense_error:.2e}",
            )
            times = median_times(contenders, repeats)
        dtype = str(weight.dtype).removeprefix("torch.")
        table.append(Row(f"linear, {m} rows", dtype, **times, goal=5.0 if m <= 8 else 1.5, error=error / dense_error))
    return table


def show(table: list[Row], source: dict) -> None:
    machine = source["environment"]
    print(f"{machine['CPU']}, {machine['CPU kernels']}; pyquant at {source['commit']}, torch {machine['torch']},")
    print(f"bitsandbytes {machine['bitsandbytes']}; milliseconds a call\n")
    print(
        f"{'operation':<18} {'dtype':<9} {'pyquant':>8} {'bnb':>8} {'ratio':>7} {'goal':>6} "
        f"{'repacked':>9} {'dense':>8}  error"
    )
    for row in table:
        repacked = "" if row.repacked is None else f"{row.repacked:.2f}"
        dense = "" if row.dense is None else f"{row.dense:.2f}"
        error = "equal" if row.error is None else f"{row.error:.2f} × dense"
        print(
            f"{row.operation:<18} {row.dtype:<9} {row.pyquant:>8.2f} {row.bitsandbytes:>8.2f} {row.ratio:>6.1f}× "
            f"{row.goal:>5.1f}× {repacked:>9} {dense:>8}  {error}{'' if row.met else '   MISSED'}"
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"), help="of the weight")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 256], help="of x, one line each")
    parser.add_argument("--quant-type", choices=["nf4", "fp4"], default="nf4")
    parser.add_argument("--blocksize", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15, help="turns of each contender")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers and their provenance")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs with `argv`, or with the command line's arguments; returns the exit status."""
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    options = {
        "blocksize": arguments.blocksize,
        "quant_type": arguments.quant_type,
        "compress_statistics": True,
    }
    table: list[Row] = []
    for name in arguments.dtypes:
        weight = (torch.randn(*arguments.shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(DTYPES[name])
        table += measure_quantization(weight, options, arguments.repeats)
        table += measure_linear(weight, options, arguments.rows, arguments.repeats)
    source = provenance({name: value for name, value in vars(arguments).items() if name != "output"})
    show(table, source)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(row) | {"ratio": row.ratio, "met": row.met} for row in table]
        arguments.output.write_text(json.dumps({"provenance": source, "milliseconds": rows}, indent=2) + "\n")
    return 1 if arguments.check and not all(row.met for row in table) else 0


if __name__ == "__main__":
    sys.exit(main())
