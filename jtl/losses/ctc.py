"""Connectionist temporal classification: a sequence of labels at unknown frames.

Reference: Graves et al. 2006 (ICML), Connectionist Temporal Classification.
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def ctc(
    logits: Float[Array, "n frames vocabulary"],
    labels: Int[Array, "n length"],
    *,
    frame_mask: Bool[Array, "n frames"] | None = None,
    mask: Bool[Array, " n"] | None = None,
    blank: int = 0,
    per: str = "example",
    skip_impossible: bool = False,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the sum of -log p(labels) over the examples and their number.

    p is the sum over all ways to spread the labels over the frames, blanks between them. With
    `per="label"` each example's is divided by its number of labels. The quotient is PyTorch's
    "mean" then; the sum with `per="example"` is its "sum". transformers' `ctc_loss_reduction` says
    which one a checkpoint was trained with.

    >>> even = jnp.zeros((1, 2, 2))  # two frames, blank or 1: three of the four paths give [1]
    >>> total, weight = ctc(even, jnp.array([[1, -100]]))
    >>> round(float(jnp.exp(-total)), 6), float(weight)
    (0.75, 1.0)

    Args:
        logits: in any float dtype; computed in float32.
        labels: of each example, first in its row; negative numbers are padding.
        frame_mask: True at real frames, which come first in each row; None for all.
        mask: True = counted; masked rows give neither loss nor gradient, even where they are NaN.
        blank: the label of no label; `pad_token_id` of a checkpoint's config.
        per: "example" or "label", what an example's loss is divided by.
        skip_impossible: whether examples with fewer frames than their labels need count nothing;
            else their loss is infinite (`ctc_zero_infinity`).

    Raises:
        ValueError: `per` is not known.
    """
    if per not in ("example", "label"):
        raise ValueError(f"per is {per!r}; there are 'example' and 'label'; give one of the two")
    mask = jnp.ones(logits.shape[0], bool) if mask is None else mask
    real = jnp.ones(logits.shape[:2], bool) if frame_mask is None else frame_mask
    wide = jnp.where(mask[:, None, None], logits.astype(jnp.float32), 0.0)
    padding = labels < 0
    possible = needed_frames(labels) <= jnp.sum(real, axis=1)
    # Rows that cannot be aligned are computed on no label: their own numbers have no gradient.
    empty = padding | ~possible[:, None]
    each = optax.ctc_loss(
        *(wide, 1.0 - real, jnp.where(empty, 0, labels), empty.astype(jnp.float32)), blank_id=blank
    )
    if per == "label":
        each = each / jnp.maximum(jnp.sum(~padding, axis=1), 1)
    each = jnp.where(possible, each, 0.0 if skip_impossible else jnp.inf)
    return jnp.sum(jnp.where(mask, each, 0.0)), jnp.sum(mask, dtype=jnp.float32)


def needed_frames(labels: Int[Array, "n length"]) -> Int[Array, " n"]:
    """Return the least number of frames that each row's labels fit into.

    One for each label, and one more for the blank between two equal ones.

    >>> needed_frames(jnp.array([[3, 3, 4], [5, -100, -100]])).tolist()
    [4, 1]
    """
    real = labels >= 0
    again = real[:, 1:] & (labels[:, 1:] == labels[:, :-1])
    return jnp.sum(real, axis=1) + jnp.sum(again, axis=1)
