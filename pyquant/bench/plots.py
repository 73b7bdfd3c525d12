"""Plots of a results file: speed-up over bitsandbytes against rows, and the roofline."""

from pathlib import Path

__all__ = ["plot"]

# Colours that stay apart for colour-blind readers (Okabe and Ito, 2008).
SHAPE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PEER_COLOURS = {"pyquant": "#0072B2", "bitsandbytes": "#D55E00", "cublas": "#7F7F7F", "humming": "#009E73"}
MARKERS = ("o", "s", "^", "D", "v", "P")
NAMES = {"cublas": "cuBLAS", "humming": "Humming"}
PANELS = {
    "linear": "Linear, forward",
    "linear_dx": "Linear, dX",
    "lora": "LoRA linear, forward",
    "lora_backward": "LoRA linear, forward + backward",
}


def plot(document: dict, stem: Path) -> list[Path]:
    """Writes ``STEM-speedup.png`` and ``STEM-roofline.png``, each where the file has something for it.

    Args:
        document: a results file's content, of a GPU.
        stem: path without a suffix; its folder is made.

    Returns:
        The files written.

    Raises:
        ValueError: there is nothing to plot, or matplotlib is not installed.
    """
    if "rows" not in document:
        raise ValueError("only results of a GPU have plots")
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'pyquant[bench]'") from error
    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#E3E3E3",
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "figure.dpi": 150,
    }
    written = []
    with matplotlib.rc_context(style):
        for name, draw in (("speedup", _speedup), ("roofline", _roofline)):
            figure = draw(document)
            if figure is None:
                continue
            path = stem.with_name(f"{stem.name}-{name}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
            written.append(path)
    if not written:
        raise ValueError("the results have no products to plot")
    return written


def _figure(width: float, height: float, columns: int = 1, rows: int = 1):
    # Not pyplot: no display, no state that outlives the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _machine(document: dict) -> str:
    source, setting = document["provenance"], document["setting"]
    gpu = (source.get("gpu") or {}).get("name", "CPU")
    versions = document["peers"]
    parts = [
        gpu,
        f"{setting['quant_type'].upper()}, double quantization, {setting['dtype']}",
        f"pyquant at {source['commit']}",
    ]
    if "bitsandbytes" in versions:
        parts.append(f"bitsandbytes {versions['bitsandbytes']}")
    return " · ".join(parts)


def _timed(document: dict) -> list[dict]:
    return [row for row in document["rows"] if row["us"] and row["m"] is not None]


def _speedup(document: dict):
    """Times as fast as bitsandbytes against M, a panel an operation, a colour a shape; dashed: cuBLAS."""
    rows = [row for row in _timed(document) if row["vs_bitsandbytes"]]
    operations = [name for name in PANELS if any(r["operation"] == name and r["peer"] == "pyquant" for r in rows)]
    if not operations:
        return None
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    columns = min(2, len(operations))
    lines = -(-len(operations) // columns)
    figure, axes = _figure(5.2 * columns, 3.5 * lines + 0.9, columns, lines)
    shapes = list(dict.fromkeys((row["shape"], row["n"], row["k"]) for row in rows))
    for axis, operation in zip(axes.flat, operations, strict=False):
        of_panel = [row for row in rows if row["operation"] == operation]
        for i, shape in enumerate(shapes):
            colour = SHAPE_COLOURS[i % len(SHAPE_COLOURS)]
            for peer, look in (
                ("cublas", {"linestyle": (0, (4, 2)), "linewidth": 1.1, "alpha": 0.55}),
                ("pyquant", {"marker": MARKERS[i % len(MARKERS)], "markersize": 5, "linewidth": 1.9}),
            ):
                points = sorted(
                    (row["m"], row["vs_bitsandbytes"])
                    for row in of_panel
                    if row["peer"] == peer and (row["shape"], row["n"], row["k"]) == shape
                )
                axis.plot([m for m, _ in points], [ratio for _, ratio in points], color=colour, **look)
        axis.axhline(1, color="#444444", linewidth=1.1, zorder=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        ms = sorted({row["m"] for row in of_panel})
        axis.xaxis.set_major_locator(FixedLocator(ms))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, 0.7), max(high, 2.1))
        axis.set_title(PANELS[operation])
        axis.set_xlabel("M (rows, tokens)")
    for axis in list(axes.flat)[len(operations) :]:
        axis.remove()
    for row in axes:
        row[0].set_ylabel("times as fast as bitsandbytes")
    handles = [
        Line2D([], [], color=SHAPE_COLOURS[i % len(SHAPE_COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=5)
        for i in range(len(shapes))
    ]
    labels = [f"{name}  {n}×{k}" for name, n, k in shapes]
    if any(row["peer"] == "cublas" for row in rows):
        handles.append(Line2D([], [], color="#777777", linestyle=(0, (4, 2)), linewidth=1.1))
        labels.append(f"cuBLAS, dense {document['setting']['dtype']}")
    handles.append(Line2D([], [], color="#444444", linewidth=1.1))
    labels.append("bitsandbytes")
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3 * columns), fontsize=9)
    figure.suptitle(f"pyquant: speed-up over bitsandbytes\n{_machine(document)}", x=0.01, ha="left", fontsize=10)
    return figure


def _roofline(document: dict):
    """TFLOP/s of the forward linear against operations per byte, under the measured ceilings."""
    rows = [row for row in _timed(document) if row["operation"] == "linear" and row["tflops"]]
    if not rows:
        return None
    import numpy
    from matplotlib.lines import Line2D

    figure, axes = _figure(8.2, 5.2)
    axis = axes[0][0]
    ceilings = document["ceilings"]
    slope, flat = ceilings["copy_gbps"] / 1e3, ceilings["matmul_tflops"]  # TB/s, TFLOP/s
    intensity = [row["flops"] / row["nbytes"] for row in rows]
    low, high = min(intensity) / 2, max(max(intensity), flat / slope) * 2
    x = numpy.geomspace(low, high, 200)
    axis.plot(x, numpy.minimum(slope * x, flat), color="#222222", linewidth=1.6)
    axis.fill_between(x, numpy.minimum(slope * x, flat), flat * 3, color="#F3F3F3", zorder=0, linewidth=0)
    shapes = list(dict.fromkeys((row["shape"], row["n"], row["k"]) for row in rows))
    peers = [name for name in document["peers"] if any(row["peer"] == name for row in rows)]
    for row, at in zip(rows, intensity, strict=True):
        marker = MARKERS[shapes.index((row["shape"], row["n"], row["k"])) % len(MARKERS)]
        ours = row["peer"] == "pyquant"
        axis.plot(
            at,
            row["tflops"],
            marker=marker,
            linestyle="",
            color=PEER_COLOURS.get(row["peer"], "#E69F00"),
            markersize=7 if ours else 5.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            alpha=1.0 if ours else 0.75,
            zorder=4 if ours else 3,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(min(row["tflops"] for row in rows) / 2, flat * 2)
    axis.annotate(
        f"{ceilings['dtype']} products, {flat:.0f} TFLOP/s",
        (high, flat),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    # The slope's label lies along it.
    at = numpy.sqrt(low * flat / slope)
    axis.annotate(
        f"copy bandwidth, {slope * 1e3:.0f} GB/s",
        (at, slope * at),
        xytext=(0, 6),
        textcoords="offset points",
        rotation=_slope_angle(axis, figure),
        rotation_mode="anchor",
        ha="center",
        fontsize=9,
    )
    axis.set_xlabel("operations per byte moved (each operand once, in its own format)")
    axis.set_ylabel("TFLOP/s")
    handles = [
        Line2D([], [], marker="o", linestyle="", color=PEER_COLOURS.get(name, "#E69F00"), markersize=7)
        for name in peers
    ] + [
        Line2D([], [], marker=MARKERS[i % len(MARKERS)], linestyle="", color="#555555", markersize=6)
        for i in range(len(shapes))
    ]
    labels = [NAMES.get(name, name) for name in peers] + [f"{name}  {n}×{k}" for name, n, k in shapes]
    axis.legend(handles, labels, loc="lower right", fontsize=9)
    figure.suptitle(f"Linear, forward: roofline\n{_machine(document)}", x=0.01, ha="left", fontsize=10)
    return figure


def _slope_angle(axis, figure) -> float:
    """Degrees of a line of slope 1 on the logarithmic axes."""
    import math

    figure.canvas.draw()
    (x0, y0), (x1, y1) = axis.transData.transform([(1, 1), (10, 10)])
    return math.degrees(math.atan2(y1 - y0, x1 - x0))
