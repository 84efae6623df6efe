"""Run a plan: phase after phase as one generator of events, resumable at every step.

    for event in run(state, plan, ...):
        print(event.kind, event.phase, event.step, event.metrics)

Logging, tables and stopping are plain lines of that loop.
"""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jtl import trees
from jtl.train import failure, schedules
from jtl.train import progress as rules
from jtl.train.checkpoint import Checkpoints
from jtl.train.compile import make_compiled
from jtl.train.fit import fit
from jtl.train.held import check_held, digests
from jtl.train.interrupt import between
from jtl.train.optimizer import phase_optimizer
from jtl.train.plan import Phase, Plan, check_plan, ever_live, length
from jtl.train.progress import Progress
from jtl.train.resume import At, own_weights, put_weights, resumed, save_at
from jtl.train.state import Apply, Batch, Term, TrainState, create
from jtl.train.step import make_step


class Feed(NamedTuple):
    """The training data of a phase.

    Attributes:
        batches: `step -> iterator of batches` from that step of the whole run on, without end. The
            batch at a step depends on nothing but the step.
        steps_per_epoch: length of an epoch.
    """

    batches: Callable[[int], Iterator[Batch]]
    steps_per_epoch: int


class Event(NamedTuple):
    """Something that happened in a run.

    Attributes:
        kind: "phase_start", "step", "evaluation", "phase_end" or "skipped".
        step: steps taken in the whole run.
        phase: name of the phase.
        state: the state now; the next step takes its arrays, so copy what is to be kept.
        metrics: floats of a step or an evaluation; what is known of a phase at its start and end.
        progress: where the run is; its `history` has a row for each phase that ended.
    """

    kind: str
    step: int
    phase: str
    state: TrainState
    metrics: dict[str, Any]
    progress: Progress


class _Job(NamedTuple):
    """What stays as it is in a run."""

    plan: Plan
    labels: Any
    feed: Callable[..., Feed]
    evaluate: Callable[..., Mapping[str, Any]]
    metric: str
    make: Callable[[Phase, int], Any]
    explain: Callable[[TrainState, Phase, Batch], Exception]
    checkpoints: Checkpoints | None
    save_every: int | None


def start_state(
    params: PyTree,
    stats: PyTree,
    plan: Plan,
    *,
    txs: Mapping[str, Any],
    labels: PyTree[str],
    refs: Any = None,
    key: jax.Array,
) -> TrainState:
    """Return the state before the first step of a plan; the arrays are copied.

    Args:
        params: all parameters.
        stats: running statistics, {} for none.
        plan: the phases.
        txs: a transform at unit rate for each label that moves in some phase.
        labels: tree of labels of the parameters.
        refs: arrays that terms read, by name.
        key: the run's key.
    """
    tx = phase_optimizer(txs, labels, plan[0].live, ever_live(plan))
    return create(params, stats, tx, refs=refs, key=key)


def run(
    state: TrainState,
    plan: Plan,
    *,
    apply: Apply,
    terms: Mapping[str, Term],
    txs: Mapping[str, Any],
    labels: PyTree[str],
    feed: Callable[[frozenset[str], Any, Any], Feed],
    evaluate: Callable[[Any, Any, frozenset[str]], Mapping[str, Any]],
    metric: str,
    clip: float | None = None,
    accumulate: int = 1,
    checkpoints: Checkpoints | None = None,
    save_every: int | None = None,
    make: Callable[..., Any] | None = None,
    locate: Callable[[Any, Any, Any], str | None] | None = None,
) -> Generator[Event, None, None]:
    """Run the phases of a plan, and yield what happens.

    The metric is evaluated before the first step, after each epoch and at the end of each phase.
    Where `checkpoints` holds one, the run goes on from it: the same bits come out as without the
    interruption. A run that goes on at a border of phases yields the last "phase_end" once more.
    Whatever ends it early, an error, Ctrl-C or `close()`, the last good state is saved first; for a
    Ctrl-C in the body of the loop, hold the generator in `contextlib.closing`.

    Args:
        state: as `start_state` makes it; its arrays are taken.
        plan: the phases.
        apply: `(params, stats, batch, *, key, live) -> (out, stats)`.
        terms: {name: `Context -> (sum, weight)`}, added up to the loss.
        txs: {label: transform at unit rate}.
        labels: tree of labels of the parameters.
        feed: `(live, params, stats) -> Feed`, called when a phase begins or goes on. What it holds
            is then what it is in the whole phase.
        evaluate: `(params, stats, live) -> {name: figure}` on validation data.
        metric: the figure that phases go by; higher is better.
        clip: greatest norm of the gradient over live leaves.
        accumulate: microbatches a step.
        checkpoints: an open folder, which stays open; None saves nothing.
        save_every: steps between saves, beside those after each evaluation.
        make: `(apply, terms, tx, labels, rates, *, clip, accumulate) -> compiled step`; None makes
            the step for one program, compiled by `jit`.
        locate: `(params, stats, batch) -> name of the first block that is not finite`, for errors.

    Raises:
        ValueError: at once: the plan does not fit the labels, or checkpoints of another plan or
            model. While running: a metric that the evaluation lacks, batches that end, a held array
            that changed.
        NonFiniteError: a loss or gradient that is not finite, with step, term and block.
    """
    check_plan(plan, jax.tree.leaves(labels))
    if save_every is not None and save_every < 1:
        raise ValueError(f"save_every is {save_every}; give a number of steps, or None")
    ever = ever_live(plan)

    def make_phase(phase: Phase, total: int) -> Any:
        rates = {name: schedules.resolve(r, total) for name, r in phase.rates.items()}
        tx = phase_optimizer(txs, labels, phase.live, ever)
        build = _make if make is None else make
        return build(apply, terms, tx, labels, rates, clip=clip, accumulate=accumulate)

    def explain(state: TrainState, phase: Phase, batch: Batch) -> Exception:
        options = {"labels": labels, "live": phase.live, "locate": locate}
        return failure.explain(apply, terms, state, batch, **options)

    start = Progress(tuple(phase.name for phase in plan), step=int(state.step))
    job = _Job(plan, labels, feed, evaluate, metric, make_phase, explain, checkpoints, save_every)
    return _run(job, resumed(checkpoints, At(state, start), plan, labels))


def _run(job: _Job, at: At) -> Generator[Event, None, None]:
    if at.progress.history and not at.progress.entered:
        last = at.progress.history[-1]
        phase = job.plan[at.progress.phase - 1]
        yield _event("skipped" if last.get("skipped") else "phase_end", at, phase, last)
    while at.progress.phase < len(job.plan):
        phase = job.plan[at.progress.phase]
        if phase.series in at.progress.ended:
            at = at._replace(progress=rules.skip(at.progress, phase))
            yield _event("skipped", at, phase, at.progress.history[-1])
        else:
            at = yield from _phase(job, at, phase)


def _phase(job: _Job, at: At, phase: Phase) -> Generator[Event, None, At]:
    """Run a phase from where it is to its end; return where the run is then."""
    before, began = at.progress, time.perf_counter()
    step: Any = None

    def timed(at: At) -> At:
        spent = time.perf_counter() - began, getattr(step, "seconds", 0.0)
        return at._replace(progress=rules.spend(at.progress, before, *spent))

    try:
        feed = job.feed(phase.live, at.state.params, at.state.stats)
        total = length(phase, feed.steps_per_epoch)
        step = job.make(phase, total)
        at = at if at.progress.entered else _entered(job, at, phase)
        yield _event("phase_start", at, phase, {"live": sorted(phase.live), "steps": total})
        with contextlib.closing(_stream(at, feed, step)) as stream:
            save = False
            while True:
                if rules.due(at.progress, total, feed.steps_per_epoch):
                    at, figures = _evaluated(job, at, phase)
                    yield _event("evaluation", at, phase, figures)
                    save = True
                if rules.over(at.progress, phase, total):
                    break
                if save:
                    save_at(job.checkpoints, timed(at))
                state, metrics = next(stream, _ENDED)
                if not metrics["finite"]:
                    _refuse(job, timed(at), phase, feed, state)
                at = At(state, rules.advance(at.progress), at.best)
                yield _event("step", at, phase, metrics)
                save = job.save_every is not None and at.progress.step % job.save_every == 0
        at = _left(job, timed(at), phase, total, feed.steps_per_epoch, step)
        save_at(job.checkpoints, at)
    except BaseException:
        save_at(job.checkpoints, timed(at), wait=True)
        raise
    yield _event("phase_end", at, phase, at.progress.history[-1])
    return at


_ENDED: Any = (None, {"finite": False})


def _event(kind: str, at: At, phase: Phase, metrics: Mapping[str, Any]) -> Event:
    step = at.progress.phase_start if kind == "phase_start" else at.progress.step
    return Event(kind, step, phase.name, at.state, dict(metrics), at.progress)


def _stream(at: At, feed: Feed, step: Any) -> Any:
    """Return (state, metrics) of step after step of a phase, without end."""
    start = jnp.int32(at.progress.phase_start)
    return between(_on_host(fit(at.state, feed.batches(at.progress.step), step, start=start)))


def _on_host(stream: Iterator[tuple[TrainState, Any]]) -> Iterator[tuple[TrainState, Any]]:
    """Wait for the metrics of each step: one that is not finite must be the last."""
    for state, metrics in stream:
        yield state, {name: value.item() for name, value in jax.device_get(metrics).items()}


def _entered(job: _Job, at: At, phase: Phase) -> At:
    progress = rules.enter(at.progress, digests(at.state, job.labels, phase.live))
    if phase.until is None or progress.metric is None:
        return at._replace(progress=progress, best=None)
    return At(at.state, progress, own_weights(at.state, job.labels, phase.live))


def _evaluated(job: _Job, at: At, phase: Phase) -> tuple[At, dict[str, float]]:
    values = job.evaluate(at.state.params, at.state.stats, phase.live)
    figures = {name: float(value) for name, value in values.items()}
    progress = rules.judge(at.progress, rules.figure(figures, job.metric), phase)
    if phase.until is None or progress.best_step < progress.step:
        return at._replace(progress=progress), figures
    return At(at.state, progress, own_weights(at.state, job.labels, phase.live)), figures


def _left(job: _Job, at: At, phase: Phase, total: int, steps_per_epoch: int, step: Any) -> At:
    """Restore the best weights, prove that what was held kept its bits, and write the row."""
    state, progress = at.state, at.progress
    if phase.until is not None and progress.best_step < progress.step:
        state = put_weights(state, at.best, job.labels, phase.live)
    check_held(progress.held, digests(state, job.labels, phase.live), phase.name)
    flops = getattr(step, "flops", 0.0)
    row = {
        "epochs": (progress.step - progress.phase_start) / steps_per_epoch,
        "flops_per_step": flops if math.isfinite(flops) and flops > 0 else None,
        "optimizer_bytes": trees.size_bytes(state.opt_state),
        "held_bit_equal": True,
    }
    return At(state, rules.leave(progress, phase, total, row))


def _refuse(job: _Job, at: At, phase: Phase, feed: Feed, state: TrainState | None) -> NoReturn:
    """Raise for batches that ended, and for a step that was not finite, its state saved."""
    number = at.progress.step
    if state is None:
        raise ValueError(
            f"the batches of phase {phase.name!r} ended at step {number}; a feed gives batches "
            "without end; go over the data again from its start"
        )
    good = state._replace(step=state.step - 1)
    save_at(job.checkpoints, at._replace(state=good), wait=True)
    raise job.explain(good, phase, next(iter(feed.batches(number))))


def _make(apply: Any, terms: Any, tx: Any, labels: Any, rates: Any, **options: Any) -> Any:
    return make_compiled(make_step(apply, terms, tx, labels, rates, **options))
