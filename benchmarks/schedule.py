"""Whole trainings on real text: wall time and accuracy beside the PyTorch loop.

    python -m benchmarks.schedule                          # 2,000 labels, three seeds
    python -m benchmarks.schedule --figures feature_extraction --epochs 10 --seeds 0 1 2 3 4
    python -m benchmarks.schedule --plan opening --json schedule.jsonl
    python -m benchmarks.schedule --quick                  # 32 labels, one seed, a smoke test

MiniLM on film reviews; weights and data come with the extra `demo`, PyTorch with `parity`. One JSON
line for each figure and seed, one for each figure over all seeds, then a table. `value` is how many
times faster jtl is: the peer's seconds over ours, each with everything (tokenising, computing
columns, compiling with an empty cache, evaluations that phases go by), loading the weights apart.

    feature_extraction          the head alone, for 6 epochs (`--epochs`); the peer runs its held
                                encoder in every epoch, as its users do
    progressive_same_schedule   head, then blocks from the top while validation rises, then all but
                                with `--plan opening`; the peer runs the same phases for as many
                                epochs, scores as often, and keeps the best weights too
    progressive_full            the same run of ours; the peer fine-tunes everything for 3 epochs
                                (`--full-epochs`), without evaluations

`bound` is what the same schedule's arithmetic allows at equal kernels and no compilation: the
forward passes' worth of the peer, which runs held blocks in every epoch, over ours, which runs them
once; a backward pass counts as two. It is near 1 where most epochs have everything open.

Beside them: `warm` (a second process, the compilations on disk), `kernels` (the peer over jtl
without derived columns) and `columns` (jtl without them over jtl with), whose product is `value`;
`cached` (the peer with features computed once, over jtl). In `progressive_full` `kernels` compares
the full fine-tunings of both, and `columns` is ours over the progressive run. Every training has a
process of its own, but with `--quick`. Phases go by validation data; the test split is scored once.
"""

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks import measure, reviews, table, torch_text
from benchmarks.reviews import Cell

AIMS = {
    "feature_extraction": 5.0,
    "progressive_same_schedule": 2.6,
    "progressive_full": 2.6,
}
FIGURES = ("feature_extraction", "progressive")
PARTS = ("warm", "kernels", "columns", "cached", "bound")
BLOCKS = 6  # of MiniLM
POINT = 0.01
Train = Callable[..., dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--size", type=int, default=2000, help="labels to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6, help="of feature extraction")
    parser.add_argument("--full-epochs", type=int, default=3, help="of full fine-tuning")
    parser.add_argument("--plan", choices=reviews.WATCHED, default="progressive")
    parser.add_argument("--test", type=int, default=2000, help="rows that are scored at the end")
    parser.add_argument("--json", help="file to which the rows are added")
    parser.add_argument("--quick", action="store_true", help="32 labels, few trainings")
    options = parser.parse_args()
    if options.quick:
        options.size, options.seeds, options.epochs, options.test = 32, [0], 2, 64
        options.plan = "opening"
    rows = []
    for figure in options.figures:
        for seed in options.seeds:
            measure.say(f"== {figure}, seed {seed}")
            for row in _of_seed(figure, seed, options):
                measure.emit(row, options.json)
                rows.append(row)
    for row in summaries(rows):
        measure.emit(row, options.json)
    show(rows)


def _of_seed(figure: str, seed: int, options: Any) -> list[dict[str, Any]]:
    buckets = 1 if options.quick else 2
    base = Cell("jtl", "head", options.size, seed, options.epochs, options.test, buckets)
    with _trainers(options.quick) as train:
        if figure == "feature_extraction":
            sides = _feature_sides(base, train, options.quick)
            found = [feature_row(sides)]
        else:
            base = dataclasses.replace(base, strategy=options.plan, epochs=options.full_epochs)
            sides = _progressive_sides(base, train, options.quick)
            found = progressive_rows(sides, options.plan, options.size)
    about = dict(benchmark="schedule", seed=seed, size=options.size, plan=options.plan)
    return [about | row | {"sides": sides} for row in found]


@contextlib.contextmanager
def _trainers(quick: bool) -> Iterator[Train]:
    """Give `train(cell, warm=False)`, which starts on an empty cache of compilations.

    What is trained `warm` finds the compilations of the last training that was not.
    """
    with contextlib.ExitStack() as stack:
        xla: list[str] = []

        def train(cell: Cell, *, warm: bool = False) -> dict[str, Any]:
            what = f"{cell.side}, {cell.strategy}, columns {cell.columns}, warm {warm}"
            measure.say(what)
            try:
                if quick:
                    return reviews.train(cell)
                if not warm:
                    folder = tempfile.TemporaryDirectory(prefix="jtl-xla-")
                    xla.append(stack.enter_context(folder))
                return reviews.apart(cell, JAX_COMPILATION_CACHE_DIR=xla[-1])
            except Exception as error:
                if cell.side == "jtl":
                    raise
                return {"failed": measure.why(error)}

        yield train


def _feature_sides(base: Cell, train: Train, quick: bool) -> dict[str, Any]:
    torch = dataclasses.replace(base, side="torch", columns=False)
    sides = {"jtl": train(base)}
    if not quick:
        sides["jtl_warm"] = train(base, warm=True)
        sides["jtl_plain"] = train(dataclasses.replace(base, columns=False))
    if torch_text.available():
        sides["torch"] = train(torch)
        if not quick:
            sides["torch_cached"] = train(dataclasses.replace(torch, columns=True))
    return sides


def _progressive_sides(base: Cell, train: Train, quick: bool) -> dict[str, Any]:
    torch = dataclasses.replace(base, side="torch", columns=False)
    sides = {"jtl": train(base)}
    same = dataclasses.replace(torch, replay=sides["jtl"]["phases"])
    if not quick:
        sides["jtl_warm"] = train(base, warm=True)
        sides["jtl_plain"] = train(dataclasses.replace(base, columns=False))
        sides["jtl_full"] = train(dataclasses.replace(base, strategy="full"))
    if torch_text.available():
        sides["torch"] = train(same)
        if not quick:
            sides["torch_full"] = train(dataclasses.replace(torch, strategy="full"))
    return sides


def feature_row(sides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of feature extraction."""
    row = _compared("feature_extraction", sides, "torch")
    return row | {"cached": _times(sides, "torch_cached", "jtl")}


def progressive_rows(sides: Mapping[str, Any], plan: str, size: int) -> list[dict[str, Any]]:
    """Return the rows of the progressive schedule: the same schedule, and full fine-tuning.

    Args:
        sides: what each training came to.
        plan: name of our plan in `reviews.plan_of`.
        size: labels to train on.
    """
    same = _compared("progressive_same_schedule", sides, "torch")
    same["bound"] = bound(sides["jtl"]["phases"], plan, size)
    full = _compared("progressive_full", sides, "torch_full")
    kernels = _times(sides, "torch_full", "jtl_full")
    return [same, full | {"kernels": kernels, "columns": _times(sides, "jtl_full", "jtl")}]


def bound(ran: Mapping[str, float], plan: str, size: int) -> float:
    """Return the peer's forward passes over ours for the epochs that each phase ran.

    >>> ran = {"head": 2, "open_block_4": 1, "open_block_2": 1, "open_block_0": 0, "all": 1}
    >>> round(bound(ran, "progressive", 2000), 2)  # 12 passes over 8.5
    1.41
    """
    groups = ("stem", *(f"block_{i}" for i in range(BLOCKS)))
    half = reviews.validation_rows(size) / size
    ours = 1 + half  # the columns of all phases, in one pass
    peer = half  # the evaluation before the first step; ours reads the columns
    for phase in reviews.plan_of(plan, groups, 1):
        epochs = ran.get(phase.name, 0)
        opened = sum(label.startswith("block_") for label in phase.live) / BLOCKS
        peer += epochs * (1 + 2 * opened + half)
        ours += epochs * (3 + half) * opened
    return peer / ours


def _compared(figure: str, sides: Mapping[str, Any], peer: str) -> dict[str, Any]:
    ours, theirs = sides["jtl"], sides.get(peer, {})
    value = _times(sides, peer, "jtl")
    accuracy, other = ours["accuracy"], theirs.get("accuracy")
    return {
        "figure": figure,
        "value": value,
        "ratio": value,
        **table.judged(value, AIMS[figure], better="higher"),
        "peer": peer,
        "seconds": ours["seconds"],
        "peer_seconds": theirs.get("seconds"),
        "accuracy": accuracy,
        "peer_accuracy": other,
        "accuracy_over_peer": None if other is None else accuracy - other,
        "compile_seconds": ours["compile_seconds"],
        "warm": _times(sides, peer, "jtl_warm"),
        "kernels": _times(sides, peer, "jtl_plain"),
        "columns": _times(sides, "jtl_plain", "jtl"),
    }


def _times(sides: Mapping[str, Any], slow: str, fast: str) -> float | None:
    """Return the seconds of one side over those of another, None where one is absent."""
    seconds = [sides.get(name, {}).get("seconds") for name in (slow, fast)]
    return None if None in seconds else seconds[0] / seconds[1]


def summaries(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each figure: medians of times, means and deviations of accuracies.

    The aim is met where the median is, and the mean accuracy is within one point of the peer's, or
    above it.
    """
    rows = list(rows)
    found = []
    for figure in dict.fromkeys(row["figure"] for row in rows):
        own = [row for row in rows if row["figure"] == figure and row["value"] is not None]
        if not own:
            continue
        values = [row["value"] for row in own]
        names = (*PARTS, "seconds", "peer_seconds", "compile_seconds")
        beside = {name: _median([row.get(name) for row in own]) for name in names}
        ours, theirs = ([row[name] for row in own] for name in ("accuracy", "peer_accuracy"))
        judged = table.judged(_median(values), AIMS[figure], better="higher")
        judged["met"] = bool(judged["met"] and np.mean(ours) >= np.mean(theirs) - POINT)
        found.append(
            {
                "benchmark": "schedule",
                "figure": figure,
                "seeds": len(own),
                "value": _median(values),
                "ratio": _median(values),
                "between": [min(values), max(values)],
                **judged,
                **beside,
                "accuracy": [float(np.mean(ours)), float(np.std(ours))],
                "peer_accuracy": [float(np.mean(theirs)), float(np.std(theirs))],
            }
        )
    return found


def _median(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table over all seeds."""
    headers = ("figure", "accuracy", "PyTorch's", "seconds", "PyTorch's", "faster", "aim")
    body = []
    for row in summaries(rows):
        accuracies = (_percent(row[name]) for name in ("accuracy", "peer_accuracy"))
        seconds = (table.figure(row[name]) for name in ("seconds", "peer_seconds"))
        faster = table.figure(row["value"], "x")
        parts = (table.figure(row[name], "x") for name in PARTS)
        body.append((row["figure"], *accuracies, *seconds, faster, table.aimed(row), *parts))
    title = "Whole trainings, wall time with everything, median over seeds"
    table.show(title, (*headers, *PARTS), body, left=1)


def _percent(values: list[float]) -> str:
    mean, deviation = values
    return f"{100 * mean:.1f} ± {100 * deviation:.1f}"


if __name__ == "__main__":
    main()
