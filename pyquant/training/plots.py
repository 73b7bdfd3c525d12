"""A run's curves and its confusion matrix."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import require

__all__ = ["plot_bars", "plot_confusion", "plot_loss"]


def plot_loss(history: list[dict], file: Path) -> None:
    """Draw loss, token accuracy and learning rate over the optimizer steps, from Trainer's log history, into a PNG."""
    figure = _figure(7, 7)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1))
    for axes, keys, title in (
        (panels[0], ("loss", "eval_loss"), "loss per target\ntoken (nats)"),
        (panels[1], ("mean_token_accuracy", "eval_mean_token_accuracy"), "token accuracy"),
        (panels[2], ("learning_rate",), "learning rate"),
    ):
        for key, style in zip(keys, (".-", "o--"), strict=False):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                label = "evaluation" if key.startswith("eval") else "training"
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set(ylabel=title)
        axes.grid(alpha=0.3)
    panels[0].legend()
    panels[2].set(xlabel="optimizer step")
    figure.savefig(file, dpi=120)


def plot_confusion(matrix: Sequence[Sequence[int]], labels: Sequence[str], file: Path, title: str = "") -> None:
    """Draw a confusion matrix, rows by expected label, into a PNG."""
    require("sklearn")
    from sklearn.metrics import ConfusionMatrixDisplay

    size = 2.5 + 0.6 * len(labels)
    figure = _figure(size + 1, size)
    import numpy

    display = ConfusionMatrixDisplay(numpy.array(matrix), display_labels=[label.strip() for label in labels])
    display.plot(ax=figure.add_subplot(), cmap="Blues", xticks_rotation=45, colorbar=False)
    display.ax_.set(xlabel="predicted", ylabel="expected", title=title)
    figure.savefig(file, dpi=120)


def plot_bars(names: Sequence[str], panels: Mapping[str, Sequence[float | None]], file: Path) -> None:
    """Draw one panel of horizontal bars for each measurement, into a PNG.

    Args:
        names: of the bars, the same in every panel.
        panels: the values of each measurement, by its title; a None has no bar, a panel of them is left out.
    """
    panels = {title: values for title, values in panels.items() if any(value is not None for value in values)}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(3.6 * columns, rows * (1.2 + 0.3 * len(names)))
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, values) in zip(grid, panels.items(), strict=False):
        bars = axes.barh(range(len(names)), [value or 0.0 for value in values], height=0.6)
        axes.bar_label(bars, ["" if value is None else f"{value:.3g}" for value in values], padding=2)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def _figure(width: float, height: float):
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves pyplot's global state alone
    return figure
