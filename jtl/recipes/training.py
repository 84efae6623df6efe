"""Train a model on one task: terms, derived columns and phases put together."""

import pathlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jtl import data as jdata
from jtl.models.model import Model
from jtl.recipes.datasets import EVALUATION_ROWS, Datasets, once
from jtl.recipes.tasks import Task
from jtl.recipes.terms import Part, Start
from jtl.recipes.views import View, make_view
from jtl.train import checkpoint, evaluate, parallel, plan, run, step

AXIS = "device"


class Job(NamedTuple):
    """One task to train.

    Attributes:
        model: the start, with the task's head attached.
        head: name of the task's head.
        task: loss and figures.
        datasets: "train" and "validation".
        plan: the phases.
        seed: of order and dropout.
    """

    model: Model
    head: str
    task: Task
    datasets: Datasets
    plan: Sequence[plan.Phase]
    seed: int


class Settings(NamedTuple):
    """How to train; see `fine_tune` for each."""

    optimizer: Any
    batch_size: int = 32
    clip: float | None = 1.0
    accumulate: int = 1
    parallel: str = "jit"
    save_every: int | None = None
    columns_mib: int = 2048


class Engine(NamedTuple):
    """A job made ready.

    Attributes:
        events: the run; nothing happens before it is iterated.
        features: `part -> out["pooled"]` (n, dim) of the start model.
        steps_per_epoch: of the training data.
        checkpoints: open; None where none are kept.
    """

    events: Generator[run.Event, None, None]
    features: Callable[[str], np.ndarray]
    steps_per_epoch: int
    checkpoints: Any


def make_parts(
    job: Job, penalties: Sequence[Callable[..., Part]], kept: Sequence[str]
) -> list[Part]:
    """Return the penalties made for the start model of a job; `kept` are its trained heads."""
    live = plan.ever_live(job.plan)
    key = jax.random.fold_in(jax.random.key(job.seed), 2)
    return [penalty(Start(job.model, tuple(kept), live, {}, key)) for penalty in penalties]


def make_engine(
    job: Job,
    settings: Settings,
    *,
    parts: Sequence[Part] = (),
    folder: pathlib.Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> Engine:
    """Return the run of a job, and the frozen features of its start.

    Args:
        job: what to train.
        settings: how.
        parts: penalties beside the task's loss.
        folder: of checkpoints, from which an interrupted run goes on; None saves none.
        config: what the checkpoints are of; those of another config are refused.

    Raises:
        ValueError: the plan, the sizes or the way of running do not fit.
    """
    model, task = job.model, job.task
    plan.check_plan(job.plan, (*model.groups, *model.heads))
    make, apply = _way(settings, model)
    if settings.accumulate < 1 or settings.batch_size % settings.accumulate:
        raise ValueError(
            f"a batch of {settings.batch_size} rows is taken in accumulate={settings.accumulate} "
            "microbatches; give a number that divides the batch size"
        )
    jdata.plan(job.datasets["train"], settings.batch_size)  # refuses a batch larger than the data
    train_set = _with_columns(job.datasets["train"], parts)
    lives = [frozenset({job.head}), *(phase.live for phase in job.plan)]

    def make_views() -> dict[str, View]:
        parts = (("train", train_set), ("validation", job.datasets["validation"]))
        budget = settings.columns_mib * 2**20
        return {
            part: make_view(
                model,
                dataset,
                lives,
                batch_size=min(EVALUATION_ROWS, dataset.size),
                budget_bytes=budget,
            )
            for part, dataset in parts
        }

    kept = None
    if folder is not None:
        kept = checkpoint.open_checkpoints(folder, fingerprint={"config": dict(config or {})})
    resumes = kept is not None and checkpoint.latest(kept) is not None
    views = make_views()
    # Weights that a resumed run brings are not the start's: its columns are computed from them.
    first = make_views() if resumes else views
    predict = evaluate.make_predict(model.apply, heads=(job.head,))
    truth = job.datasets["validation"].labels

    def feed(live: frozenset[str], params: Any, stats: Any) -> run.Feed:
        dataset = views["train"](live, params, stats)

        def batches(start: int) -> Iterator[dict[str, Any]]:
            return jdata.batches(dataset, settings.batch_size, seed=job.seed, start=start)

        return run.Feed(batches, jdata.steps_per_epoch(dataset, settings.batch_size))

    def score(params: Any, stats: Any, live: frozenset[str]) -> dict[str, float]:
        dataset = views["validation"](live, params, stats)
        return task.score(predict(params, stats, once(dataset))[job.head], truth)

    pooled = evaluate.make_predict(model.apply, heads=("pooled",))

    def features(part: str) -> np.ndarray:
        dataset = job.datasets[part]
        if part in first:
            dataset = first[part](lives[0], model.params, model.stats)
        values = pooled(model.params, model.stats, once(dataset))["pooled"]
        if part != "train":  # in training the step that meets them says more
            _check_finite(part, values)
        return values

    labels = model.labels
    txs = dict.fromkeys(plan.ever_live(job.plan), settings.optimizer)
    refs = {name: value for part in parts for name, value in part.refs.items()}
    key = jax.random.fold_in(jax.random.key(job.seed), 1)
    begin = run.start_state(
        model.params, model.stats, job.plan, txs=txs, labels=labels, refs=refs, key=key
    )
    events = run.run(
        begin,
        job.plan,
        apply=apply,
        terms={task.kind: task.term(job.head), **{part.name: part.term for part in parts}},
        txs=txs,
        labels=labels,
        feed=feed,
        evaluate=score,
        metric=task.metric,
        clip=settings.clip,
        accumulate=settings.accumulate,
        checkpoints=kept,
        save_every=settings.save_every,
        make=make,
        locate=model.locate,
    )
    steps = jdata.steps_per_epoch(train_set, settings.batch_size)
    return Engine(events, features, steps, kept)


def _check_finite(part: str, features: np.ndarray) -> None:
    rows = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(rows):
        raise ValueError(
            f"the features of {part} are not finite in {len(rows)} of {len(features)} examples, "
            f"first {rows[:6].tolist()}; clean these examples, or check the backbone's weights"
        )


def _way(settings: Settings, model: Model) -> tuple[Any, Any]:
    """Return how a step is made and run, and the forward pass that belongs to it."""
    if settings.parallel == "jit":
        return None, model.apply
    if settings.parallel != "pmap":
        raise ValueError(
            f"parallel is {settings.parallel!r}; give 'jit' or 'pmap' (all local devices)"
        )

    def make(*args: Any, **options: Any) -> Any:
        return parallel.pmap_step(step.make_step(*args, **options, axis_name=AXIS), axis_name=AXIS)

    return make, model.on_axis(AXIS).apply


def _with_columns(dataset: jdata.Dataset, parts: Sequence[Part]) -> jdata.Dataset:
    """Return the training data with what the start model gives on it, for penalties on outputs."""
    for part in parts:
        if part.columns is None:
            continue
        size = min(EVALUATION_ROWS, dataset.size)
        whole = jdata.derive(dataset, size, jax.jit(part.columns), names=part.column_names)
        if whole is None:
            raise ValueError(
                f"the reference outputs {list(part.column_names)} of {dataset.name} do not fit in "
                "memory; take fewer examples, or a penalty on weights such as l2_sp"
            )
        dataset = whole
    return dataset
