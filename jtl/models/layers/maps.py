"""What families of maps (n, height, width, channels) share: real rows, and maps as tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.models.backbone import Batch


def real_rows(batch: Batch) -> jax.Array | None:
    """Return `batch["mask"]`, True at rows that are no padding; None where all are real.

    >>> real_rows({"mask": jnp.array([1, 0])}).tolist(), real_rows({}) is None
    ([True, False], True)
    """
    mask = batch.get("mask")
    return None if mask is None else jnp.asarray(mask, bool)


def flat(maps: Float[Array, "n height width dim"]) -> Float[Array, "n positions dim"]:
    """Return the places of a map row by row, as tokens.

    >>> flat(jnp.arange(4.0).reshape(1, 2, 2, 1)).ravel().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    return maps.reshape(maps.shape[0], -1, maps.shape[-1])
