"""``pyquant bench``: measure, compare, plot."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

__all__ = ["app", "main_kernels"]

app = typer.Typer(help="Measure the kernels, compare results files, plot them.", no_args_is_help=True)

DTYPES = ("bfloat16", "float16", "float32")


def _list(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


@app.command()
def kernels(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--model", help="Folder or hub name of a model, whose linear shapes to use; default Mistral-7B."),
    ] = None,
    shapes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--shapes", "-s", help="Only these, by name or as NxK: q/o,gate/up,4096x4096."),
    ] = None,
    rows: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--rows", "-m", help="Rows of the activation: 1,16,256. Backward is measured for these too."),
    ] = None,
    operations: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--operations", help="Only these of quantize,dequantize,linear,linear_dx,lora,lora_backward."),
    ] = None,
    peers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--peers", "-p", help="Only these of pyquant,bitsandbytes,cublas,humming."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of activations and dense weights: bfloat16, float16, float32.")
    ] = "bfloat16",
    quant_type: Annotated[str, typer.Option("--quant-type", "-q", help="4-bit type: nf4, fp4.")] = "nf4",
    blocksize: Annotated[int, typer.Option(help="Weights that share one absmax.")] = 64,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA adapter.")] = 16,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows and replays.")] = False,
    budget: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--budget", min=1, help="Seconds after which no further case is started."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="JSON file for the numbers and their provenance."),
    ] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Plots beside the JSON file.")] = False,
) -> None:
    """Time pyquant's kernels and the peers' that are installed, each result checked against float64 first.

    Exits with 1 if a check failed. On a machine without a GPU the CPU backends are measured, by the options that apply
    there: model, shapes (the first), rows, quant-type, blocksize, quick and output.
    """
    import torch
    from rich.console import Console

    from pyquant.bench import kernels as suites
    from pyquant.bench.peers import Setting, find_peers
    from pyquant.bench.provenance import provenance
    from pyquant.bench.report import show
    from pyquant.bench.timing import CudaTimer, measure_ceilings

    arguments = {name: value for name, value in locals().items() if name in _OPTIONS}
    chosen_operations = _operations(_list(operations), suites.OPERATIONS)
    chosen_rows = _rows(rows)
    chosen_shapes = _shapes(model, _list(shapes))
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    if quant_type not in ("nf4", "fp4"):
        raise typer.BadParameter(f"quant-type is nf4 or fp4, got {quant_type!r}")
    if plots and output is None:
        raise typer.BadParameter("--plots needs --output: the plots lie beside the JSON file")
    console = Console()

    if not torch.cuda.is_available():
        from pyquant.bench.cpu import main as measure_cpu

        unused = {"operations": operations, "peers": peers, "plots": plots, "budget": budget}
        for name, value in unused.items():
            if value:
                raise typer.BadParameter(f"--{name} needs a GPU, and torch finds none")
        console.print("No GPU: measuring the CPU backends.")
        words = ["--quant-type", quant_type, "--blocksize", str(blocksize)]
        if model is not None or shapes is not None:
            words += ["--shape", *map(str, next(iter(chosen_shapes.values())))]
        if chosen_rows:
            words += ["--rows", *map(str, chosen_rows)]
        words += ["--repeats", "3"] if quick else []
        words += ["--output", str(output)] if output else []
        raise typer.Exit(measure_cpu(words))

    setting = Setting("cuda", getattr(torch, dtype), quant_type, blocksize, rank)
    try:
        found, absent = find_peers(_list(peers), setting)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    start = time.monotonic()
    timer = CudaTimer(budget=0.05) if quick else CudaTimer()
    source = provenance(arguments)
    ceilings = measure_ceilings(timer, setting.dtype)
    done = 0

    with console.status("measuring") as status:

        def report(row) -> None:
            nonlocal done
            done += 1
            m = "" if row.m is None else f", M = {row.m}"
            status.update(f"{done} measured; {row.operation}, {row.shape}{m}, {row.peer}")

        suite = suites.Suite(
            setting,
            chosen_shapes,
            chosen_rows or (suites.QUICK_ROWS if quick else suites.DEFAULT_ROWS),
            chosen_operations,
            found,
            timer,
            ceilings,
            training_rows=1 if chosen_rows else suites.TRAINING_ROWS,
            report=report,
            deadline=start + budget if budget else float("inf"),
        )
        suite.run()
    document = suites.results(suite, source, absent)
    document["provenance"]["seconds"] = round(time.monotonic() - start, 1)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    show(document, console)
    if plots:
        _plot(document, output.with_suffix(""), console)
    if any(row.failure for row in suite.table):
        raise typer.Exit(1)


_OPTIONS = (
    "model", "shapes", "rows", "operations", "peers", "dtype", "quant_type", "blocksize", "rank", "quick", "budget",
)  # fmt: skip


@app.command("plot")
def plot_file(
    file: Annotated[Path, typer.Argument(help="Results file.", show_default=False)],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Start of the plots' names; by default that of the results file."),
    ] = None,
) -> None:
    """Plot a results file: FILE-speedup.png and FILE-roofline.png."""
    from rich.console import Console

    _plot(_load(file), output or file.with_suffix(""), Console())


@app.command("compare")
def compare_files(
    before: Annotated[Path, typer.Argument(help="Results file to compare with.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="Results file to judge.", show_default=False)],
    tolerance: Annotated[float, typer.Option(min=0.0, help="Slowdown that is no regression, as a fraction.")] = 0.05,
) -> None:
    """Compare pyquant's times in two results files. Exits with 1 if one became slower, or fails now."""
    from rich.console import Console
    from rich.table import Table

    from pyquant.bench.compare import compare

    console = Console()
    try:
        comparison = compare(_load(before), _load(after))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    regressed = [change for change in comparison.changes if change.regressed(tolerance)]
    table = Table("case", "before, µs", "after, µs", "after / before", box=None)
    for change in sorted(comparison.changes, key=lambda change: -(change.ratio or float("inf"))):
        if change in regressed or (change.ratio is not None and change.ratio < 1 - tolerance):
            style = "red" if change in regressed else "green"
            values = [_optional(change.before, ".1f"), _optional(change.after, ".1f"), _optional(change.ratio, ".3f")]
            table.add_row(change.name, *values, style=style)
    if table.row_count:
        console.print(table, highlight=False)
    for warning in comparison.warnings:
        console.print(f"[yellow]Note:[/yellow] {warning}", highlight=False, soft_wrap=True)
    if comparison.only_before or comparison.only_after:
        console.print(
            f"{comparison.only_before} cases only in the first file, {comparison.only_after} only in the second"
        )
    console.print(
        f"{len(comparison.changes)} cases compared, {len(regressed)} slower by more than {tolerance:.0%}",
        highlight=False,
    )
    raise typer.Exit(1 if regressed else 0)


def main_kernels() -> None:
    """``python -m benchmarks.kernels``."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command()(kernels)
    alone(prog_name="python -m benchmarks.kernels", args=sys.argv[1:])


def _optional(value: float | None, form: str) -> str:
    return "failed" if value is None else format(value, form)


def _load(path: Path) -> dict:
    from pyquant.bench.compare import load_results

    try:
        return load_results(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _plot(document: dict, stem: Path, console) -> None:
    from pyquant.bench.plots import plot

    try:
        for path in plot(document, stem):
            console.print(f"Plot: {path}", highlight=False, soft_wrap=True)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _operations(names: list[str] | None, known: dict[str, str]) -> list[str]:
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"there is no operation {name!r}; the operations are {', '.join(known)}")
    return names or list(known)


def _rows(text: str | None) -> list[int] | None:
    try:
        rows = [int(part) for part in _list(text) or ()]
    except ValueError as error:
        raise typer.BadParameter(f"rows are numbers separated by commas, got {text!r}") from error
    if any(m < 1 for m in rows):
        raise typer.BadParameter(f"rows are positive, got {text!r}")
    return rows or None


def _shapes(model: str | None, names: list[str] | None) -> dict[str, tuple[int, int]]:
    from pyquant.bench.shapes import linear_shapes

    try:
        known = linear_shapes(model)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"no shapes from the model {model}: {error}") from error
    if not names:
        return known
    chosen = {}
    for name in names:
        n, _, k = name.partition("x")
        if name in known:
            chosen[name] = known[name]
        elif n.isdigit() and k.isdigit() and int(n) > 0 and int(k) > 0:
            chosen[name] = (int(n), int(k))
        else:
            raise typer.BadParameter(f"there is no shape {name!r}; give one of {', '.join(known)}, or NxK")
    return chosen
