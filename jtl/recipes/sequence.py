"""Train tasks one after the other on one model, one way, and score all that matter after each."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jtl.models.model import Model
from jtl.recipes.datasets import Datasets, once
from jtl.recipes.scenario import Lesson
from jtl.recipes.terms import Part, Start
from jtl.recipes.training import Engine, Job, Settings, make_engine
from jtl.report import penalised, record
from jtl.train import checkpoint
from jtl.train.evaluate import Predict
from jtl.train.plan import ever_live
from jtl.train.state import TrainState

SCORED_ROWS = 256
_ROW_EVERY = 50
PARTS = ("validation", "test")

Scores = dict[str, np.ndarray]


class Course(NamedTuple):
    """What all ways and seeds of a run share; see `continual` for each.

    Attributes:
        lessons: the tasks with their heads.
        datasets: of each task, encoded.
        plan: `(groups, heads) -> phases`.
        settings: how each task is trained.
        predict: the logits of all heads, compiled once.
        config: of the run, for the records.
        overwrite: train anew where records lie.
        checkpoints: whether states are kept, to go on from.
        carry_optimizer: whether a task goes on with the optimizer state of the one before.
    """

    lessons: Sequence[Lesson]
    datasets: Sequence[Datasets]
    plan: Callable[..., Sequence[Any]]
    settings: Settings
    predict: Predict
    config: Mapping[str, Any]
    overwrite: bool
    checkpoints: bool
    carry_optimizer: bool


class Learned(NamedTuple):
    """What a sequence came to.

    Attributes:
        model: after the last task.
        scores: {"validation", "test"}: (tasks, tasks), NaN above what was scored.
        seconds: {"penalties", "training", "scores"}, summed over the tasks.
        penalties: {task: {"penalties", "warnings"}}, as in the result of `fine_tune`, of the tasks
            whose terms' shares of the gradient were probed.
    """

    model: Model
    scores: Scores
    seconds: dict[str, float]
    penalties: dict[str, Any]


class _Border(NamedTuple):
    """What one task leaves to the next."""

    model: Model
    began: Any = None
    watched: Any = None
    optimizer: Any = None
    parts: tuple[Part | None, ...] = ()


def learn(
    course: Course,
    model: Model,
    folder: pathlib.Path,
    penalties: Sequence[Callable[..., Part | None]],
    *,
    seed: int,
    show: Callable[[int, np.ndarray], None] | None = None,
) -> Learned:
    """Train all tasks in order and return the model after the last, and the scores after each.

    After task i the tasks up to i + 1 are scored: the one to come is what forward transfer reads.

    Args:
        course: the tasks and how each is trained.
        model: the start, with all heads.
        folder: of this sequence; each task has a folder in it.
        penalties: `Start -> Part`, called before every task.
        seed: of order and dropout.
        show: called with the number of a task and the test figures after it.
    """
    tasks = len(course.lessons)
    scores = {part: np.full((tasks, tasks), np.nan) for part in PARTS}
    seconds: dict[str, float] = {"penalties": 0.0, "training": 0.0, "scores": 0.0}
    said: dict[str, Any] = {}
    border = _Border(model, parts=(None,) * len(penalties))
    for number in range(tasks):
        with _timed(seconds, "penalties"):
            start = _start(course, number, border, seed)
            parts = tuple(
                penalty(start._replace(previous=before))
                for penalty, before in zip(penalties, border.parts, strict=True)
            )
        with _timed(seconds, "training"):
            state = _trained(course, number, border, parts, folder, seed)
        if course.settings.shares_every:
            said |= _shares(course.lessons[number].name, parts, folder)
        moved = dataclasses.replace(border.model, params=state.params, stats=state.stats)
        began, watched = border.model.params, state.watch or None
        border = _Border(moved, began, watched, _kept_state(course, state), parts)
        with _timed(seconds, "scores"):
            for part, table in scores.items():
                until = min(number + 2, tasks)
                table[number, :until] = scored(course, moved, part, range(until))
        if show is not None:
            show(number, scores["test"][number])
    return Learned(border.model, scores, seconds, said)


def _shares(task: str, parts: Sequence[Part | None], folder: pathlib.Path) -> dict[str, Any]:
    """Return {task: what the probes of a task say of its penalties}, {} where it has none."""
    given = [part for part in parts if part is not None]
    names = [part.name for part in given if part.term is not None and not part.project]
    said = penalised.found(record.read_rows(folder / task), names)
    return {task: said} if said else {}


def scored(course: Course, model: Model, part: str, tasks: Sequence[int]) -> list[float]:
    """Return the metric of these tasks on a part of their data."""
    found = []
    for number in tasks:
        lesson, dataset = course.lessons[number], course.datasets[number][part]
        batches = once(dataset, SCORED_ROWS)
        logits = course.predict(model.params, model.stats, batches)[lesson.head]
        found.append(lesson.task.score(logits, dataset.labels)[lesson.task.metric])
    return found


def run_job(course: Course, job: Job, parts: Sequence[Part], folder: pathlib.Path) -> TrainState:
    """Train one job in its own run folder, and return the state at its end."""
    place = record.open_run(folder, config=course.config, overwrite=course.overwrite)
    options: dict[str, Any] = {}
    if course.checkpoints:
        options = {
            "folder": place.folder / record.CHECKPOINTS,
            "config": {"run": "/".join(folder.parts[-3:])},
        }
    engine = make_engine(job, course.settings, parts=parts, **options)
    return _followed(place, engine)


def _followed(place: record.Run, engine: Engine) -> TrainState:
    """Run to the end; events go to `metrics.jsonl`, of the steps one in many."""
    kept = engine.checkpoints
    there = None if kept is None else checkpoint.latest(kept)
    record.cut(place, -1 if there is None else there["step"])
    state: Any = None
    with contextlib.ExitStack() as stack:
        if kept is not None:
            stack.callback(checkpoint.close, kept)
        stack.enter_context(contextlib.closing(engine.events))  # an error below saves the state
        for event in engine.events:
            state = event.state
            if event.kind != "step" or event.step % _ROW_EVERY == 0:
                row = {"kind": event.kind, "step": event.step, "phase": event.phase}
                record.append(place, {**event.metrics, **row})
    return state


def _start(course: Course, number: int, border: _Border, seed: int) -> Start:
    """Return what the penalties of a task may keep to."""
    earlier = course.lessons[:number]
    coming, model = course.lessons[number], border.model
    live = ever_live(course.plan(model.groups, (coming.head,)))
    heads = tuple(dict.fromkeys(lesson.head for lesson in earlier))
    last = {} if not earlier else {earlier[-1].head: course.datasets[number - 1]["train"]}
    return Start(
        *(model, heads, live, last),
        jax.random.fold_in(jax.random.key(seed), 100 + number),
        first=not earlier,
        began=border.began,
        watched=border.watched,
        seen={head: _seen(earlier, head) for head in heads},
        tasks={lesson.head: lesson.task for lesson in earlier},
    )


def _seen(earlier: Sequence[Lesson], head: str) -> tuple[int, ...] | None:
    own = [lesson.seen for lesson in earlier if lesson.head == head]
    if any(seen is None for seen in own):
        return None
    return tuple(sorted({label for seen in own for label in seen or ()}))


def _trained(
    course: Course,
    number: int,
    border: _Border,
    parts: Sequence[Part | None],
    folder: pathlib.Path,
    seed: int,
) -> TrainState:
    lesson, model = course.lessons[number], border.model
    phases = course.plan(model.groups, (lesson.head,))
    # A seed of its own, else tasks of equal size would all see their rows in one order.
    own = 1000 * number + seed
    job = Job(model, lesson.head, lesson.task, course.datasets[number], phases, own)
    if border.optimizer is not None:
        settings = course.settings
        carried = carrying(settings.optimizer, border.optimizer)
        course = course._replace(settings=settings._replace(optimizer=carried))
    given = [part for part in parts if part is not None]
    return run_job(course, job, given, folder / lesson.name)


def _kept_state(course: Course, state: TrainState) -> dict[Any, Any] | None:
    """Return the state of each label's transform by its structure, None where it starts fresh."""
    if not course.carry_optimizer:
        return None
    inner = (leaf.inner_state for leaf in state.opt_state.inner_states.values())
    return {_kind(tree): tree for tree in inner}


def carrying(tx: Any, states: Mapping[Any, Any]) -> optax.GradientTransformationExtraArgs:
    """Return a transform that begins where the state of an earlier one of the same leaves ended.

    Args:
        tx: the transform.
        states: {kind: state}; leaves of another kind begin afresh.
    """
    full = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        fresh = full.init(params)
        return states.get(_kind(fresh), fresh)

    return optax.GradientTransformationExtraArgs(init, full.update)


def _kind(state: Any) -> tuple[Any, ...]:
    """Return what tells the state of one label's leaves from that of another's."""
    leaves = jax.tree.leaves(state)
    shapes = tuple((np.shape(leaf), str(leaf.dtype)) for leaf in leaves)
    return jax.tree.structure(state), shapes


@contextlib.contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[what] += time.perf_counter() - began
