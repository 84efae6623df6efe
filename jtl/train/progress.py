"""Where a run is: the phase, its start, its best, and what the finished phases came to.

Plain data that goes to JSON and back, and the rules by which it moves.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jtl.train.plan import Phase, Plateau

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        plan: names of the phases.
        phase: index of the phase that runs, or comes next.
        entered: whether that phase has begun.
        phase_start: step at which it began.
        step: steps taken in the whole run.
        evaluated: step of the last evaluation.
        metric: the figure of the weights as they were then, None before the first evaluation.
        start_metric: the figure at the start of the phase.
        best_metric: the best figure of the phase.
        best_step: the step of it.
        bad_epochs: evaluations since then.
        seconds: spent in this phase, over interruptions.
        compile_seconds: compiling its step, also those while another phase ran.
        held: digests of what is held in this phase, taken at its start.
        ended: series that a plateau ended.
        history: a row for each phase that ended or was skipped.
    """

    plan: tuple[str, ...]
    phase: int = 0
    entered: bool = False
    phase_start: int = 0
    step: int = 0
    evaluated: int = -1
    metric: float | None = None
    start_metric: float | None = None
    best_metric: float | None = None
    best_step: int = 0
    bad_epochs: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    held: dict[str, str] = dataclasses.field(default_factory=dict)
    ended: tuple[str, ...] = ()
    history: tuple[Row, ...] = ()


def to_record(progress: Progress) -> Row:
    """Return the progress as plain data."""
    return dataclasses.asdict(progress)


def from_record(record: Mapping[str, Any]) -> Progress:
    """Return the progress that `to_record` wrote, also after a way through JSON."""
    lists = {name: tuple(record[name]) for name in ("plan", "ended", "history")}
    return Progress(**{**record, **lists})


def enter(progress: Progress, held: dict[str, str]) -> Progress:
    """Return the progress at the start of its phase, which is a candidate for its best."""
    return dataclasses.replace(
        progress,
        entered=True,
        phase_start=progress.step,
        start_metric=progress.metric,
        best_metric=progress.metric,
        best_step=progress.step,
        bad_epochs=0,
        seconds=0.0,
        compile_seconds=0.0,
        held=held,
    )


def judge(progress: Progress, metric: float, phase: Phase) -> Progress:
    """Return the progress after an evaluation at its step.

    >>> phase = Phase("a", {"head": 1.0}, epochs=9, until=Plateau(min_delta=0.1))
    >>> progress = judge(enter(Progress(("a",)), {}), 0.5, phase)
    >>> progress = judge(dataclasses.replace(progress, step=10), 0.7, phase)
    >>> progress = judge(dataclasses.replace(progress, step=20), 0.75, phase)
    >>> progress.start_metric, progress.best_metric, progress.best_step, progress.bad_epochs
    (0.5, 0.7, 10, 1)
    """
    least = 0.0 if phase.until is None else phase.until.min_delta
    changes: dict[str, Any] = {"evaluated": progress.step, "metric": metric}
    if progress.start_metric is None:
        changes["start_metric"] = metric
    if progress.best_metric is None or metric > progress.best_metric + least:
        changes |= {"best_metric": metric, "best_step": progress.step, "bad_epochs": 0}
    else:
        changes["bad_epochs"] = progress.bad_epochs + 1
    return dataclasses.replace(progress, **changes)


def advance(progress: Progress) -> Progress:
    """Return the progress after one step."""
    return dataclasses.replace(progress, step=progress.step + 1)


def spend(progress: Progress, before: Progress, seconds: float, compiling: float) -> Progress:
    """Return the progress with the time of its phase: what stood in `before`, and since then."""
    earlier = (before.seconds, before.compile_seconds) if before.entered else (0.0, 0.0)
    return dataclasses.replace(
        progress, seconds=earlier[0] + seconds, compile_seconds=earlier[1] + compiling
    )


def due(progress: Progress, total: int, steps_per_epoch: int) -> bool:
    """Return whether an evaluation is due: at the end of each epoch and of the phase's length."""
    done = progress.step - progress.phase_start
    return progress.evaluated != progress.step and (done % steps_per_epoch == 0 or done >= total)


def over(progress: Progress, phase: Phase, total: int) -> bool:
    """Return whether the phase is over: by its length, or because the metric rises no more."""
    stopped = phase.until is not None and progress.bad_epochs >= phase.until.patience
    return stopped or progress.step - progress.phase_start >= total


def leave(progress: Progress, phase: Phase, total: int, row: Mapping[str, Any]) -> Progress:
    """Return the progress after its phase, the best weights restored if the phase has `until`.

    Args:
        progress: at the end of the phase.
        phase: the phase.
        total: its longest length in steps.
        row: more of its row in the history.
    """
    fruitless = progress.best_step == progress.phase_start
    ends = isinstance(phase.until, Plateau) and phase.series and fruitless
    metric = progress.metric if phase.until is None else progress.best_metric
    steps = progress.step - progress.phase_start
    entry = {
        "name": phase.name,
        "live": sorted(phase.live),
        "steps": steps,
        "metric_before": progress.start_metric,
        "metric_after": metric,
        "seconds": progress.seconds,
        "compile_seconds": progress.compile_seconds,
        "stopped": "length" if steps >= total else "no rise",
        "best_step": progress.best_step,
        **row,
    }
    return dataclasses.replace(
        progress,
        phase=progress.phase + 1,
        entered=False,
        metric=metric,
        evaluated=progress.step,
        held={},
        ended=(*progress.ended, phase.series) if ends else progress.ended,
        history=(*progress.history, entry),
    )


def skip(progress: Progress, phase: Phase) -> Progress:
    """Return the progress with its phase skipped."""
    entry = {
        "name": phase.name,
        "live": sorted(phase.live),
        "epochs": 0.0,
        "steps": 0,
        "metric_before": progress.metric,
        "metric_after": progress.metric,
        "seconds": 0.0,
        "compile_seconds": 0.0,
        "flops_per_step": None,
        "optimizer_bytes": 0,
        "skipped": True,
    }
    history = (*progress.history, entry)
    return dataclasses.replace(progress, phase=progress.phase + 1, history=history)


def figure(values: Mapping[str, Any], metric: str) -> float:
    """Return the metric among the figures of an evaluation.

    >>> figure({"accuracy": 0.5, "loss": 0.7}, "accuracy")
    0.5

    Raises:
        ValueError: it is not there, or not a number to compare with.
    """
    if metric not in values:
        raise ValueError(
            f"the plan goes by {metric!r}, which the evaluation does not give; it gives "
            f"{sorted(values)}; name one of these"
        )
    value = float(values[metric])
    if math.isnan(value):
        raise ValueError(
            f"{metric!r} is NaN on the validation data; the figures are {dict(values)}; look for "
            "NaN in the data, or for a class that is absent from it"
        )
    return value
