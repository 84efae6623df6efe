"""Run a job to its end, every event written down and shown; and the table of its groups."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jtl import masks
from jtl.models.backbone import UNUSED
from jtl.recipes.training import Engine, Job
from jtl.report import console, record
from jtl.train import checkpoint, plan, schedules
from jtl.train.run import Event


class Ended(NamedTuple):
    """What a run came to: the last params and stats, a row for each phase, and seconds."""

    params: Any
    stats: Any
    phases: list[dict[str, Any]]
    seconds: float


def follow(
    place: record.Run,
    job: Job,
    engine: Engine,
    *,
    watched: Mapping[str, tuple[str, float]] | None = None,
) -> Ended:
    """Run to the end: every event goes to `metrics.jsonl` and to the console.

    Args:
        place: the run folder.
        job: what is trained.
        engine: the job made ready.
        watched: {source: (its figure, the value before)} that evaluations give beside the task's.
    """
    planned = [
        {"name": p.name, "live": sorted(p.live), "steps": plan.length(p, *engine.epoch)}
        for p in job.plan
    ]
    there = None if engine.checkpoints is None else checkpoint.latest(engine.checkpoints)
    record.cut(place, -1 if there is None else there["step"])
    event = None
    with contextlib.ExitStack() as stack:
        if engine.checkpoints is not None:
            stack.callback(checkpoint.close, engine.checkpoints)
        stack.enter_context(contextlib.closing(engine.events))  # an error below saves the state
        options = {"metric": job.task.metric, "order": job.model.groups, "watched": watched or {}}
        show = stack.enter_context(console.progress(planned, **options))
        waiting: list[Event] = []

        def write(keep: int) -> None:
            while len(waiting) > keep:
                seen = waiting.pop(0)
                row = {**seen.metrics, "kind": seen.kind, "step": seen.step, "phase": seen.phase}
                record.append(place, row)
                show(row)

        stack.callback(write, 0)  # whatever ends the run
        for event in engine.events:
            waiting.append(event)
            # What a program gave is read once the next step is started.
            write(1 if event.kind in ("step", "shares") else 0)
    assert event is not None
    rows = [{"held_bit_equal": True, "skipped": False, **row} for row in event.progress.history]
    return Ended(event.state.params, event.state.stats, rows, sum(row["seconds"] for row in rows))


def group_rows(job: Job) -> list[dict[str, Any]]:
    """Return label, leaves, parameters and peak rate in each phase, from stem to heads."""
    counts = masks.count(job.model.params, job.model.labels)
    order = [*job.model.groups, UNUSED, *job.model.heads]
    return [
        {
            "label": label,
            "leaves": counts[label].leaves,
            "parameters": counts[label].parameters,
            "rates": {p.name: _peak(p.rates[label]) for p in job.plan if label in p.rates},
        }
        for label in order
        if label in counts
    ]


def _peak(rate: Any) -> float | None:
    peak = schedules.peak(rate)
    return None if math.isnan(peak) else peak
