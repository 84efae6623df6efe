"""Train a model on one task: terms, derived columns, devices and phases put together."""

import pathlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jtl.penalties import agem
from jtl.recipes import supply
from jtl.recipes.job import Job, Settings
from jtl.recipes.streams import own_rows
from jtl.recipes.supply import Supply
from jtl.recipes.terms import Part, Start
from jtl.train import checkpoint, parallel, plan, run, step
from jtl.train.coming import Epoch
from jtl.train.state import Term

__all__ = ["Engine", "Job", "Settings", "make_engine", "make_parts"]


class Engine(NamedTuple):
    """A job made ready.

    Attributes:
        events: the run; nothing happens before it is iterated.
        features: `part -> out["pooled"]` (n, dim) of the start model.
        epoch: steps and examples of one pass over the training data.
        checkpoints: open; None where none are kept.
    """

    events: Generator[run.Event, None, None]
    features: Callable[[str], np.ndarray]
    epoch: Epoch
    checkpoints: Any


def make_parts(
    job: Job,
    penalties: Sequence[Callable[..., Part]],
    kept: Sequence[str],
    classes: Mapping[str, tuple[str, ...]] | None = None,
) -> list[Part]:
    """Return the penalties made for the start model of a job.

    Args:
        job: what is to be trained.
        penalties: `Start -> Part`.
        kept: trained heads of the start.
        classes: {kept head: names of its classes}, where they are known.
    """
    live = plan.ever_live(job.plan)
    key = jax.random.fold_in(jax.random.key(job.seed), 2)
    start = Start(job.model, tuple(kept), live, {}, key, classes=classes or {})
    made = [penalty(start) for penalty in penalties]
    return [part for part in made if part is not None]


def make_engine(
    job: Job,
    settings: Settings,
    *,
    parts: Sequence[Part] = (),
    folder: pathlib.Path | None = None,
    config: Mapping[str, Any] | None = None,
    retained: Callable[..., Mapping[str, float]] | None = None,
) -> Engine:
    """Return the run of a job, and the frozen features of its start.

    Args:
        job: what to train.
        settings: how.
        parts: penalties beside the task's loss.
        folder: of checkpoints, from which an interrupted run goes on; None saves none.
        config: what the checkpoints are of; those of another config are refused.
        retained: `(params, stats, live) -> figures` that an evaluation gives beside the task's.

    Raises:
        ValueError: the plan, the sizes or the way of running do not fit; two parts of one name, or
            two that both watch or both project.
    """
    plan.check_plan(job.plan, (*job.model.groups, *job.model.heads))
    spread = _spread(settings)
    ready = supply.make_supply(job, settings, spread, parts)
    plan.check_spans(job.plan, *supply.epoch(ready))
    kept = None
    if folder is not None:
        kept = checkpoint.open_checkpoints(folder, fingerprint={"config": dict(config or {})})
    # Weights that a resumed run brings are not the start's: its columns are computed from them.
    resumes = kept is not None and checkpoint.latest(kept) is not None
    first = supply.make_views(job, settings, ready.train) if resumes else ready.views
    events = _events(ready, parts, kept, retained)
    features = lambda part: supply.features(ready, first, part)  # noqa: E731
    return Engine(events, features, supply.epoch(ready), kept)


def _spread(settings: Settings) -> parallel.Spread:
    """Return how the run lies on its devices, the batch size checked."""
    size, accumulate = settings.batch_size, settings.accumulate
    if accumulate < 1 or size % accumulate:
        raise ValueError(
            f"a batch of {size} rows is taken in accumulate={accumulate} microbatches; give a "
            "number that divides the batch size"
        )
    spread = parallel.make_spread(settings.parallel)
    parallel.check_batch_size(spread, size, accumulate=accumulate)
    return spread


def _events(
    ready: Supply,
    parts: Sequence[Part],
    kept: Any,
    retained: Callable[..., Mapping[str, float]] | None,
) -> Generator[run.Event, None, None]:
    job, settings, spread, model = ready.job, ready.settings, ready.spread, ready.job.model
    labels = model.labels
    txs = dict.fromkeys(plan.ever_live(job.plan), settings.optimizer)
    watch, project = _watch(parts), _project(parts)
    begin = run.start_state(
        *(model.params, model.stats, job.plan),
        txs=txs,
        labels=labels,
        refs=_refs(parts),
        ema=settings.ema,
        watch=watch,
        key=jax.random.fold_in(jax.random.key(job.seed), 1),
    )
    begin = parallel.place(spread, begin)

    def make(*args: Any, **options: Any) -> Any:
        made = step.make_step(*args, **options, axis_name=spread.axis_name)
        return parallel.compiled(spread, made)

    def evaluate(params: Any, stats: Any, live: frozenset[str]) -> dict[str, float]:
        own = supply.score(ready, params, stats, live)
        return {**own, **(retained(params, stats, live) if retained else {})}

    return run.run(
        begin,
        job.plan,
        apply=(model if spread.axis_name is None else model.on_axis(spread.axis_name)).apply,
        terms=_terms(job, parts),
        txs=txs,
        labels=labels,
        feed=lambda live, params, stats: supply.feed(ready, live, params, stats),
        evaluate=evaluate,
        metric=job.task.metric,
        clip=settings.clip,
        accumulate=settings.accumulate,
        ema=settings.ema,
        watch=watch,
        project=project,
        shares_every=settings.shares_every,
        checkpoints=kept,
        save_every=settings.save_every,
        make=make,
        put=lambda batch: parallel.put(spread, batch),
        ahead=supply.ahead(ready, begin),
        locate=model.locate,
        alone=model.apply,
    )


def _terms(job: Job, parts: Sequence[Part]) -> dict[str, Term]:
    """Return the terms of task and parts, each over the rows that are its own."""
    terms = {job.task.kind: job.task.term(job.head)}
    found = {part.name: part.term for part in parts if part.term is not None}
    names = [*terms, *(part.name for part in parts)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"penalties bear the names {names[1:]} beside the task's {names[0]!r}, and {twice} "
            "come twice; give each penalty once, or parts of other names"
        )
    mixed = [part.name for part in parts if part.stream is not None]
    if not mixed:
        return terms | found
    number = {name: k for k, name in enumerate(mixed, 1)}
    return {n: own_rows(term, number.get(n, 0)) for n, term in (terms | found).items()}


def _refs(parts: Sequence[Part]) -> dict[str, Any]:
    """Return the arrays that the parts read, by names that must be their own."""
    names = [name for part in parts for name in part.refs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"the penalties {[part.name for part in parts]} read refs {names}, and {twice} come "
            "twice; give the refs of each penalty names of their own"
        )
    return {name: value for part in parts for name, value in part.refs.items()}


def _watch(parts: Sequence[Part]) -> Any:
    """Return the transform that watches the updates, None where no part has one."""
    found = _at_most_one([part for part in parts if part.watch is not None], "watch the updates")
    return None if found is None else found.watch


def _project(parts: Sequence[Part]) -> Any:
    """Return the reference term and the projection, None where no part is a reference."""
    found = _at_most_one([part for part in parts if part.project], "project the gradient")
    if found is None or found.term is None:
        return None
    return (found.name,), agem.project


def _at_most_one(parts: Sequence[Part], what: str) -> Part | None:
    if len(parts) > 1:
        raise ValueError(
            f"the penalties {[part.name for part in parts]} all {what}, and a step does that for "
            "one; leave one of them"
        )
    return parts[0] if parts else None
