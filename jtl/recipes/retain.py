"""Source tasks that are watched while another is trained: what is left of each, and what was lost.

A source is made once, when the start model is known: `kind(before) -> Watched`. It is scored before
training, at every evaluation and after, by the same examples and the same rule; only what has moved
is computed again. Its test split is scored before and after, and nothing is chosen by it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jtl import data as jdata
from jtl.data import Dataset
from jtl.losses import bootstrap
from jtl.models.heads import MaskedLM
from jtl.models.model import Model
from jtl.recipes import tasks, verdict
from jtl.recipes.datasets import once
from jtl.train.evaluate import make_predict
from jtl.train.state import Apply

PARTS = ("validation", "test")
Values = Mapping[str, np.ndarray]


class Before(NamedTuple):
    """What a watched source is made from.

    Attributes:
        model: the start, with the heads of the target and of what it was trained on.
        kept: names of heads that came trained.
        classes: {kept head: names of its classes}, where they are known.
    """

    model: Model
    kept: tuple[str, ...] = ()
    classes: Mapping[str, tuple[str, ...]] = {}


class Watched(NamedTuple):
    """A source that is watched.

    Attributes:
        name: of the source in the metrics.
        kind: in words, what its figure is of.
        metric: the figure that stands in tables.
        higher_is_better: whether a higher figure is the better one.
        reads: labels on which the figures depend; while they are held, nothing is computed.
        datasets: "validation" and "test".
        apply: forward pass whose `out` has `outputs`.
        outputs: of each example, what the figures are made from.
        score: `(outputs, labels) -> {figure: value}`.
        interval: `(outputs before, outputs after, labels) -> (low, high)`, the 95 % interval of the
            change of the metric, paired over examples.
    """

    name: str
    kind: str
    metric: str
    higher_is_better: bool
    reads: frozenset[str]
    datasets: Mapping[str, Dataset]
    apply: Apply
    outputs: tuple[str, ...]
    score: Callable[[Values, Any], dict[str, float]]
    interval: Callable[[Values, Values, Any], tuple[float, float]]


def task(
    before: Before,
    *,
    data: Mapping[str, Any],
    name: str | None = None,
    head: str | None = None,
    task: Callable[..., tasks.Task] = tasks.classification,
    buckets: int = 2,
    max_length: int | None = None,
) -> Watched:
    """Return a labelled source that a trained head of the start model answers.

    Args:
        before: its model must have kept a trained head.
        data: {"train", "validation", "test"} of sources; "train" says which classes there are.
        name: in the metrics; None is the head's.
        head: which kept head; None where there is only one.
        task: `training data -> Task`, for its figures.
        buckets: number of padded lengths of texts.
        max_length: longest text in tokens; None is the checkpoint's own limit.

    Raises:
        ValueError: no such head, or it answers other classes.
    """
    head = _head(before, head)
    made = task(data["train"])
    if isinstance(before.model.heads[head], MaskedLM):
        raise ValueError(
            f"retain of kind 'task' watches a head of classes or numbers; {head!r} is a masked-LM "
            "head; take kind 'masked_lm' for it"
        )
    there = int(np.shape(before.model.params["heads"][head]["classifier"]["bias"])[0])
    classes = before.classes.get(head, made.classes)
    if there != made.head.outputs or tuple(classes) != tuple(made.classes):
        raise ValueError(
            f"retain watches head {head!r}, which has {there} outputs for the classes "
            f"{list(classes)}; its data have {list(made.classes)}; give the data of that head's "
            "task (in the same order: classes=), or watch a probe"
        )
    return _labelled(
        *(name or head, "trained head", made, {*before.model.groups, head}),
        datasets=encoded(before.model, data, buckets, max_length, PARTS),
        apply=before.model.apply,
        output=head,
        logits=lambda values: values,
    )


def probe(
    before: Before,
    *,
    data: Mapping[str, Any],
    name: str,
    task: Callable[..., tasks.Task] = tasks.classification,
    buckets: int = 2,
    max_length: int | None = None,
) -> Watched:
    """Return a labelled source without a head: what a probe of the first features still reads.

    The probe is fitted on the features that the start model gives, and never again. Where training
    moves the features, it reads them worse: that drop is the figure. It is an upper bound of the
    loss: a probe fitted anew may find again what this one no longer reads.

    Args:
        before: the start.
        data: {"train", "validation", "test"} of sources; the probe's strength is chosen on
            "validation".
        name: in the metrics.
        task: `training data -> Task`, for its figures.
        buckets: number of padded lengths of texts.
        max_length: longest text in tokens; None is the checkpoint's own limit.
    """
    model, made = before.model, task(data["train"])
    datasets = encoded(model, data, buckets, max_length, ("train", *PARTS))
    pooled = make_predict(model.apply, heads=("pooled",))
    parts = ("train", "validation")
    features = {
        part: pooled(model.params, model.stats, once(datasets[part]))["pooled"] for part in parts
    }
    fitted = verdict.probe(made, features, {part: datasets[part].labels for part in parts})
    return _labelled(
        *(name, "probe of the first features", made, set(model.groups)),
        datasets={part: datasets[part] for part in PARTS},
        apply=model.apply,
        output="pooled",
        logits=fitted,
    )


def _labelled(
    name: str,
    kind: str,
    made: tasks.Task,
    reads: set[str],
    *,
    datasets: Mapping[str, Dataset],
    apply: Apply,
    output: str,
    logits: Callable[[Any], Any],
) -> Watched:
    def score(values: Values, labels: Any) -> dict[str, float]:
        return made.score(logits(values[output]), labels)

    def interval(first: Values, last: Values, labels: Any) -> tuple[float, float]:
        one, other = logits(first[output]), logits(last[output])
        if made.metric == "accuracy":
            hits = [(found.argmax(-1) == labels).astype(np.float32) for found in (other, one)]
            return bootstrap.paired_bootstrap(hits[0], hits[1])

        def change(rows: np.ndarray) -> float:
            figures = (made.score(found[rows], labels[rows]) for found in (one, other))
            before, after = (found[made.metric] for found in figures)
            return after - before

        return bootstrap.resampled_interval(change, len(labels))

    reading = frozenset(reads)
    return Watched(
        *(name, kind, made.metric, True, reading, datasets, apply, (output,), score, interval)
    )


def _head(before: Before, head: str | None) -> str:
    if head is None and len(before.kept) == 1:
        return before.kept[0]
    if head in before.kept:
        return str(head)
    raise ValueError(
        f"retain of kind 'task' watches a trained head, and head={head!r} is given; the start "
        f"model brought {list(before.kept)}; start from a run (backbone of kind 'run'), name one "
        "of its heads, or watch a probe, which needs none"
    )


def encoded(
    model: Model,
    data: Mapping[str, Any],
    buckets: int,
    max_length: int | None,
    parts: tuple[str, ...],
) -> dict[str, Dataset]:
    """Return the sources encoded for the model, all padded to the lengths of the first.

    Raises:
        ValueError: a part is missing.
    """
    missing = [part for part in parts if part not in data]
    if missing:
        raise ValueError(
            f"data of a watched source have no {missing}; they have {sorted(data)}; give a source "
            f"for each of {list(parts)}"
        )
    inputs = model.backbone.inputs
    options: dict[str, Any] = {"max_length": max_length}
    first = jdata.encode(data[parts[0]], inputs, buckets=buckets, **options)
    rest = {
        part: jdata.encode(data[part], inputs, buckets=first.buckets, **options)
        for part in parts[1:]
    }
    return {parts[0]: first, **rest}
