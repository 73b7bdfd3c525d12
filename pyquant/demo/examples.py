"""What the scripts under examples/ share: their command line, their configuration, and the file of their results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..bench.provenance import provenance
from ..training.config import Config, load_config, to_dict
from .tasks import write_task

__all__ = ["Overrides", "Small", "before_and_after", "example_config", "markdown_table", "write_results"]

Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Such as training.max_steps=10; pyquant train --help lists the keys."
    ),
]
Small = Annotated[
    bool, typer.Option("--small", help="A 135M model and small data from package registries, for a CPU, offline.")
]


def example_config(folder: Path, task: str, small: bool, overrides: Sequence[str] | None = None) -> Config:
    """The configuration of an example: mistral-7b.yaml, or small.yaml with its model and data fetched.

    Args:
        folder: the example's.
        task: one of `pyquant.demo.tasks.TASKS`, whose files small.yaml is for.
        overrides: ``section.key=value``.

    Raises:
        AssetError: the model or the data can neither be found nor fetched.
        ConfigError: see `load_config`.
    """
    overrides = list(overrides or [])
    if not small:
        return load_config(folder / "mistral-7b.yaml", overrides)
    load_config(folder / "small.yaml", overrides)  # a wrong key is told before anything is fetched
    files = [f"{key}={json.dumps(path)}" for key, path in write_task(task).items()]
    return load_config(folder / "small.yaml", files + overrides)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as Markdown writes it; numbers with four digits."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def before_and_after(metrics: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """The table of the measurements that a run took, of those named in ``titles``.

    Args:
        metrics: of a run, as metrics.json holds them.
        titles: for keys of ``metrics["after"]``, what they are called in the table.
    """
    before, after = metrics["before"] or {}, metrics["after"] or {}
    rows = [[title, before.get(key, ""), after[key]] for key, title in titles.items() if key in after]
    return markdown_table(["", "before", "after"], rows)


def write_results(config: Config, results: dict[str, Any]) -> Path:
    """Write results.json into the run's folder: the machine, the versions, the command, the configuration, and the
    results; return its path.
    """
    file = Path(config.training.output_dir) / "results.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(provenance(to_dict(config)) | {"results": results}, indent=2, ensure_ascii=False)
    file.write_text(text.replace(f'"{Path.home()}/', '"~/') + "\n", encoding="utf-8")
    return file
