"""Sines and cosines of positions, as MAE's family of models has them: fixed, not learned.

A number p becomes `[sin(p w_0), ..., sin(p w_k), cos(p w_0), ..., cos(p w_k)]`, with
`w_i = 10000^(-i / (dim / 2))`.

Reference: Vaswani et al. 2017, arXiv:1706.03762, section 3.5; He et al. 2021, arXiv:2111.06377;
over time, height and width: Jakubik et al. 2023, arXiv:2310.18660.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def sincos(values: Float[Array, "*shape"], dim: int) -> Float[Array, "*shape dim"]:
    """Return float32 sines and cosines of given numbers, such as days of the year.

    Raises:
        ValueError: `dim` is odd.

    >>> sincos(jnp.array([0.0]), 4).tolist()
    [[0.0, 0.0, 1.0, 1.0]]
    """
    _halves(dim, 2)
    speeds = jnp.asarray(_speeds(dim), jnp.float32).reshape((1,) * values.ndim + (-1,))
    angles = values.astype(jnp.float32)[..., None] * speeds
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def sinusoids(length: int, dim: int) -> np.ndarray:
    """Return Whisper's table (length, dim): its slowest wave has the speed 1/10000 itself.

    Raises:
        ValueError: `dim` is odd.

    >>> sinusoids(2, 4).astype(float).round(4).tolist()
    [[0.0, 0.0, 1.0, 1.0], [0.8415, 0.0001, 0.5403, 1.0]]
    """
    _halves(dim, 2)
    speeds = 1.0 / 10000 ** (np.arange(dim // 2) / max(dim // 2 - 1, 1))
    angles = np.outer(np.arange(length), speeds)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sincos_2d(rows: int, columns: int, dim: int, *, before: int = 1) -> np.ndarray:
    """Return the table (before + rows * columns, dim) of MAE: the column's half, then the row's.

    Args:
        rows: of patches.
        columns: of patches.
        dim: a multiple of 4.
        before: number of tokens before the patches, whose positions are zeros.

    Raises:
        ValueError: `dim` is no multiple of 4.

    >>> sincos_2d(1, 2, 4).astype(float).round(2).tolist()
    [[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0], [0.84, 0.54, 0.0, 1.0]]
    """
    _halves(dim, 4)
    row, column = np.indices((rows, columns))
    parts = [_table(column.ravel(), dim // 2), _table(row.ravel(), dim // 2)]
    return _below(np.concatenate(parts, axis=1), before)


def sincos_3d(frames: int, rows: int, columns: int, dim: int, *, before: int = 1) -> np.ndarray:
    """Return Prithvi's table: 6/16 of `dim` for the column, 6/16 for the row, 4/16 for the frame.

    Raises:
        ValueError: `dim` is no multiple of 16.

    >>> sincos_3d(2, 1, 1, 16)[2, 12:].astype(float).round(2).tolist()
    [0.84, 0.01, 0.54, 1.0]
    """
    _halves(dim, 16)
    side, time = dim // 16 * 6, dim // 16 * 4
    frame, row, column = (x.ravel() for x in np.indices((frames, rows, columns)))
    parts = [_table(column, side), _table(row, side), _table(frame, time)]
    return _below(np.concatenate(parts, axis=1), before)


def _speeds(dim: int) -> np.ndarray:
    return 1.0 / 10000 ** (np.arange(dim // 2) / (dim / 2))


def _table(values: np.ndarray, dim: int) -> np.ndarray:
    angles = np.outer(values, _speeds(dim))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _below(table: np.ndarray, before: int) -> np.ndarray:
    first = np.zeros((before, table.shape[1]))
    return np.concatenate([first, table]).astype(np.float32)


def _halves(dim: int, unit: int) -> None:
    if dim % unit:
        raise ValueError(
            f"sines and cosines fill {dim} numbers; they need a multiple of {unit}; "
            "give another width"
        )
