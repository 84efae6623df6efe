"""Decomposed relative positions: each query meets a vector for the rows and one for the columns.

    score(q, k) += q . r_h(row of q - row of k) + q . r_w(column of q - column of k)

Reference: Li et al. 2021, arXiv:2112.01526 (MViTv2), equation 4; Kirillov et al. 2023,
arXiv:2304.02643 (SAM).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def decomposed_bias(
    query: Float[Array, "n positions heads size"],
    rows: Float[Array, "distances size"],
    columns: Float[Array, "others size"],
    height: int,
    width: int,
) -> Float[Array, "n heads positions positions"]:
    """Return what is added to the scaled scores of a map's places, row by row.

    Args:
        query: not scaled.
        rows: a vector for each distance down, from -(h - 1) to h - 1; interpolated where h is
            not `height`.
        columns: the same across.
        height: of the map.
        width: of the map.

    >>> query, rows = jnp.ones((1, 2, 1, 1)), jnp.array([[1.0], [2.0], [3.0]])
    >>> decomposed_bias(query, rows, jnp.zeros((1, 1)), 2, 1)[0, 0].tolist()
    [[2.0, 1.0], [3.0, 2.0]]
    """
    n, _, heads, size = query.shape
    grid = query.reshape(n, height, width, heads, size)
    down = _by_pair(resized_rows(rows, 2 * height - 1), height).astype(query.dtype)
    across = _by_pair(resized_rows(columns, 2 * width - 1), width).astype(query.dtype)
    of_rows = jnp.einsum("nhwad,hkd->nahwk", grid, down)[..., :, None]
    of_columns = jnp.einsum("nhwad,wkd->nahwk", grid, across)[..., None, :]
    places = height * width
    return (of_rows + of_columns).reshape(n, heads, places, places)


def resized_rows(table: Float[Array, "old dim"], new: int) -> Float[Array, "new dim"]:
    """Return a table of another number of rows, by linear interpolation as PyTorch has it.

    >>> resized_rows(jnp.array([[0.0], [2.0], [4.0]]), 2).ravel().tolist()
    [0.5, 3.5]
    """
    old = table.shape[0]
    if old == new:
        return table
    at = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    low = np.floor(at).astype(int)
    share = jnp.asarray((at - low)[:, None], table.dtype)
    high = np.minimum(low + 1, old - 1)
    return table[low] * (1 - share) + table[high] * share


def _by_pair(table: Float[Array, "distances dim"], side: int) -> Float[Array, "side side dim"]:
    """Return the vector of each pair of places, (query, key)."""
    return table[np.arange(side)[:, None] - np.arange(side)[None, :] + side - 1]
