"""What a penalty is made from, and what it is: the types that all terms of this folder share."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax

from jtl import data as jdata
from jtl.data import Dataset
from jtl.models.model import Model
from jtl.train.state import Term

Columns = Callable[[Mapping[str, Any]], dict[str, jax.Array]]


class Start(NamedTuple):
    """What a penalty may keep to: the model before training, and what it is trained on.

    Attributes:
        model: the start model.
        kept: names of heads that came with it, trained; a fresh head has nothing to keep.
        live: labels that move in some phase of the plan.
        datasets: {kept head: encoded training data of its task}, where the recipe has them; the
            last task's in a recipe of several that share a head.
        key: for sampling.
        first: whether this is before the first of several tasks: nothing is to be kept yet. A
            penalty then gives None, or a part that only watches.
        previous: what the same penalty gave before the last task, to add to; None for nothing.
        began: parameters before the last task; None where there was none.
        watched: what the part's `watch` has come to over the last task; None for nothing.
        seen: {kept head: classes that its tasks had}, None for a head that knows all of them.
        tasks: {kept head: its task}, where the recipe has them.
        classes: {kept head: names of its classes}, where they are known.
    """

    model: Model
    kept: tuple[str, ...]
    live: frozenset[str]
    datasets: Mapping[str, Dataset]
    key: jax.Array
    first: bool = False
    previous: "Part | None" = None
    began: Any = None
    watched: Any = None
    seen: Mapping[str, tuple[int, ...] | None] = {}
    tasks: Mapping[str, Any] = {}
    classes: Mapping[str, tuple[str, ...]] = {}


class Stream(NamedTuple):
    """Rows of other data that fill a fixed share of each batch.

    Attributes:
        dataset: encoded, with labels; read round and round in an order of its own.
        rows: of each batch.
    """

    dataset: Dataset
    rows: int | float


class Part(NamedTuple):
    """A penalty ready for the step.

    A term sees the rows that are its own as real in `batch["mask"]`: those of its stream, or, where
    it has none, those of the task.

    Attributes:
        name: of the term in the metrics.
        term: see `train.state.Term`; None for a part that only watches.
        refs: arrays that the term reads from `Context.refs`.
        columns: `batch -> columns` of the training data, or of the part's stream, computed once
            with the start model.
        column_names: the names that `columns` gives.
        stream: rows that the term is taken over; a number below 1 is a share of the batch.
        watch: transform that sees each applied update, and the gradient of the task as `task_grads`
            (`train.step.make_step`); at most one part of a run has one.
        project: whether the term's gradient is no part of the sum, and the others are projected
            so as not to raise the term (A-GEM); at most one part of a run.
    """

    name: str
    term: Term | None
    refs: dict[str, Any]
    columns: Columns | None = None
    column_names: tuple[str, ...] = ()
    stream: Stream | None = None
    watch: optax.GradientTransformationExtraArgs | None = None
    project: bool = False


def check_weight(weight: float, what: str) -> None:
    """Refuse a weight with which a penalty would drive away from what it keeps to.

    Raises:
        ValueError: the weight is negative or not finite.
    """
    if not 0.0 <= weight < math.inf:
        raise ValueError(
            f"{what} has weight {weight}; a penalty is added to the loss times a number "
            "from 0 up; give one, or leave the penalty out"
        )


def one_head(start: Start, head: str | None, what: str) -> str:
    """Return the name of a kept head: the one given, or the only one.

    Raises:
        ValueError: no kept head, or several and none named.
    """
    if head is None and len(start.kept) == 1:
        return start.kept[0]
    if head in start.kept:
        return str(head)
    raise ValueError(
        f"{what} keeps to a trained head, and head={head!r} is given; the start model brought "
        f"{list(start.kept)}; start from a run (backbone of kind 'run'), name one of its heads, or "
        "take l2_sp, which needs none"
    )


def dataset_of(start: Start, head: str, data: Mapping[str, Any] | None, what: str) -> Dataset:
    """Return the encoded training data of a kept head's task: given, or the recipe's.

    Raises:
        ValueError: there are none, or given ones are of other classes than the head's.
    """
    if data is not None:
        given, known = data["train"].classes or (), start.classes.get(head)
        if known is not None and tuple(given) != tuple(known):
            raise ValueError(
                f"{what} is given data of the classes {list(given)}, and head {head!r} was trained "
                f"on {list(known)}; give the data of that head's task, its classes in this order "
                "(classes=)"
            )
        return jdata.encode(data["train"], start.model.backbone.inputs)
    if head not in start.datasets:
        raise ValueError(
            f"{what} needs examples of the task of head {head!r}; there are data of "
            f"{sorted(start.datasets)}; give data={{'train': source}} (in a config, a data section)"
        )
    return start.datasets[head]


def examples_of(dataset: Dataset, rows: int, batch: int = 32) -> Iterator[tuple[Any, Any]]:
    """Return batches of raw columns and labels, real rows only, `rows` in all at the most."""
    left = rows
    for chosen in jdata.plan(dataset, min(batch, dataset.size)):
        chosen = chosen[:left]
        left -= len(chosen)
        if len(chosen):
            yield dataset.columns(chosen), dataset.labels[chosen]
