"""Rows of `metrics.jsonl` as curves to draw: series by step, stretches of phases."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
POINTS = 600


class Series(NamedTuple):
    """Values by step; None marks a gap."""

    steps: tuple[int, ...]
    values: tuple[float | int | None, ...]


class Stretch(NamedTuple):
    """The steps of a phase."""

    name: str
    first: int
    last: int


def series(rows: Sequence[Row], kind: str, name: str) -> Series:
    """Return a figure of all rows of a kind that have it.

    >>> series([{"kind": "step", "step": 1, "loss": 0.5}, {"kind": "skipped"}], "step", "loss")
    Series(steps=(1,), values=(0.5,))
    """
    found = [(row["step"], row[name]) for row in rows if row["kind"] == kind and name in row]
    return Series(tuple(step for step, _ in found), tuple(value for _, value in found))


def evaluations(rows: Sequence[Row], metric: str) -> Series:
    """Return a figure of all evaluations, and at the end of each phase that of what it leaves.

    >>> rows = [{"kind": "evaluation", "step": 5, "accuracy": 0.7}]
    >>> rows.append({"kind": "phase_end", "step": 5, "metric_after": 0.8})
    >>> evaluations(rows, "accuracy")
    Series(steps=(5, 5), values=(0.7, 0.8))
    """
    names = {"evaluation": metric, "phase_end": "metric_after"}
    found = [
        (row["step"], row[names[row["kind"]]])
        for row in rows
        if row["kind"] in names and names[row["kind"]] in row
    ]
    kept = [now for last, now in zip([None, *found], found, strict=False) if now != last]
    return Series(tuple(step for step, _ in kept), tuple(value for _, value in kept))


def named(rows: Sequence[Row], prefix: str, kind: str = "step") -> dict[str, Series]:
    """Return the series of every figure `prefix/LABEL` of a kind, with a gap where it is absent.

    >>> named([{"kind": "step", "step": 1, "rate/head": 0.1}, {"kind": "step", "step": 2}], "rate")
    {'head': Series(steps=(1, 2), values=(0.1, None))}
    """
    steps = [row for row in rows if row["kind"] == kind]
    names = dict.fromkeys(name for row in steps for name in row if name.startswith(f"{prefix}/"))
    at = tuple(row["step"] for row in steps)
    return {
        name.removeprefix(f"{prefix}/"): Series(at, tuple(row.get(name) for row in steps))
        for name in names
    }


def stretches(rows: Sequence[Row]) -> list[Stretch]:
    """Return the phases that ran, in order, each with the steps that it spans.

    >>> rows = [{"kind": "phase_start", "step": 0, "phase": "head"}]
    >>> stretches([*rows, {"kind": "step", "step": 1, "phase": "head"}])
    [Stretch(name='head', first=0, last=1)]
    """
    found: dict[str, Stretch] = {}
    for row in rows:
        if row["kind"] == "skipped":
            continue
        name, step = row["phase"], row["step"]
        first = step - (row["kind"] == "step")
        start = found.get(name, Stretch(name, first, step))
        found[name] = Stretch(name, min(start.first, first), max(start.last, step))
    return [stretch for stretch in found.values() if stretch.last > stretch.first]


def smooth(
    values: Sequence[float | int | None], weight: float | int = 0.9
) -> list[float | int | None]:
    """Return the exponential moving mean without the pull of its start; gaps stay gaps.

    >>> [round(value, 3) for value in smooth([1.0, 2.0], 0.5)]  # (0.5 * 1 + 2) / (0.5 + 1)
    [1.0, 1.667]
    """
    total = count = 0.0
    means: list[float | int | None] = []
    for value in values:
        if value is None:
            means.append(None)
            continue
        total, count = weight * total + value, weight * count + 1
        means.append(total / count)
    return means


def thin(line: Series, points: int = POINTS) -> Series:
    """Return a series of about `points` steps: every n-th, and the last.

    >>> thin(Series((1, 2, 3, 4), (1.0, 2.0, 3.0, 4.0)), 2)
    Series(steps=(1, 3, 4), values=(1.0, 3.0, 4.0))
    """
    every = max(1, len(line.steps) // points)
    kept = sorted({*range(0, len(line.steps), every), len(line.steps) - 1} - {-1})
    return Series(tuple(line.steps[i] for i in kept), tuple(line.values[i] for i in kept))
