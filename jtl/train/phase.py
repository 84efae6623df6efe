"""One phase of a run: its steps and evaluations, from where it stands to its end.

A step is started before the metrics of the one before it are read, so the device always has work. A
step that was not finite changes nothing, nor do those after it (`TrainState.finite`), so that to
hear of it late loses nothing.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jtl import trees
from jtl.train import average, coming
from jtl.train import progress as rules
from jtl.train.checkpoint import Checkpoints
from jtl.train.coming import Coming, Epoch
from jtl.train.feed import Ahead, Feed
from jtl.train.fit import fit
from jtl.train.held import check_held, digests
from jtl.train.interrupt import between
from jtl.train.late import Late
from jtl.train.plan import Phase, Plan, length
from jtl.train.prefetch import prefetched
from jtl.train.progress import Progress
from jtl.train.resume import At, own_weights, put_weights, save_at
from jtl.train.state import Batch, TrainState


class Event(NamedTuple):
    """Something that happened in a run.

    Attributes:
        kind: "phase_start", "step", "shares", "evaluation", "phase_end" or "skipped".
        step: steps taken in the whole run.
        phase: name of the phase.
        state: the state now; the next step takes its arrays, so copy what is to be kept.
        metrics: of a step or an evaluation, as floats; what is known of a phase at its start and
            end. Those of a step, and the shares of its terms (`train.shares`), are read from the
            device when they are looked at: look after the next step, and nothing waits.
        progress: where the run is; its `history` has a row for each phase that ended.
    """

    kind: str
    step: int
    phase: str
    state: TrainState
    metrics: Mapping[str, Any]
    progress: Progress


class Job(NamedTuple):
    """What stays as it is in a run; see `run` for each."""

    plan: Plan
    labels: Any
    feed: Callable[..., Feed]
    evaluate: Callable[..., Mapping[str, Any]]
    metric: str
    make: coming.Make
    explain: Callable[[TrainState, Phase, Batch], Exception]
    checkpoints: Checkpoints | None
    save_every: int | None
    put: Callable[[Batch], Any]
    ahead: Ahead | None
    measure: coming.Measure
    pool: Any = None


class Border(NamedTuple):
    """What a phase leaves to the next.

    Attributes:
        since: `time.perf_counter()` when its last step, or the evaluation after it, had ended.
        digests: of what was held in it, bits that need not be read again.
        coming: steps of the phases that may follow.
    """

    since: float
    digests: Mapping[str, str] = {}
    coming: Coming = {}


def run_phase(
    job: Job, at: At, phase: Phase, border: Border
) -> Generator[Event, None, tuple[At, Border]]:
    """Run a phase from where it is to its end; return where the run is then."""
    before, began = at.progress, time.perf_counter()
    times = {"paused": 0.0}
    step: Any = None

    def timed(at: At) -> At:
        spent = time.perf_counter() - began, getattr(step, "seconds", 0.0)
        return at._replace(progress=rules.spend(at.progress, before, *spent))

    try:
        feed = job.feed(phase.live, at.state.params, at.state.stats)
        epoch = Epoch(feed.steps_per_epoch, feed.examples_per_epoch)
        total = length(phase, *epoch)
        step, waited = coming.taken(border.coming, job.make, phase, epoch)
        at = at if at.progress.entered else _entered(job, at, phase, border.digests)
        yield event_of("phase_start", at, phase, {"live": sorted(phase.live), "steps": total})
        later: Coming | None = None
        with contextlib.closing(_stream(job, at, phase, feed, step, total)) as stream:
            save, unread = False, None
            while True:
                if rules.due(at.progress, total, feed.steps_per_epoch):
                    _check(job, timed(at), phase, feed, unread)
                    pause, unread = time.perf_counter(), None
                    at, figures = _evaluated(job, at, phase)
                    times["paused"] += time.perf_counter() - pause
                    yield event_of("evaluation", at, phase, figures)
                    save = True
                if rules.over(at.progress, phase, total):
                    break
                if save:
                    save_at(job.checkpoints, timed(at))
                state, metrics, shares = next(stream, (None, {}, None))
                newest = at if state is None else at._replace(state=state)
                _check(job, timed(newest), phase, feed, unread)
                if state is None:
                    raise ValueError(_ended(phase, at.progress.step))
                times.setdefault("border", time.perf_counter() - border.since - times["paused"])
                at, unread = At(state, rules.advance(at.progress), at.best), Late(metrics)
                yield event_of("step", at, phase, unread)
                if shares is not None:
                    yield event_of("shares", at, phase, Late(shares))
                if later is None:
                    nearest = coming.candidates(job.plan, at.progress)
                    later = coming.prepare(
                        *(job.pool, job.ahead, job.make, nearest, at.state),
                        begun=border.coming,
                        measure=job.measure,
                    )
                save = job.save_every is not None and at.progress.step % job.save_every == 0
        ended = time.perf_counter()
        at, held = _left(job, timed(at), phase, total)
        spent = {"border_seconds": times.get("border", 0.0), "compile_wait_seconds": waited}
        at = _with_row(at, feed, step, spent)
        save_at(job.checkpoints, at)
    except BaseException:
        save_at(job.checkpoints, timed(at), wait=True)
        raise
    yield event_of("phase_end", at, phase, at.progress.history[-1])
    return at, Border(ended, held, later or {})


def event_of(kind: str, at: At, phase: Phase, metrics: Mapping[str, Any]) -> Event:
    """Return the event of what happened at a place of the run."""
    step = at.progress.phase_start if kind == "phase_start" else at.progress.step
    return Event(kind, step, phase.name, at.state, metrics, at.progress)


def _stream(job: Job, at: At, phase: Phase, feed: Feed, step: Any, total: int) -> Any:
    """Return (state, metrics, shares) of step after step to the end of a phase."""
    start, number = at.progress.phase_start, at.progress.step
    batches = itertools.islice(feed.batches(number), max(0, start + total - number))
    shares, since = job.measure(phase.live), itertools.count(number - start)

    def before(state: TrainState, batch: Batch) -> Any:
        due = shares is not None and shares.due(next(since))
        return shares.call(state, batch, 0) if shares is not None and due else None

    placed = prefetched(batches, job.put)
    return between(fit(at.state, placed, step, start=jnp.int32(start), before=before))


def _entered(job: Job, at: At, phase: Phase, known: Mapping[str, str]) -> At:
    state = average.restarted(at.state, job.labels, phase.live)
    progress = rules.enter(at.progress, digests(state, job.labels, phase.live, known=known))
    if phase.until is None or progress.metric is None:
        return At(state, progress)
    return At(state, progress, own_weights(state, job.labels, phase.live))


def _evaluated(job: Job, at: At, phase: Phase) -> tuple[At, dict[str, float]]:
    weights = average.weights(at.state, job.labels, phase.live)
    values = job.evaluate(*weights, phase.live)
    figures = {name: float(value) for name, value in values.items()}
    progress = rules.judge(at.progress, rules.figure(figures, job.metric), phase)
    if phase.until is None or progress.best_step < progress.step:
        return at._replace(progress=progress), figures
    return At(at.state, progress, own_weights(at.state, job.labels, phase.live)), figures


def _left(job: Job, at: At, phase: Phase, total: int) -> tuple[At, dict[str, str]]:
    """Put the best weights in place, and prove that what was held kept its bits."""
    state, progress = at.state, at.progress
    last = phase.until is None or progress.best_step == progress.step
    if not last or state.ema:
        kept = at.best if phase.until else own_weights(state, job.labels, phase.live)
        state = put_weights(state, kept, job.labels, phase.live)
    held = digests(state, job.labels, phase.live)
    check_held(progress.held, held, phase.name)
    return At(state, rules.leave(progress, phase, total, {"held_bit_equal": True})), held


def _with_row(at: At, feed: Feed, step: Any, times: Mapping[str, float]) -> At:
    """Fill in the last row of the history: what the phase came to cost."""
    *earlier, row = at.progress.history
    flops = getattr(step, "flops", 0.0)
    row = {
        **row,
        "epochs": row["steps"] / feed.steps_per_epoch,
        "flops_per_step": flops if math.isfinite(flops) and flops > 0 else None,
        "optimizer_bytes": trees.size_bytes(at.state.opt_state),
        "compilations": len(getattr(step, "compiled", ())),
        **times,
        **feed.account,
    }
    row["compile_wait_seconds"] += getattr(step, "waited", 0.0)
    row["stall_seconds"] = row["border_seconds"] - row.get("derive_seconds", 0.0)
    return at._replace(progress=dataclasses.replace(at.progress, history=(*earlier, row)))


def _check(job: Job, at: At, phase: Phase, feed: Feed, unread: Late | None) -> None:
    """Raise for a step that was not finite, its state saved."""
    if unread is not None and not unread["finite"]:
        save_at(job.checkpoints, at, wait=True)
        batch = next(iter(feed.batches(int(at.state.step))))
        raise job.explain(at.state, phase, batch)


def _ended(phase: Phase, step: int) -> str:
    return (
        f"the batches of phase {phase.name!r} ended at step {step}; a feed gives batches without "
        "end; go over the data again from its start"
    )
