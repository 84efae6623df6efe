"""Scores of relative places: from one column for each offset to one column for each key.

What depends on a key only by its offset from the query is computed once for each offset, and put
in its place by the memory layout alone: no gather, and no scatter in the gradient.

Reference: Huang et al. 2018, arXiv:1809.04281 (the skewing of the Music Transformer).
"""

import jax
import numpy as np
from jaxtyping import Array, Float


def offsets(length: int) -> np.ndarray:
    """Return the offset from query to key, key - query, of each column that `skew` takes.

    >>> offsets(3).tolist()
    [-2, -1, 0, 1, 2, 3]
    """
    return np.arange(2 * length) - (length - 1)


def skew(by_offset: Float[Array, "*lead length twice"]) -> Float[Array, "*lead length length"]:
    """Return scores (..., query, key) from scores (..., query, offset).

    Args:
        by_offset: its columns are those of `offsets(length)`; the last of them is never read.

    >>> import jax.numpy as jnp
    >>> skew(jnp.array([[-1.0, 0.0, 1.0, 2.0], [-10.0, 0.0, 10.0, 20.0]])).tolist()
    [[0.0, 1.0], [-10.0, 0.0]]
    """
    *lead, length, columns = by_offset.shape
    # Row i lacks its first length - 1 - i columns: rows one shorter, read from the first that
    # row 0 has, begin one column earlier each time.
    flat = by_offset.reshape(*lead, length * columns)
    start = length - 1
    flat = jax.lax.slice_in_dim(flat, start, start + length * (columns - 1), axis=-1)
    return flat.reshape(*lead, length, columns - 1)[..., :length]
