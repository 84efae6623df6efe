"""Run a plan: phase after phase as one generator of events, resumable at every step.

    for event in run(state, plan, ...):
        print(event.kind, event.phase, event.step, event.metrics)

Logging, tables and stopping are plain lines of that loop.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from jtl import masks
from jtl.train import failure, schedules, watched
from jtl.train import progress as rules
from jtl.train.checkpoint import Checkpoints
from jtl.train.coming import Coming, Epoch, prepare
from jtl.train.compile import in_background, make_compiled
from jtl.train.feed import Ahead, Feed
from jtl.train.memory import give_back_memory
from jtl.train.optimizer import phase_optimizer
from jtl.train.phase import Border, Event, Job, event_of, run_phase
from jtl.train.plan import Phase, Plan, check_plan, ever_live, length
from jtl.train.progress import Progress
from jtl.train.resume import At, resumed
from jtl.train.shares import Shares, compiled, make_shares
from jtl.train.state import Apply, Batch, Term, TrainState, create
from jtl.train.step import make_step

__all__ = ["Ahead", "Event", "Feed", "run", "start_state"]


def start_state(
    params: PyTree,
    stats: PyTree,
    plan: Plan,
    *,
    txs: Mapping[str, Any],
    labels: PyTree[str],
    refs: Any = None,
    ema: float | None = None,
    watch: Any = None,
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
        ema: as `run` is given it; a number keeps a moving average of what moves in some phase.
        watch: as `run` is given it.
        key: the run's key.
    """
    ever = ever_live(plan)
    tx = phase_optimizer(txs, labels, plan[0].live, ever)
    averaged = None if ema is None else masks.mask(labels, ever)
    seen = None if watch is None else watched.begin(watch, params, labels, ever)
    return create(params, stats, tx, refs=refs, averaged=averaged, watch=seen, key=key)


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
    ema: float | None = None,
    watch: Any = None,
    project: Any = None,
    shares_every: int | None = None,
    checkpoints: Checkpoints | None = None,
    save_every: int | None = None,
    make: Callable[..., Any] | None = None,
    put: Callable[[Batch], Any] = jax.device_put,
    ahead: Ahead | None = None,
    locate: Callable[[Any, Any, Any], str | None] | None = None,
    alone: Apply | None = None,
) -> Generator[Event, None, None]:
    """Run the phases of a plan, and yield what happens.

    The metric is evaluated before the first step, after each epoch and at the end of each phase.
    Where `checkpoints` holds one, the run goes on from it: the same bits come out as without the
    interruption. A run that goes on at a border of phases yields the last "phase_end" once more.
    Whatever ends it early, an error, Ctrl-C or `close()`, the last good state is saved first; for a
    Ctrl-C in the body of the loop, hold the generator in `contextlib.closing`.

    A step is started before the metrics of the one before it are read. If `ahead` is given, the
    steps of the first two phases are compiled in a thread from the call of `run` on, and those of
    the phases that may follow while a phase runs.

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
        ema: decay of the moving average of the live weights, which is then what is evaluated and
            what a phase leaves (`train.average`); None keeps none. As given to `start_state`.
        watch: transform that sees each update as it was applied (`make_step`); what it came to is
            `event.state.watch`, over the leaves that move in some phase. As given to `start_state`.
        project: (names of reference terms, `(grads, reference_grads) -> grads`), see `make_step`.
        shares_every: steps between events "shares", which tell how much of the gradient is each
            term's (`train.shares`), the first step of a phase being one; None gives none, nor does
            a run of one term. The numbers of the run are the same with and without.
        checkpoints: an open folder, which stays open; None saves nothing.
        save_every: steps between saves, beside those after each evaluation.
        make: `(apply, terms, tx, labels, rates, **options of make_step) -> compiled step`; None
            makes the step for one program, compiled by `jit`.
        put: starts the transfer of a batch to the devices.
        ahead: what is known of phases before they begin; None compiles each when it begins.
        locate: `(params, stats, batch) -> name of the first block that is not finite`, for errors.
        alone: the same forward pass for one program, where that of the step is for `pmap`.

    Raises:
        ValueError: at once: the plan does not fit the labels, or checkpoints of another plan or
            model. While running: a metric that the evaluation lacks, batches that end, a held array
            that changed.
        NonFiniteError: a loss or gradient that is not finite, with step, term and block.
    """
    check_plan(plan, jax.tree.leaves(labels))
    for name, every in {"save_every": save_every, "shares_every": shares_every}.items():
        if every is not None and every < 1:
            raise ValueError(f"{name} is {every}; give a number of steps, or None")
    ever = ever_live(plan)

    def make_phase(phase: Phase, epoch: Epoch) -> Any:
        units = {"steps_per_epoch": epoch.steps, "examples_per_epoch": epoch.examples}
        total = length(phase, *epoch)
        rates = {name: schedules.resolve(r, total, **units) for name, r in phase.rates.items()}
        tx = phase_optimizer(txs, labels, phase.live, ever)
        build = _make if make is None else make
        seen = {"watch": watch, "ever_live": ever, "project": project}
        options = {"clip": clip, "accumulate": accumulate, "ema": ema, **seen}
        return build(apply, terms, tx, labels, rates, **options)

    @functools.cache
    def measure(live: frozenset[str]) -> Shares | None:
        if shares_every is None or len(terms) < 2:
            return None
        reference = () if project is None else project[0]
        options = {"reference": tuple(reference), "accumulate": accumulate}
        found = make_shares(alone or apply, terms, labels, live, **options)
        return Shares(compiled(found), shares_every)

    def explain(state: TrainState, phase: Phase, batch: Batch) -> Exception:
        options = {"labels": labels, "live": phase.live, "locate": locate}
        return failure.explain(apply, terms, state, batch, **options)

    start = Progress(tuple(phase.name for phase in plan), step=int(state.step))
    job = Job(
        plan=plan,
        labels=labels,
        feed=feed,
        evaluate=evaluate,
        metric=metric,
        make=make_phase,
        explain=explain,
        checkpoints=checkpoints,
        save_every=save_every,
        put=put,
        ahead=ahead,
        measure=measure,
    )
    at, background = resumed(checkpoints, At(state, start), plan, labels), contextlib.ExitStack()
    job = job._replace(pool=background.enter_context(in_background()))
    events = _run(job, at, _first(job, at), background)
    next(events)  # begun, so that `close` ends the thread too if nobody iterates
    return events


def _first(job: Job, at: At) -> Coming:
    """Have the phases that come first compiled already, whatever happens until the run begins."""
    first = job.plan[at.progress.phase : at.progress.phase + 2]
    cold = None if job.ahead is None else job.ahead._replace(warm=None)  # evaluated at once
    return prepare(job.pool, cold, job.make, first, at.state, measure=job.measure)


def _run(
    job: Job, at: At, coming: Coming, background: contextlib.ExitStack
) -> Generator[Any, None, None]:
    with background:
        yield None
        if at.progress.history and not at.progress.entered:
            last = at.progress.history[-1]
            phase = job.plan[at.progress.phase - 1]
            yield event_of("skipped" if last.get("skipped") else "phase_end", at, phase, last)
        border = Border(time.perf_counter(), coming=coming)
        while at.progress.phase < len(job.plan):
            phase = job.plan[at.progress.phase]
            if phase.series and phase.series in at.progress.ended:
                at = at._replace(progress=rules.skip(at.progress, phase))
                yield event_of("skipped", at, phase, at.progress.history[-1])
            else:
                give_back_memory()
                at, border = yield from run_phase(job, at, phase, border)


def _make(apply: Any, terms: Any, tx: Any, labels: Any, rates: Any, **options: Any) -> Any:
    return make_compiled(make_step(apply, terms, tx, labels, rates, **options))
