"""Figures of a classifier from sums: add up over batches and devices, then take the figure."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num


class CalibrationSums(NamedTuple):
    """For each bin of confidence: summed confidence, number correct, number of examples."""

    confidence: Float[Array, " bins"]
    correct: Float[Array, " bins"]
    count: Float[Array, " bins"]


def accuracy_sums(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    mask: Bool[Array, "*batch"] | None = None,
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Return how many labels have the highest logit, and how many there are.

    >>> correct, count = accuracy_sums(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0]))
    >>> int(correct), int(count)
    (1, 2)
    """
    mask = jnp.ones(labels.shape, bool) if mask is None else mask
    return jnp.sum((jnp.argmax(logits, axis=-1) == labels) & mask), jnp.sum(mask)


def confusion(
    logits: Float[Array, "n columns"],
    labels: Int[Array, " n"],
    classes: int,
    *,
    mask: Bool[Array, " n"] | None = None,
) -> Int[Array, "classes classes"]:
    """Return the number of examples of each class (row) that each class was given for (column).

    Labels outside 0..classes-1 are not counted.

    >>> confusion(jnp.array([[2.0, 1.0], [0.0, 3.0], [0.0, 1.0]]), jnp.array([0, 0, 1]), 2).tolist()
    [[1, 1], [0, 1]]

    Raises:
        ValueError: logits do not have one column for each class.
    """
    if logits.shape[1] != classes:
        raise ValueError(
            f"logits have {logits.shape[1]} columns for {classes} classes; "
            "give the logits of the head that was trained on these classes"
        )
    counted = jnp.ones(labels.shape, bool) if mask is None else mask
    counted &= (labels >= 0) & (labels < classes)
    table = jnp.zeros((classes, classes), jnp.int32)
    return table.at[labels, jnp.argmax(logits, axis=-1)].add(counted.astype(jnp.int32))


def macro_f1(confusion: Int[Array, "classes classes"]) -> Float[Array, ""]:
    """Return the mean over classes of 2 tp / (2 tp + fp + fn).

    A class that is neither a label nor a prediction anywhere stays out, as in scikit-learn.

    >>> f"{macro_f1(jnp.array([[1, 1], [0, 1]])):.4f}"  # both classes have 2 / (2 + 1)
    '0.6667'
    """
    table = confusion.astype(jnp.float32)
    twice, seen = 2 * jnp.diagonal(table), jnp.sum(table, axis=0) + jnp.sum(table, axis=1)
    return jnp.sum(twice / jnp.maximum(seen, 1)) / jnp.maximum(jnp.sum(seen > 0), 1)


def calibration_sums(
    logits: Float[Array, "n classes"],
    labels: Int[Array, " n"],
    *,
    bins: int = 15,
    mask: Bool[Array, " n"] | None = None,
) -> CalibrationSums:
    """Return the sums of `calibration_error`, one for each bin of confidence.

    The confidence of an example is its highest probability; bin b holds those in
    (b / bins, (b + 1) / bins].

    >>> logits = jnp.log(jnp.array([[0.75, 0.25], [0.1, 0.9]]))
    >>> sums = calibration_sums(logits, jnp.array([0, 0]), bins=2)
    >>> f"{sums.confidence[1]:.2f}", sums.correct.tolist(), sums.count.tolist()
    ('1.65', [0.0, 1.0], [0.0, 2.0])
    """
    counted = jnp.ones(labels.shape, bool) if mask is None else mask
    confidence = jnp.max(jax.nn.softmax(logits.astype(jnp.float32)), axis=-1)
    bin_of = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    correct = jnp.argmax(logits, axis=-1) == labels

    def per_bin(values: Array) -> Array:
        return jnp.zeros(bins).at[bin_of].add(jnp.where(counted, values, 0.0))

    return CalibrationSums(
        per_bin(confidence), per_bin(correct.astype(jnp.float32)), per_bin(jnp.ones(labels.shape))
    )


def calibration_error(sums: CalibrationSums) -> Float[Array, ""]:
    """Return sum over bins of count / n times |accuracy - mean confidence|.

    >>> sums = CalibrationSums(jnp.array([1.2, 1.8]), jnp.array([1.0, 2.0]), jnp.array([2.0, 2.0]))
    >>> f"{calibration_error(sums):.2f}"  # (|1 - 1.2| + |2 - 1.8|) / 4
    '0.10'

    Reference: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    gaps = jnp.abs(sums.correct - sums.confidence)
    return jnp.sum(gaps) / jnp.maximum(jnp.sum(sums.count), 1)


def class_weights(counts: Num[Array | np.ndarray, " classes"]) -> Float[Array, " classes"]:
    """Return n / (C n_c) for each of C classes: every class then weighs the same in the loss.

    >>> class_weights(np.array([10, 40, 10])).tolist()  # 60 / (3 * count)
    [2.0, 0.5, 2.0]

    Args:
        counts: n_c, the number of training examples of each class.

    Raises:
        ValueError: a class without examples.
    """
    counts = np.asarray(counts, np.float64)
    absent = np.flatnonzero(counts <= 0).tolist()
    if absent:
        raise ValueError(
            f"classes {absent} have no examples, the counts are {counts.astype(int).tolist()}; "
            "add examples, or leave these classes out of the head"
        )
    return jnp.asarray(counts.sum() / (len(counts) * counts), jnp.float32)
