"""TIES: trim, elect signs, mean of those that agree: Yadav et al. 2023, arXiv:2306.01708."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jtl import trees


def ties(vectors: Sequence[PyTree], *, keep: float = 0.2) -> PyTree:
    """Return one task vector of several: trimmed, of elected sign, the disjoint mean.

    In each place the sign is that of the sum of the trimmed vectors, and the value the mean of
    those that have this sign; a place where none has is 0. Of one vector, this is its trimmed self.

    >>> a, b = {"w": jnp.array([4.0, -1.0, 3.0])}, {"w": jnp.array([2.0, -5.0, -4.0])}
    >>> ties([a, b], keep=1.0)["w"].tolist()
    [3.0, -3.0, -4.0]

    Args:
        vectors: task vectors of models with the same start, as `task_vectors.difference` gives
            them; a None is a hole.
        keep: share of the numbers of each vector that survives the trim, of 0 to 1.

    Raises:
        ValueError: no vector, a share outside 0 to 1, or vectors that do not fit each other.

    Reference: Yadav et al. 2023, arXiv:2306.01708, algorithm 1.
    """
    if not len(vectors):
        raise ValueError("0 task vectors are given; give one or more")
    trimmed = [trim(vector, keep=keep) for vector in vectors]
    return trees.in_float32(_disjoint_mean, *trimmed)


def trim(vector: PyTree, *, keep: float) -> PyTree:
    """Return the vector with all but its largest numbers set to 0.

    The largest are counted over the whole vector, not leaf by leaf; of those that are as large as
    the last one kept, all stay.

    >>> trim({"a": jnp.array([1.0, -4.0]), "b": jnp.array([3.0, 0.5])}, keep=0.5)
    {'a': Array([ 0., -4.], dtype=float32), 'b': Array([3., 0.], dtype=float32)}

    Args:
        vector: task vector, on this host; a None is a hole.
        keep: share of its numbers that stays, more than 0 and at most 1; at least one stays.

    Raises:
        ValueError: a share outside this range, or a leaf that is no floating point.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; give the share that survives, more than 0, at most 1")
    sizes = trees.in_float32(jnp.abs, vector, dtype=jnp.float32)
    flat = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(sizes)]
    if not flat:
        return vector
    magnitudes = np.concatenate(flat)
    last = len(magnitudes) - max(1, round(keep * len(magnitudes)))
    least = np.partition(magnitudes, last)[last]
    return trees.in_float32(lambda x: jnp.where(jnp.abs(x) >= least, x, 0.0), vector)


def _disjoint_mean(*leaves: Any) -> Any:
    stacked = jnp.stack(leaves)
    sign = jnp.sign(jnp.sum(stacked, axis=0))
    agrees = (jnp.sign(stacked) == sign[None]) & (stacked != 0)
    count = jnp.maximum(jnp.sum(agrees, axis=0), 1)
    return jnp.sum(jnp.where(agrees, stacked, 0.0), axis=0) / count
