"""What a run prints while it goes: a live bar on a terminal, plain lines elsewhere.

    with progress(plan, metric="accuracy", order=groups) as show:
        for event in run(...):
            show({"kind": event.kind, "step": event.step, "phase": event.phase, **event.metrics})

`show` takes the rows of `metrics.jsonl` (`jtl.report.record`) and prints a line when a phase
begins, ends or is skipped and at each evaluation; in between it moves the bar, or prints a line
every few seconds.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jtl.report import pace as paces
from jtl.report import readable
from jtl.report.record import plain
from jtl.report.screen import make_console, say

Row = Mapping[str, Any]
Show = Callable[[Row], None]
_PLAIN_SECONDS, _ROOM_FOR_RATE = 5.0, 100


@contextlib.contextmanager
def progress(
    plan: Sequence[Row],
    *,
    metric: str,
    order: Sequence[str] = (),
    watched: Mapping[str, tuple[str, float]] | None = None,
    every: float | int = _PLAIN_SECONDS,
    out: Any = None,
    now: Callable[[], float | int] = time.perf_counter,
) -> Iterator[Show]:
    """Yield a function that shows rows of `metrics.jsonl` as they come.

    Args:
        plan: a dict for each phase: name, live (labels), steps (longest length).
        metric: name of the figure that the plan goes by.
        order: labels of the backbone from stem to top; the bound on the plan's time needs them.
        watched: {source: (its figure, the value before training)}, shown beside the metric.
        every: seconds between plain lines; a terminal has a live bar instead.
        out: a `rich.console.Console`; None writes to standard output.
        now: clock.
    """
    out = make_console() if out is None else out
    plan = [{**phase, "live": readable.in_order(phase["live"], order)} for phase in plan]
    planned = tuple(
        paces.Planned(p["name"], p["steps"], paces.relative_cost(p["live"], order)) for p in plan
    )
    shown = _bar(planned, out) if out.is_terminal else _lines(out, every, now)
    state = paces.Pace(planned, began=now())
    with shown as draw:

        def show(row: Row) -> None:
            nonlocal state
            row = plain(row)
            state = paces.observe(state, row, now())
            line = event_line(row, metric, plan)
            if row["kind"] == "evaluation":
                line += sources_line(row, watched or {})
            if line:
                say(out, line, style=_STYLES[row["kind"]])
            draw(state, row)

        yield show


_STYLES = {"phase_start": "bold", "phase_end": "green", "skipped": "dim", "evaluation": ""}


def event_line(row: Row, metric: str, plan: Sequence[Row]) -> str:
    """Return the line of an event, "" for a step and for shares.

    >>> row = {"kind": "skipped", "step": 63, "phase": "open_stem"}
    >>> event_line(row, "accuracy", [{"name": "open_stem", "live": ["stem"], "steps": 63}])
    'phase 1/1 open_stem: skipped, the metric no longer rises'
    """
    kind = row["kind"]
    if kind in ("step", "shares"):
        return ""
    if kind == "evaluation":
        return f"  step {readable.count(row['step'])}: {_figures(row, metric)}"
    names = [phase["name"] for phase in plan]
    name = row["phase"]
    place = f" {names.index(name) + 1}/{len(names)}" if name in names else ""
    start = f"phase{place} {name}: "
    if kind == "skipped":
        return start + "skipped, " + row.get("reason", "the metric no longer rises")
    if kind == "phase_start":
        phase = {**row, **plan[names.index(name)]} if name in names else row
        live = readable.spans(phase.get("live", ()))
        return f"{start}{live} live, at most {readable.plural(phase.get('steps', 0), 'step')}"
    return f"{start}done, {_ended(row, metric)}"


def sources_line(row: Row, watched: Mapping[str, tuple[str, float]]) -> str:
    """Return the figures of the watched sources in an evaluation, and how far they have moved.

    >>> sources_line({"retain/news/accuracy": 0.75}, {"news": ("accuracy", 0.8)})
    '; watched: news accuracy 75.0 % (-5.0 points)'
    """
    shown = []
    for name, (metric, before) in watched.items():
        value = row.get(f"retain/{name}/{metric}")
        line = f"{name} {readable.words(metric)} {readable.figure(metric, value)}"
        change = "" if value is None else f" ({readable.difference(metric, value - before)})"
        shown.append(line + change)
    return "; watched: " + ", ".join(shown) if shown else ""


def progress_line(pace: paces.Pace, row: Row) -> str:
    """Return where a run is, in one line.

    >>> pace = paces.Pace((paces.Planned("head", 10),), done=3, first=(0.0, 1), last=1.0,
    ...     step_seconds=0.5, examples=32, unit_seconds=0.5)
    >>> progress_line(pace, {"phase": "head", "loss": 0.5, "rate/head": 1e-3})
    'head 3/10, loss 0.500, 64 examples/s, rate 1e-03, 0:04 left, whole plan at most 0:04'
    """
    return f"{row['phase']} {pace.done}/{pace.plan[pace.index].steps}, " + ", ".join(
        _pieces(pace, row, "examples/s", "whole plan at most ")
    )


def _pieces(pace: paces.Pace, row: Row, per_second: str, bound: str) -> list[str]:
    loss = row.get("loss")
    speed = paces.examples_per_second(pace)
    rates = [value for name, value in row.items() if name.startswith("rate/")]
    return [
        "loss " + ("not finite" if loss is None else f"{loss:.3f}"),
        f"{readable.count(speed)} {per_second}",
        f"rate {readable.rate(max(rates)) if rates else readable.NOTHING}",
        readable.clock(paces.phase_seconds_left(pace)) + " left",
        bound + readable.clock(paces.plan_seconds_left(pace)),
    ]


def _figures(row: Row, metric: str) -> str:
    shown = [f"validation {readable.words(metric)} {readable.figure(metric, row.get(metric))}"]
    if metric != "loss" and "loss" in row:
        shown.append(f"loss {readable.figure('loss', row['loss'])}")
    return ", ".join(shown)


def _ended(row: Row, metric: str) -> str:
    before, after = (
        readable.figure(metric, row.get(key)) for key in ("metric_before", "metric_after")
    )
    pieces = [f"{readable.words(metric)} {before.removesuffix(' %')} to {after}"]
    pieces.append(readable.plural(row.get("steps", 0), "step"))
    if row.get("stopped") == "no rise":
        pieces.append("stopped as it rose no more")
    if row.get("seconds") is not None:
        spent = f"compiling {readable.seconds(row.get('compile_seconds'))}"
        if row.get("stall_seconds") is not None:
            spent += f", stalled {readable.seconds(row['stall_seconds'])}"
        pieces.append(f"{readable.seconds(row['seconds'])} ({spent})")
    if row.get("held_bit_equal") is not None:
        pieces.append("held bits equal" if row["held_bit_equal"] else "HELD BITS CHANGED")
    return ", ".join(pieces)


@contextlib.contextmanager
def _lines(out: Any, every: float | int, now: Callable[[], float | int]) -> Iterator[Any]:
    last = now()

    def draw(pace: paces.Pace, row: Row) -> None:
        nonlocal last
        if row["kind"] == "step" and now() - last >= every:
            last = now()
            say(out, "  " + progress_line(pace, row))

    yield draw


@contextlib.contextmanager
def _bar(planned: Sequence[paces.Planned], out: Any) -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6)),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pieces]}", markup=False),
    )
    with Progress(*columns, console=out, transient=True, expand=True) as bar:
        task = bar.add_task("", total=None, pieces="", visible=False)

        def draw(pace: paces.Pace, row: Row) -> None:
            steps = planned[pace.index].steps
            if row["kind"] == "phase_start":
                fields = {"description": row["phase"], "pieces": "compiling"}
                bar.reset(task, total=steps, visible=True, **fields)
            elif row["kind"] == "step":
                pieces = _pieces(pace, row, "ex/s", "plan < ")
                if out.width < _ROOM_FOR_RATE:
                    pieces = [piece for piece in pieces if not piece.startswith("rate ")]
                fields = {"description": row["phase"], "pieces": "  ".join(pieces)}
                bar.update(task, completed=pace.done, total=steps, visible=True, **fields)
            elif row["kind"] == "phase_end":
                bar.update(task, visible=False)
            if row["kind"] != "step":
                bar.refresh()

        yield draw
