"""Memory aware synapses: Aljundi et al. 2018, arXiv:1711.09601.

Importance needs no labels: it is how much a parameter moves the length of the output.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jtl import per_example, trees


def mas(
    params: PyTree, anchor: PyTree, importance: PyTree, *, mask: PyTree | None = None
) -> Float[Array, ""]:
    """Return sum importance (params - anchor)^2; the paper has no half.

    >>> params, anchor = {"w": jnp.array([1.0, 5.0])}, {"w": jnp.array([0.0, 2.0])}
    >>> float(mas(params, anchor, {"w": jnp.array([4.0, 2.0])}))
    22.0

    Args:
        params: tree of arrays.
        anchor: parameters after the earlier task, a tree like `params`; None in a leaf outside the
            mask.
        importance: what `output_importance` gave at the anchor; None likewise. Over several tasks
            the importances add up, and the anchor is the newest.
        mask: True = included; a fresh head and held leaves stay out. None includes all.

    Raises:
        ValueError: the trees differ in structure or an included leaf in shape.

    Reference: Aljundi et al. 2018, arXiv:1711.09601, equation 4, with lambda 1.
    """
    return trees.weighted_squared_distance(params, anchor, weight=importance, mask=mask)


def output_importance(
    outputs: Callable[[Any, Any], jax.Array],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    mask: PyTree | None = None,
    chunk: int | None = None,
) -> PyTree:
    """Return the mean over examples of |d (sum of squared outputs) / d params|, in float32.

    The result does not depend on how the examples are cut into batches: absolute values are taken
    of the gradients of single examples, which the mean of a batch would cancel.

    >>> batches = [jnp.array([1.0, -3.0]), jnp.array([2.0])]
    >>> importance = output_importance(lambda w, x: w * x, jnp.float32(0.5), batches)
    >>> f"{importance:.4f}"  # |2 w x^2| = x^2, so (1 + 9 + 4) / 3
    '4.6667'

    Args:
        outputs: `(params, example) -> array` for one example, in evaluation mode: the logits.
        params: where the importance is taken.
        batches: examples, trees of arrays with a leading axis of rows that are all real.
        mask: True = included; other leaves are not differentiated and are None in the result.
        chunk: examples that are taken at once; None chooses, see `per_example.gradient_moment`.

    Raises:
        ValueError: chunk is below 1; there are no examples; rows do not agree in number; an
            included leaf is no float; a value is not finite.

    Reference: Aljundi et al. 2018, arXiv:1711.09601, equations 2 and 3, with the squared length of
        the output (section 4.1).
    """
    score = per_example.once(_make_score, outputs)
    return per_example.gradient_moment(score, params, batches, power=1, mask=mask, chunk=chunk)


def _make_score(outputs: Callable[[Any, Any], jax.Array]) -> per_example.Score:
    def score(params: Any, example: Any) -> tuple[jax.Array, jax.Array]:
        out = jnp.asarray(outputs(params, example), jnp.float32)
        return jnp.sum(out**2)[None], jnp.ones(1)

    return score
