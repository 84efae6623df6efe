"""WiSE-FT, the straight line from start to tuned weights: Wortsman et al. 2022, arXiv:2109.01903.

What was new in the tuned model, a head, has no start: it lies outside the mask and is the tuned one
at every alpha.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jtl import masks, trees
from jtl.near import listed


def wise_ft(
    start: PyTree, tuned: PyTree, alphas: Sequence[float | int], *, mask: PyTree | None = None
) -> Iterator[tuple[float, PyTree]]:
    """Return an iterator over (alpha, (1 - alpha) start + alpha tuned): one tree in memory a time.

    Alpha 0 gives the very leaves of the start and 1 those of the tuned tree. A number that is the
    same in both is the same, bit for bit, at every alpha.

    >>> start, tuned = {"body": jnp.array([0.0, 4.0])}, {"body": jnp.array([8.0, 4.0])}
    >>> [(alpha, tree["body"].tolist()) for alpha, tree in wise_ft(start, tuned, (0.0, 0.25))]
    [(0.0, [0.0, 4.0]), (0.25, [2.0, 4.0])]

    Args:
        start: weights before training. Leaves outside the mask are not read and may be absent.
        tuned: weights after training.
        alphas: share of the tuned weights, each from 0 to 1.
        mask: tree of bools like `tuned`, True = interpolated; None interpolates all.

    Raises:
        ValueError: an alpha outside 0 to 1; a leaf inside the mask that the start has not, a leaf
            that only the start has, shapes that differ, or a leaf that is no floating point.

    Reference: Wortsman et al. 2022, arXiv:2109.01903, equation 1.
    """
    wrong = [alpha for alpha in alphas if not 0 <= alpha <= 1]
    if wrong or not len(alphas):
        raise ValueError(f"alphas are {list(alphas)}; give one or more, each from 0 to 1")
    mask = jax.tree.map(lambda _: True, tuned) if mask is None else mask
    moving, rest = masks.split(tuned, mask)
    begun = _like(moving, start, tuned)
    jax.eval_shape(lambda x, y: trees.in_float32(jnp.add, x, y), begun, moving)
    return ((float(a), masks.merge(_between(begun, moving, float(a)), rest)) for a in alphas)


def _between(start: PyTree, tuned: PyTree, alpha: float) -> PyTree:
    if alpha in (0.0, 1.0):
        return tuned if alpha else start

    def mixed(x: jax.Array, y: jax.Array) -> jax.Array:
        # Where the two agree, as in every held leaf, rounding must not move them.
        return jnp.where(x == y, y, (1.0 - alpha) * x + alpha * y)

    return trees.in_float32(mixed, start, tuned)


def _like(moving: PyTree, start: PyTree, tuned: PyTree) -> PyTree:
    """Return the leaves of the start under the names that move, None elsewhere."""
    there = dict(zip(trees.names(start), jax.tree.leaves(start), strict=True))
    places = trees.names(tuned)
    wanted = trees.names(moving)
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ValueError(
            f"the start has no leaf {listed(missing)}, which the mask interpolates; the start has "
            f"{len(there)} leaves and the tuned tree {len(places)}; a head that is new has no "
            "start: leave it out by mask=, False on its leaves, and it stays the tuned one"
        )
    surplus = [name for name in there if name not in set(places)]
    if surplus:
        raise ValueError(
            f"the start has leaves {listed(surplus)} that the tuned tree has not; give the start "
            "without them, or a tuned model that kept them"
        )
    return jax.tree.unflatten(jax.tree.structure(moving), [there[name] for name in wanted])
