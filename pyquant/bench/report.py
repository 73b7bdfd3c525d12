"""The table on the terminal: one line per case, pyquant's figures and every peer's time."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pyquant.bench.kernels import OPERATIONS

__all__ = ["show"]

OURS = "pyquant"


def show(document: dict, console: Console) -> None:
    """Prints a results file's header, a table per operation, and what failed or was left out."""
    _header(document, console)
    peers = [name for name in document["peers"] if name != OURS]
    rows = document["rows"]
    for operation, title in OPERATIONS.items():
        for timing in ("graph", "eager"):
            chosen = [
                row for row in rows if (row["operation"], row["timing"]) == (operation, timing) and not row["failure"]
            ]
            if chosen:
                suffix = " (one eager call, launches included)" if timing == "eager" else ""
                console.print(_table(title + suffix, chosen, peers))
    for row in rows:
        if row["failure"]:
            rows_text = "" if row["m"] is None else f", M = {row['m']}"
            console.print(
                f"[red]failed:[/red] {row['peer']}, {row['operation']}, {escape(row['shape'])}{rows_text} "
                f"({row['timing']}): {escape(row['failure'])}",
                highlight=False,
                soft_wrap=True,
            )
    for peer, reason in document["absent"].items():
        console.print(f"{peer}: skipped, {escape(reason)}", highlight=False, soft_wrap=True)
    if document["not_measured"]:
        console.print(f"{document['not_measured']} measurements left out: the time budget was spent")


def _header(document: dict, console: Console) -> None:
    source, setting, ceilings = document["provenance"], document["setting"], document["ceilings"]
    gpu = source["gpu"] or {}
    peers = ", ".join(f"{name} {version}" for name, version in document["peers"].items())
    console.print(
        f"{gpu.get('name', 'CPU')}, driver {gpu.get('driver', 'unknown')}; commit {source['commit']}; {peers}\n"
        f"{setting['quant_type']}, block size {setting['blocksize']}, double quantization, {setting['dtype']}, "
        f"LoRA rank {setting['rank']}; copy {ceilings['copy_gbps']:.0f} GB/s, "
        f"{ceilings['dtype']} products {ceilings['matmul_tflops']:.0f} TFLOP/s; µs a call",
        highlight=False,
        soft_wrap=True,
    )


def _table(title: str, rows: list[dict], peers: list[str]) -> Table:
    present = {row["peer"] for row in rows}
    peers = [peer for peer in peers if peer in present]
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("shape", no_wrap=True)
    columns = ["N", "K", "M", OURS, "GB/s", "TFLOP/s", "of ceiling", *peers]
    columns += [f"× {name}" for name in ("bitsandbytes", "cublas") if name in peers]
    for column in columns:
        table.add_column(column, justify="right")
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["shape"], row["n"], row["k"], row["m"]), {})[row["peer"]] = row
    for (shape, n, k, m), of_peer in cases.items():
        ours = of_peer.get(OURS, {})
        cells = [escape(shape), str(n), str(k), "" if m is None else str(m)]
        cells += [_number(ours.get(name)) for name in ("us", "gbps", "tflops")]
        cells.append(f"{ours['share']:.0%}" if ours else "")
        cells += [_number(of_peer.get(peer, {}).get("us")) for peer in peers]
        for name in ("bitsandbytes", "cublas"):
            if name in peers:
                cells.append(_number(ours.get(f"vs_{name}")))
        table.add_row(*cells)
    return table


def _number(value: float | None) -> str:
    """Three digits or more."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
