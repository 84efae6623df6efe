"""How fast a run goes and how long it still takes: pure arithmetic on rows and times.

The phase's time left is its remaining steps at the mean pace of the phase. The bound for the plan
adds the later phases at their longest length: a step there costs what a step cost so far for each
unit of `relative_cost`, and each phase has the longest start (compilation) that was seen. Phases
that stop early or are skipped only make it shorter.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

_HEAD_COST = 0.1
_SMOOTHING = 0.1


class Planned(NamedTuple):
    """A phase to come: its name, its longest length in steps, the cost of a step in any unit."""

    name: str
    steps: int
    cost: float | int = 1.0


class Pace(NamedTuple):
    """Where a run is.

    Attributes:
        plan: all phases.
        index: of the phase that runs.
        done: finished steps of it.
        origin: steps of the run that were finished when it began.
        began: time at which it began here.
        first: (time, done) of its first finished step in this process, None before.
        last: time of the last row if that was a step, None otherwise.
        step_seconds: of the last steps, smoothed; None before the second one.
        examples: real rows of the last step.
        unit_seconds: highest seeen seconds of a step for a unit of cost.
        start_seconds: longest time from the start of a phase to its first step.
    """

    plan: tuple[Planned, ...]
    index: int = 0
    done: int = 0
    origin: int = 0
    began: float | int = 0.0
    first: tuple[float | int, int] | None = None
    last: float | int | None = None
    step_seconds: float | int | None = None
    examples: float | int = 0
    unit_seconds: float | int | None = None
    start_seconds: float | int = 0.0


def relative_cost(live: Collection[str], order: Sequence[str]) -> float | int:
    """Return the stages that a step runs through: those from the lowest live group upward.

    What lies below is held, and its output is computed once. Heads alone cost a tenth.

    >>> order = ["stem", "block_0", "block_1"]
    >>> relative_cost({"head"}, order), relative_cost({"block_0", "head"}, order)
    (0.1, 2.1)
    """
    lowest = min((i for i, label in enumerate(order) if label in live), default=len(order))
    return len(order) - lowest + _HEAD_COST


def observe(pace: Pace, row: Mapping[str, Any], now: float | int) -> Pace:
    """Return the pace after a row of `metrics.jsonl` that came in at the time `now` (seconds).

    >>> pace = Pace((Planned("head", 10),))
    >>> for now, step in ((1.0, 1), (1.5, 2), (2.0, 3)):
    ...     pace = observe(pace, {"kind": "step", "step": step, "phase": "head"}, now)
    >>> pace.done, pace.step_seconds, phase_seconds_left(pace)
    (3, 0.5, 3.5)
    """
    if row["kind"] == "phase_start" or row["phase"] != pace.plan[pace.index].name:
        origin = row["step"] - (row["kind"] == "step")
        pace = _entered(pace, row["phase"], origin, now)
    if row["kind"] != "step":
        return pace._replace(last=None)
    done = row["step"] - pace.origin
    first, start = pace.first, pace.start_seconds
    if first is None:
        first, start = (now, done), max(start, now - pace.began)
    smooth = pace.step_seconds
    if pace.last is not None:
        gap = now - pace.last
        smooth = gap if smooth is None else smooth + _SMOOTHING * (gap - smooth)
    pace = pace._replace(done=done, first=first, start_seconds=start, step_seconds=smooth, last=now)
    return pace._replace(examples=row.get("examples") or 0, unit_seconds=_unit(pace, now))


def examples_per_second(pace: Pace) -> float | int | None:
    """Return the examples of the last step over the smoothed seconds of a step.

    >>> examples_per_second(Pace((), examples=32, step_seconds=0.25))
    128.0
    """
    return pace.examples / pace.step_seconds if pace.step_seconds else None


def phase_seconds_left(pace: Pace) -> float | int | None:
    """Return the remaining time of the phase at its longest, None before its second step."""
    if pace.first is None or pace.last is None or pace.done <= pace.first[1]:
        return None
    mean = (pace.last - pace.first[0]) / (pace.done - pace.first[1])
    return max(0, pace.plan[pace.index].steps - pace.done) * mean


def plan_seconds_left(pace: Pace) -> float | int | None:
    """Return the bound for all phases.

    >>> plan = (Planned("head", 10), Planned("all", 10, cost=4.0))
    >>> pace = Pace(plan, done=5, first=(2.0, 1), last=4.0, unit_seconds=0.5, start_seconds=2.0)
    >>> plan_seconds_left(pace)  # 5 steps of 0.5 s, then 2 s and 10 steps of 2 s
    24.5
    """
    left = phase_seconds_left(pace)
    if left is None or pace.unit_seconds is None:
        return None
    later = pace.plan[pace.index + 1 :]
    steps = sum(phase.steps * phase.cost for phase in later)
    return left + steps * pace.unit_seconds + len(later) * pace.start_seconds


def _entered(pace: Pace, phase: str, origin: int, now: float | int) -> Pace:
    names = [planned.name for planned in pace.plan]
    return Pace(
        pace.plan,
        index=names.index(phase) if phase in names else pace.index,
        origin=origin,
        began=now,
        unit_seconds=pace.unit_seconds,
        start_seconds=pace.start_seconds,
    )


def _unit(pace: Pace, now: float | int) -> float | int | None:
    if pace.first is None or pace.done <= pace.first[1]:
        return pace.unit_seconds
    mean = (now - pace.first[0]) / (pace.done - pace.first[1])
    return mean / pace.plan[pace.index].cost
