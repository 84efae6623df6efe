"""Position tables of one grid of patches for another, by bicubic interpolation as PyTorch has it.

Reference: Keys 1981, doi:10.1109/TASSP.1981.1163711; for ViT: Dosovitskiy et al. 2020,
arXiv:2010.11929, section 3.2.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def interpolate_positions(
    table: Float[Array, "1 positions dim"],
    old: tuple[int, int],
    new: tuple[int, int],
    *,
    antialias: bool = False,
    align_corners: bool = False,
    offset: float = 0.0,
) -> Float[Array, "1 others dim"]:
    """Return a table for `new` rows and columns of patches from one for `old`, in float32.

    It is `torch.nn.functional.interpolate(mode="bicubic")`. Positions before those of the patches
    (of a CLS token) stay as they are; the same grid gives the table back.

    Args:
        table: positions of the tokens before the patches, then of the patches, row by row.
        old: (rows, columns) of the patches that the table is for.
        new: (rows, columns) that are wanted.
        antialias: whether a smaller grid averages over what it covers; the kernel then is Pillow's
            (a = -0.5) and not PyTorch's own (a = -0.75).
        align_corners: whether the outermost patches stay in the corners.
        offset: added to the wanted sides where the scale is made of them; DINO's code has 0.1.

    Raises:
        ValueError: the table has fewer positions than patches.

    >>> table = jnp.arange(5.0).reshape(1, 5, 1)
    >>> interpolate_positions(table, (2, 2), (2, 1)).ravel().tolist()
    [0.0, 1.5, 3.5]
    """
    before = table.shape[1] - old[0] * old[1]
    if before < 0:
        raise ValueError(
            f"the table has {table.shape[1]} positions, fewer than the {old[0]} x {old[1]} patches "
            "that it is said to be for; give the grid of the checkpoint"
        )
    if tuple(old) == tuple(new):
        return table
    patches = table[0, before:].astype(jnp.float32).reshape(*old, -1)
    rows, columns = (
        jnp.asarray(_weights(a, b, antialias, align_corners, offset))
        for a, b in zip(old, new, strict=True)
    )
    made = jnp.einsum("pr,rcd->pcd", rows, patches, precision=jax.lax.Precision.HIGHEST)
    made = jnp.einsum("qc,pcd->pqd", columns, made, precision=jax.lax.Precision.HIGHEST)
    made = made.reshape(1, new[0] * new[1], -1).astype(table.dtype)
    return jnp.concatenate([table[:, :before], made], axis=1)


def _weights(old: int, new: int, antialias: bool, align_corners: bool, offset: float) -> np.ndarray:
    """Return the (new, old) matrix that interpolates along one side."""
    weights = np.zeros((new, old))
    scale = old / (new + offset)
    if align_corners:
        scale = (old - 1) / (new - 1) if new > 1 else 0.0
    for place in range(new):
        if antialias:
            weights[place] = _averaged(scale * (place + 0.5), max(scale, 1.0), old)
            continue
        at = scale * place if align_corners else scale * (place + 0.5) - 0.5
        low = math.floor(at)
        for other in range(low - 1, low + 3):  # beyond the edge the last patch stands
            weights[place, min(max(other, 0), old - 1)] += _keys(at - other, -0.75)
    return weights.astype(np.float32)


def _averaged(centre: float, stretch: float, old: int) -> np.ndarray:
    """Return Pillow's weights about a centre: a wider kernel, cut off at the edges."""
    low = max(int(centre - 2 * stretch + 0.5), 0)
    high = min(int(centre + 2 * stretch + 0.5), old)
    row = np.zeros(old)
    row[low:high] = [_keys((i - centre + 0.5) / stretch, -0.5) for i in range(low, high)]
    return row / row.sum()


def _keys(distance: float, a: float) -> float:
    """Return the cubic convolution kernel at a distance."""
    x = abs(distance)
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0
