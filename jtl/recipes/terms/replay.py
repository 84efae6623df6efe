"""Replay: examples of earlier tasks fill a part of each batch, and keep their own loss.

The examples are a memory: those of a given source, or what is kept of each task in a run of several
tasks. A-GEM uses the same memory, not to learn from it but to project the gradient.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl.data import Dataset
from jtl.data import replay as memories
from jtl.data.derive import with_columns
from jtl.losses import classification, regression
from jtl.recipes.datasets import once
from jtl.recipes.streams import only_rows
from jtl.recipes.terms.part import Part, Start, Stream, check_weight, dataset_of, one_head
from jtl.train.evaluate import make_predict
from jtl.train.state import Context, Term

HEAD, TASK = "replay/head", "replay/task"
CHOICES = ("class_balanced", "reservoir", "herding")


def replay(
    start: Start,
    *,
    weight: float = 1.0,
    data: Mapping[str, Any] | None = None,
    head: str | None = None,
    rows: int | float = 0.1,
    size: int | None = None,
    choose: str = "class_balanced",
) -> Part | None:
    """Return weight times the loss of earlier tasks on a memory of their training examples.

    Each example goes through the head of its own task. The rows of a batch are the memory's and the
    task's together, and so are BatchNorm's statistics where a norm is live.

    Args:
        start: its model must have kept a trained head.
        weight: of the mean over the memory's rows.
        data: {"train": source} of the head's task; None takes the recipe's data of earlier tasks.
        head: which kept head, for `data`; None where there is only one.
        rows: of each batch; a number below 1 is a share. The memory may have fewer: they repeat.
        size: examples of the memory, shared evenly by the tasks so far; None keeps all.
        choose: "class_balanced", "reservoir" (each example with the same chance) or "herding"
            (those whose mean feature follows that of their class). Where labels are numbers, all
            examples count as one class.

    Returns:
        The part; None before the first of several tasks.

    Raises:
        ValueError: no kept head, or several and none named; no data; an unknown choice; a memory
            smaller than the number of tasks; labels that do not fit the head.

    Reference: Chaudhry et al. 2019, arXiv:1902.10486; herding is algorithm 4 of Rebuffi et al.
    2017, arXiv:1611.07725.
    """
    check_weight(weight, "replay")
    if choose not in CHOICES:
        raise ValueError(f"choose is {choose!r}; replay knows {list(CHOICES)}; give one of them")
    if start.first:
        return None
    if data is not None:
        start = start._replace(previous=None)
    found = _new(start, data, head)
    memory = _memory(start, found, size, choose)
    names = tuple(start.model.heads)
    present = np.unique(np.concatenate([part[HEAD] for part in memory.parts])).tolist()
    losses = {i: _loss(start, names[i], found.get(names[i])) for i in present}

    def term(c: Context) -> tuple[Any, Any]:
        seen = [loss(only_rows(c, c.batch[HEAD] == i)) for i, loss in losses.items()]
        return weight * sum(total for total, _ in seen), sum(count for _, count in seen)

    return Part(
        "replay" if head is None else f"replay_{head}", term, {}, stream=Stream(memory, rows)
    )


def agem(
    start: Start,
    *,
    data: Mapping[str, Any] | None = None,
    head: str | None = None,
    rows: int | float = 0.1,
    size: int | None = None,
    choose: str = "class_balanced",
) -> Part | None:
    """Return the same memory for A-GEM: the gradient may not raise the memory's loss.

    Where it would, it is projected on the gradients that do not; the memory's own gradient is not
    followed (`penalties.agem`).

    Args:
        start: as for `replay`.
        data: as for `replay`.
        head: as for `replay`.
        rows: of each batch, on which the memory's gradient is taken.
        size: as for `replay`.
        choose: as for `replay`.

    Raises:
        ValueError: as for `replay`.

    Reference: Chaudhry et al. 2019, arXiv:1812.00420.
    """
    part = replay(start, data=data, head=head, rows=rows, size=size, choose=choose)
    return part if part is None else part._replace(name="agem", project=True)


def _new(start: Start, data: Mapping[str, Any] | None, head: str | None) -> dict[str, Dataset]:
    """Return {head: data} of the tasks that the memory does not have yet."""
    if start.previous is None:
        chosen = one_head(start, head, "replay")
        return {chosen: dataset_of(start, chosen, data, "replay")}
    names = tuple(start.model.heads)
    had = {names[i] for part in _stream(start).parts for i in np.unique(part[HEAD]).tolist()}
    given = list(start.datasets)
    fresh = [name for name in given if name not in had] or given[-1:]
    return {name: dataset_of(start, name, None, "replay") for name in fresh}


def _memory(start: Start, found: Mapping[str, Dataset], size: int | None, choose: str) -> Dataset:
    """Return what is kept of the memory so far and of new tasks; columns say whose a row is."""
    parts: list[tuple[Dataset, int]] = []
    if start.previous is not None:
        before = _stream(start)
        head, task = (_by_row(before, name) for name in (HEAD, TASK))
        for number in np.unique(task).tolist():
            rows = np.flatnonzero(task == number)
            parts.append((before.take(rows), int(head[rows[0]])))
    old, names = len(parts), tuple(start.model.heads)
    parts += [(dataset, names.index(name)) for name, dataset in found.items()]
    kept = []
    for number, ((dataset, _), room) in enumerate(zip(parts, _rooms(size, parts), strict=True)):
        # In the memory's order: any beginning of it is chosen in the same way, so a task that fits
        # whole is put in that order too.
        rows = np.arange(min(room, dataset.size))
        if number >= old and size is not None:
            rows = _choice(start, dataset, len(rows), choose, number)
        kept.append(dataset.take(rows).loaded())
    sizes = [dataset.size for dataset in kept]
    columns = {
        HEAD: np.repeat(np.asarray([head for _, head in parts], np.int32), sizes),
        TASK: np.repeat(np.arange(len(parts), dtype=np.int32), sizes),
    }
    whole = memories.join(kept)
    buckets = range(len(whole.parts))
    return with_columns(
        whole,
        {name: tuple(c[whole.bucket == b] for b in buckets) for name, c in columns.items()},
    )


def _rooms(size: int | None, parts: list[tuple[Dataset, int]]) -> list[int]:
    """Return how many examples of each task are kept, the older tasks having those left over."""
    if size is None:
        return [dataset.size for dataset, _ in parts]
    share, left = divmod(size, len(parts))
    if share < 1:
        raise ValueError(
            f"a memory of size={size} is shared by {len(parts)} tasks, which leaves some without "
            f"an example; give it at least {len(parts)}"
        )
    return [share + (number < left) for number in range(len(parts))]


def _choice(start: Start, dataset: Dataset, size: int, choose: str, number: int) -> np.ndarray:
    seed = int(jax.random.bits(jax.random.fold_in(start.key, number)))
    numbers = dataset.labels.dtype.kind != "i"
    labels = np.zeros(dataset.size, np.int32) if numbers else dataset.labels
    if choose == "reservoir":
        return memories.reservoir(dataset.size, size, seed=seed)
    if choose == "class_balanced":
        return memories.class_balanced(labels, size, seed=seed)
    predict = make_predict(start.model.apply, heads=("pooled",))
    features = predict(start.model.params, start.model.stats, once(dataset))["pooled"]
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return memories.herding(features / np.maximum(norms, 1e-12), labels, size)


def _loss(start: Start, head: str, dataset: Dataset | None) -> Term:
    """Return the loss of a head's task: the recipe's, or the plain one for such labels."""
    task = start.tasks.get(head)
    if task is not None:
        return _with_classes(task.term(head)) if task.classes else task.term(head)
    outputs = start.model.heads[head].outputs
    classes = None if dataset is None else dataset.classes
    if dataset is None or outputs != (len(classes) if classes else 1):
        there = "no data" if dataset is None else f"{len(classes or ())} classes"
        raise ValueError(
            f"replay through head {head!r}, which has {outputs} outputs, is given {there}; give "
            "data of the task that the head was trained on"
        )

    def cross_entropy(c: Context) -> tuple[Any, Any]:
        return classification.cross_entropy(c.out[head], c.batch["label"], mask=c.batch["mask"])

    def squared_error(c: Context) -> tuple[Any, Any]:
        return regression.squared_error(c.out[head][:, 0], c.batch["label"], mask=c.batch["mask"])

    return _with_classes(cross_entropy) if classes else squared_error


def _with_classes(term: Callable[[Context], Any]) -> Term:
    """Return the term with labels as whole numbers; beside numbers of other tasks they are not."""

    def over_classes(c: Context) -> tuple[Any, Any]:
        label = jnp.asarray(c.batch["label"]).astype(jnp.int32)
        return term(c._replace(batch={**c.batch, "label": label}))

    return over_classes


def _stream(start: Start) -> Dataset:
    """Return the memory of the part before the last task."""
    previous = start.previous
    assert previous is not None and previous.stream is not None
    return previous.stream.dataset


def _by_row(dataset: Dataset, name: str) -> np.ndarray:
    values = np.empty(dataset.size, np.int32)
    for bucket, part in enumerate(dataset.parts):
        values[dataset.bucket == bucket] = part[name]
    return values
