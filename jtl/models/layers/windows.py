"""Windows of a map: cut, put together, and what attention inside them needs.

Reference: Liu et al. 2021, arXiv:2103.14030 (Swin).
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_FAR = -100.0  # what the published networks add where two places are no neighbours


def padded(
    maps: Float[Array, "n height width dim"], rows: int, columns: int
) -> Float[Array, "n high wide dim"]:
    """Return maps with zeros at the bottom and right, to multiples of rows and columns.

    >>> padded(jnp.zeros((1, 5, 4, 1)), 2, 4).shape
    (1, 6, 4, 1)
    """
    height, width = maps.shape[1:3]
    return jnp.pad(maps, ((0, 0), (0, -height % rows), (0, -width % columns), (0, 0)))


def cut_windows(
    maps: Float[Array, "n height width dim"], size: int
) -> Float[Array, "windows positions dim"]:
    """Return all windows of `size` by `size`, row by row; the sides are multiples of `size`.

    >>> cut_windows(jnp.arange(8.0).reshape(1, 2, 4, 1), 2)[..., 0].tolist()
    [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]
    """
    n, height, width, dim = maps.shape
    parts = maps.reshape(n, height // size, size, width // size, size, dim).swapaxes(2, 3)
    return parts.reshape(-1, size * size, dim)


def join_windows(
    windows: Float[Array, "windows positions dim"], height: int, width: int
) -> Float[Array, "n height width dim"]:
    """Return the maps that `cut_windows` has cut.

    >>> maps = jnp.arange(16.0).reshape(2, 2, 4, 1)
    >>> bool((join_windows(cut_windows(maps, 2), 2, 4) == maps).all())
    True
    """
    size = int(round(windows.shape[1] ** 0.5))
    rows, columns, dim = height // size, width // size, windows.shape[-1]
    parts = windows.reshape(-1, rows, columns, size, size, dim).swapaxes(2, 3)
    return parts.reshape(-1, height, width, dim)


@functools.cache
def relative_places(size: int) -> np.ndarray:
    """Return the row of the bias table for each pair of places of a window, (query, key).

    The table has (2 size - 1)^2 rows, one for each distance down and across.

    >>> relative_places(2)[0].tolist(), relative_places(2)[3].tolist()
    ([4, 3, 1, 0], [8, 7, 5, 4])
    """
    rows, columns = (axis.ravel() for axis in np.indices((size, size)))
    down = rows[:, None] - rows[None, :] + size - 1
    across = columns[:, None] - columns[None, :] + size - 1
    return down * (2 * size - 1) + across


@functools.cache
def shifted_bias(height: int, width: int, size: int, shift: int) -> np.ndarray:
    """Return (windows, positions, positions): 0 between neighbours, -100 else.

    A map that has been rolled by `shift` has windows at its last rows and columns that hold places
    of opposite edges; those do not attend to each other.

    >>> shifted_bias(2, 4, 2, 1)[0, 0].tolist()
    [0.0, 0.0, -100.0, -100.0]
    """
    rows, columns = (
        (np.arange(side) >= side - size).astype(int) + (np.arange(side) >= side - shift)
        for side in (height, width)
    )
    regions = (rows[:, None] * 3 + columns[None, :]).reshape(
        height // size, size, width // size, size
    )
    regions = regions.swapaxes(1, 2).reshape(-1, size * size)
    same = regions[:, :, None] == regions[:, None, :]
    return np.where(same, 0.0, _FAR).astype(np.float32)
