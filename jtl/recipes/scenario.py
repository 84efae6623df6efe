"""Several tasks as one model sees them: which head is whose, and the loss of all tasks at once.

Reference: van de Ven and Tolias 2019, arXiv:1904.07734: three scenarios.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jtl.data import Dataset
from jtl.data.sources import Source
from jtl.recipes.datasets import check_sources
from jtl.recipes.tasks import Task
from jtl.train.state import Context, Term

SCENARIOS = {
    "task": "a head for each task",
    "domain": "one head, the same classes in every task",
    "class": "one head over the classes of all tasks, some of them in each task",
}
SHARED = "head"
TASK = "task"


class Lesson(NamedTuple):
    """One task of several.

    Attributes:
        name: of the task.
        head: name of its head.
        task: loss and figures.
        sources: "train", "validation" and "test".
        seen: numbers of the classes that its training data have; None where the head knows all.
    """

    name: str
    head: str
    task: Task
    sources: Mapping[str, Any]
    seen: tuple[int, ...] | None


def lessons(
    tasks: Sequence[Mapping[str, Any]], scenario: str, make: Callable[..., Task]
) -> list[Lesson]:
    """Return the tasks with their heads.

    Args:
        tasks: {"name", "data": {"train", "validation", "test"}} in order.
        scenario: one of `SCENARIOS`.
        make: `training data -> Task`.

    Raises:
        ValueError: fewer than two tasks, two of one name, an unknown scenario, or tasks that share
            a head and have other classes.
    """
    names = [str(entry["name"]) for entry in tasks]
    if len(set(names)) < max(len(names), 2):
        raise ValueError(f"tasks are named {names}; give at least two, each a name of its own")
    if scenario not in SCENARIOS:
        raise ValueError(
            f"scenario {scenario!r} is not known; give one of "
            + "; ".join(f"{name!r} ({what})" for name, what in SCENARIOS.items())
        )
    for entry in tasks:
        check_sources(entry["data"])
    data = {name: entry["data"] for name, entry in zip(names, tasks, strict=True)}
    if scenario == "task":
        return [Lesson(n, n, make(parts["train"]), parts, None) for n, parts in data.items()]
    _check_classes({name: parts["train"].classes for name, parts in data.items()}, scenario)
    if scenario == "domain":
        return [Lesson(n, SHARED, make(parts["train"]), parts, None) for n, parts in data.items()]
    whole = make(_labels_of([parts["train"] for parts in data.values()]))
    return [Lesson(n, SHARED, whole, parts, _present(parts)) for n, parts in data.items()]


def all_at_once(learned: Sequence[Lesson], datasets: Sequence[Mapping[str, Dataset]]) -> Any:
    """Return the joint task, its head and its data, the upper bound of learning one by one.

    The batches have an int32 column "task". Where each task has its own head, a row counts for its
    own one, and the validation data are those of the first task.
    """
    first = learned[0]
    parts = {name: union([d[name] for d in datasets]) for name in ("train", "validation")}
    if len({lesson.head for lesson in learned}) == 1:
        return first.task, first.head, parts
    terms = [lesson.task.term(lesson.head) for lesson in learned]
    joint = first.task._replace(term=lambda _: _each_its_own(terms))
    return joint, first.head, {**parts, "validation": datasets[0]["validation"]}


def _each_its_own(terms: Sequence[Term]) -> Term:
    def term(c: Context) -> Any:
        total = weight = jnp.float32(0.0)
        for number, one in enumerate(terms):
            mask = c.batch["mask"] & (c.batch[TASK] == number)
            part, rows = one(c._replace(batch={**c.batch, "mask": mask}))
            total, weight = total + part, weight + rows
        return total, weight

    return term


def union(datasets: Sequence[Dataset]) -> Dataset:
    """Return the rows of all datasets, one dataset after the other, with a column "task"."""
    lengths = sorted({length for dataset in datasets for length in dataset.buckets})
    place = {length: number for number, length in enumerate(lengths)}
    bucket = [np.asarray([place[n] for n in d.buckets], np.int32)[d.bucket] for d in datasets]
    ends = np.cumsum([dataset.size for dataset in datasets])
    task = np.repeat(np.arange(len(datasets), dtype=np.int32), [d.size for d in datasets])

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        owner, whole = task[rows], {}
        for number in np.unique(owner).tolist():
            mine = owner == number
            start = ends[number] - datasets[number].size
            for name, values in datasets[number].columns(rows[mine] - start).items():
                if name not in whole:
                    whole[name] = np.zeros((len(rows), *values.shape[1:]), values.dtype)
                whole[name][mine] = values
        return whole

    buckets = np.concatenate(bucket)
    return Dataset(
        tuple({TASK: task[buckets == place]} for place in range(len(lengths))),
        buckets,
        np.concatenate([dataset.labels for dataset in datasets]),
        datasets[0].classes,
        tuple(lengths),
        read,
        derived=(TASK,),  # it stays where a phase reads no raw columns
        name="all tasks",
        augmented=any(dataset.augmented for dataset in datasets),
    )


def _labels_of(sources: Sequence[Source]) -> Source:
    """Return a source of the labels of several, whose inputs are the first's: for `make` alone."""
    labels = np.concatenate([source.columns["label"] for source in sources])
    return Source({"label": labels}, sources[0].classes, "all tasks")


def _present(sources: Mapping[str, Source]) -> tuple[int, ...]:
    return tuple(int(label) for label in np.unique(sources["train"].columns["label"]))


def _check_classes(classes: Mapping[str, Any], scenario: str) -> None:
    first, *others = classes
    different = [name for name in others if classes[name] != classes[first]]
    if different:
        raise ValueError(
            f"in scenario {scenario!r} all tasks share one head; task {first!r} has the classes "
            f"{classes[first]} and {different[0]!r} has {classes[different[0]]}; give every task "
            "the same classes (in 'class' those of all tasks), or take scenario='task'"
        )
