"""The loss curve of a run."""

from pathlib import Path

from .errors import require

__all__ = ["plot_loss"]


def plot_loss(history: list[dict], file: Path) -> None:
    """Draw training and evaluation loss over the optimizer steps, from Trainer's log history, into a PNG."""
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves pyplot's global state alone
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", ".-"), ("eval_loss", "evaluation", "o--")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss per target token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
