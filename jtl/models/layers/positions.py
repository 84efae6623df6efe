"""Positions of tokens: those of the batch, or counted from 0."""

from typing import Any

import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch


def positions(batch: Batch, length: int) -> jax.Array:
    """Return `batch["position_ids"]` (n, length), or 0, 1, ... (1, length) where there are none.

    Code that generates text pads on the left and counts positions from the first real token:
    `maximum(cumsum(mask, 1) - 1, 0)`. Batches for training do not, and neither is done here.

    >>> positions({}, 3).tolist()
    [[0, 1, 2]]
    """
    given: Any = batch.get("position_ids")
    return jnp.arange(length)[None, :] if given is None else jnp.asarray(given)
