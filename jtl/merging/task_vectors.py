"""Task vectors, what training added to the weights: Ilharco et al. 2023, arXiv:2212.04089.

Vectors are float32 whatever the weights are, so that `add(start, difference(tuned, start))` loses
nothing to the vector's own rounding. A leaf outside the mask is None, and `add` leaves it alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jtl import masks, trees


def difference(tuned: PyTree, start: PyTree, *, mask: PyTree | None = None) -> PyTree:
    """Return the task vector, tuned - start, in float32.

    >>> difference({"w": jnp.array([3.0])}, {"w": jnp.array([1.0])})
    {'w': Array([2.], dtype=float32)}

    Args:
        tuned: weights after training.
        start: weights before it, a tree like `tuned`; outside the mask a leaf may be None.
        mask: True = in the vector; a new head stays out. None takes all.

    Raises:
        ValueError: structures or shapes differ, or a leaf in the mask is no floating point.

    Reference: Ilharco et al. 2023, arXiv:2212.04089, section 2.
    """
    chosen = tuned if mask is None else masks.split(tuned, mask)[0]
    return trees.in_float32(jnp.subtract, chosen, start, dtype=jnp.float32)


def add(params: PyTree, *vectors: PyTree) -> PyTree:
    """Return the weights plus the sum of all vectors, in the dtypes of the weights.

    >>> add({"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}, {"w": jnp.array([-5.0])})
    {'w': Array([-2.], dtype=float32)}

    Args:
        params: weights.
        vectors: trees like `params`; where a vector has None it adds nothing, and where all have
            None the leaf is the very one of `params`.

    Raises:
        ValueError: structures or shapes differ, or a leaf that moves is no floating point.
    """
    total = None
    for vector in vectors:
        trees.check_structure(params, vector, "the vector")
        total = vector if total is None else _sum(total, vector)
    if total is None:
        return params
    moves = jax.tree.map(lambda leaf: leaf is not None, total, is_leaf=lambda leaf: leaf is None)
    moving, rest = masks.split(params, moves)
    return masks.merge(trees.in_float32(jnp.add, moving, total), rest)


def scale(vector: PyTree, factor: float | int) -> PyTree:
    """Return the vector times a number: how much of the task is added.

    >>> scale({"w": jnp.array([3.0])}, 0.5)
    {'w': Array([1.5], dtype=float32)}
    """
    return trees.in_float32(lambda x: factor * x, vector)


def negate(vector: PyTree) -> PyTree:
    """Return the vector that takes the task away: adding it makes a model forget.

    >>> negate({"w": jnp.array([3.0])})
    {'w': Array([-3.], dtype=float32)}
    """
    return scale(vector, -1.0)


def _sum(one: PyTree, other: PyTree) -> PyTree:
    """Add two vectors, each of which may have holes of its own."""

    def either(x: jax.Array | None, y: jax.Array | None) -> jax.Array | None:
        return x if y is None else y if x is None else trees.in_float32(jnp.add, x, y)

    return jax.tree.map(either, one, other, is_leaf=lambda leaf: leaf is None)
