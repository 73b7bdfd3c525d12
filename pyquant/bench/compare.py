"""Two results files: what became slower."""

import json
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Change", "Comparison", "compare", "load_results"]

OURS = "pyquant"


@dataclass
class Change:
    """pyquant's time of one case in both files, in microseconds. A failed measurement has none."""

    case: tuple
    before: float | None
    after: float | None

    @property
    def ratio(self) -> float | None:
        """Time after over time before: above 1 is slower."""
        return self.after / self.before if self.before and self.after else None

    def regressed(self, tolerance: float) -> bool:
        if self.after is None:
            return self.before is not None
        return self.ratio is not None and self.ratio > 1 + tolerance

    @property
    def name(self) -> str:
        return " ".join(str(part) for part in self.case if part is not None)


@dataclass
class Comparison:
    """What two files have in common, and how many cases only one has."""

    changes: list[Change]
    only_before: int
    only_after: int
    warnings: list[str]


def load_results(path: Path) -> dict:
    """A results file of ``pyquant bench``, of a GPU or of a CPU.

    Raises:
        ValueError: the file cannot be read, or is no results file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict) or "provenance" not in document or not {"rows", "milliseconds"} & set(document):
        raise ValueError(f"{path} is no results file of pyquant bench")
    return document


def compare(before: dict, after: dict) -> Comparison:
    """pyquant's times, case by case.

    Raises:
        ValueError: the files measure different things: GPU against CPU, another dtype or 4-bit type, no common case.
    """
    if ("rows" in before) != ("rows" in after):
        raise ValueError("one file is of a GPU and the other of a CPU")
    for name in ("dtype", "quant_type", "blocksize", "rank"):
        values = [_setting(document).get(name) for document in (before, after)]
        if values[0] != values[1]:
            raise ValueError(f"the files differ in {name}: {values[0]} and {values[1]}")
    warnings = [
        f"the files differ in {name}: {values[0]} and {values[1]}"
        for name, find in (("GPU", _gpu), ("CPU", _cpu), ("driver", _driver), ("torch", _torch))
        if (values := (find(before), find(after)))[0] != values[1]
    ]
    old, new = _times(before), _times(after)
    common = [case for case in old if case in new]
    if not common:
        raise ValueError("the files have no case in common")
    changes = [Change(case, old[case], new[case]) for case in common]
    return Comparison(changes, len(old) - len(common), len(new) - len(common), warnings)


def _setting(document: dict) -> dict:
    return document.get("setting") or {
        name: document["provenance"]["arguments"].get(name) for name in ("quant_type", "blocksize")
    }


def _times(document: dict) -> dict[tuple, float | None]:
    if "rows" in document:
        return {
            (row["operation"], f"{row['n']}×{row['k']}", row["m"] and f"M={row['m']}", row["timing"]): row["us"]
            for row in document["rows"]
            if row["peer"] == OURS
        }
    shape = "×".join(map(str, document["provenance"]["arguments"]["shape"]))
    return {(row["operation"], shape, row["dtype"]): row[OURS] * 1e3 for row in document["milliseconds"]}


def _gpu(document: dict) -> str | None:
    return (document["provenance"].get("gpu") or {}).get("name")


def _driver(document: dict) -> str | None:
    return (document["provenance"].get("gpu") or {}).get("driver")


def _cpu(document: dict) -> str | None:
    # A GPU's times do not depend on it.
    return None if "rows" in document else document["provenance"]["environment"].get("CPU")


def _torch(document: dict) -> str | None:
    return document["provenance"]["environment"].get("torch")
