"""Losses and figures of maps: what is counted, the Dice loss, the mean intersection over union.

Cross entropy over maps is `classification.cross_entropy` with `mask=counted(labels)`: it takes
logits (n, height, width, classes) and labels (n, height, width) as they are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class OverlapSums(NamedTuple):
    """For each class: places where label and prediction agree, and where either has it."""

    intersection: Float[Array, " classes"]
    union: Float[Array, " classes"]


def counted(
    labels: Int[Array, "n *places"],
    ignore: int | None = 255,
    *,
    mask: Bool[Array, " n"] | None = None,
) -> Bool[Array, "n *places"]:
    """Return where the labels of maps count: not at places to ignore, not in rows of padding.

    Args:
        labels: class of each place.
        ignore: the label of places that nobody has labelled; None for none.
        mask: True = a real row; None for all.

    >>> counted(jnp.array([[0, 255], [1, 1]]), mask=jnp.array([True, False])).tolist()
    [[True, False], [False, False]]
    """
    real = jnp.ones(labels.shape, bool) if ignore is None else labels != ignore
    if mask is None:
        return real
    return real & mask.reshape((-1,) + (1,) * (labels.ndim - 1))


def dice_loss(
    logits: Float[Array, "n *places classes"],
    labels: Int[Array, "n *places"],
    *,
    mask: Bool[Array, "n *places"] | None = None,
    epsilon: float = 1e-5,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the sum over examples of 1 - the mean Dice of the classes, and the number of examples.

        dice_c = (2 sum_i p_ic g_ic + e) / (sum_i p_ic^2 + sum_i g_ic^2 + e)

    over the places i of one example, p the softmax of the logits and g 1 at the label. A class that
    is nowhere, and is predicted nowhere, has Dice 1.

    Args:
        logits: unnormalised scores in any float dtype; computed in float32.
        labels: class of each place.
        mask: True = counted, such as `counted(labels)`; an example without any does not count.
        epsilon: e.

    >>> sure = jnp.log(jnp.array([[[0.5, 0.5], [1e-9, 1.0]]]))
    >>> total, count = dice_loss(sure, jnp.array([[0, 1]]), epsilon=0.0)
    >>> f"{total:.4f} {count:.0f}"  # 1 - (2 0.5 / (0.25 + 1) + 2 / (1.25 + 1)) / 2
    '0.1556 1'

    Reference: Milletari et al. 2016, arXiv:1606.04797, section 3 (V-Net).
    """
    classes, rows = logits.shape[-1], labels.shape[0]
    mask = jnp.ones(labels.shape, bool) if mask is None else mask
    real = mask.reshape(rows, -1, 1)
    scores = jnp.where(real, logits.reshape(rows, -1, classes).astype(jnp.float32), 0.0)
    shares = jnp.where(real, jax.nn.softmax(scores), 0.0)
    truth = jax.nn.one_hot(labels.reshape(rows, -1), classes) * real
    both = 2 * jnp.sum(shares * truth, axis=1) + epsilon
    each = jnp.sum(shares**2 + truth**2, axis=1) + epsilon
    some = jnp.any(real, axis=(1, 2))
    dice = jnp.mean(both / jnp.where(some[:, None], each, 1.0), axis=1)
    return jnp.sum(jnp.where(some, 1 - dice, 0.0)), jnp.sum(some, dtype=jnp.float32)


def overlap_sums(
    logits: Float[Array, "n *places classes"],
    labels: Int[Array, "n *places"],
    *,
    mask: Bool[Array, "n *places"] | None = None,
) -> OverlapSums:
    """Return the sums of `mean_iou`; they add up over batches and devices.

    Args:
        logits: the class of the highest one is the prediction.
        labels: class of each place; one outside 0..classes-1 must be masked.
        mask: True = counted, such as `counted(labels)`.

    >>> logits = jnp.array([[[2.0, 1.0], [2.0, 1.0], [0.0, 3.0]]])
    >>> sums = overlap_sums(logits, jnp.array([[0, 1, 1]]))
    >>> sums.intersection.tolist(), sums.union.tolist()
    ([1.0, 1.0], [2.0, 2.0])
    """
    classes = logits.shape[-1]
    mask = jnp.ones(labels.shape, bool) if mask is None else mask
    real = mask.reshape(-1, 1)
    truth = jax.nn.one_hot(labels.reshape(-1), classes, dtype=bool) & real
    guess = jax.nn.one_hot(jnp.argmax(logits, axis=-1).reshape(-1), classes, dtype=bool) & real
    return OverlapSums(
        jnp.sum(truth & guess, axis=0, dtype=jnp.float32),
        jnp.sum(truth | guess, axis=0, dtype=jnp.float32),
    )


def mean_iou(sums: OverlapSums) -> Float[Array, ""]:
    """Return the mean over classes of intersection over union; classes that are nowhere stay out.

    >>> f"{mean_iou(OverlapSums(jnp.array([1.0, 1.0, 0.0]), jnp.array([2.0, 4.0, 0.0]))):.3f}"
    '0.375'

    Reference: Everingham et al. 2010, doi:10.1007/s11263-009-0275-4, section 4.2.
    """
    shares = sums.intersection / jnp.maximum(sums.union, 1.0)
    return jnp.sum(shares) / jnp.maximum(jnp.sum(sums.union > 0), 1)
