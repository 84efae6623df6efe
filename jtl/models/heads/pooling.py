"""One vector for each example, from the vectors of its positions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

POOLINGS = ("cls", "mean")


def pool(out: Mapping[str, jax.Array], batch: Mapping[str, Any], pooling: str | None) -> jax.Array:
    """Return one vector for each example, (n, dim), from tokens of shape (n, positions, dim).

    Args:
        out: "tokens" for "cls" and "mean", "pooled" for None.
        batch: its "attention_mask" (n, positions), if any, keeps padding out of the mean.
        pooling: "cls" takes the first position, "mean" the mean over real positions, None the
            backbone's own.

    >>> tokens = jnp.array([[[1.0], [3.0], [9.0]]])
    >>> float(pool({"tokens": tokens}, {"attention_mask": jnp.array([[1, 1, 0]])}, "mean")[0, 0])
    2.0
    """
    if pooling is None:
        return out["pooled"]
    if pooling == "cls":
        return out["tokens"][:, 0]
    if pooling != "mean":
        raise ValueError(f"pooling {pooling!r} is not known; give one of {POOLINGS}, or None")
    tokens = out["tokens"].astype(jnp.float32)
    mask = batch.get("attention_mask")
    if mask is None:
        return jnp.mean(tokens, axis=1).astype(out["tokens"].dtype)
    weight = jnp.asarray(mask, jnp.float32)[:, :, None]
    mean = jnp.sum(tokens * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1e-9)
    return mean.astype(out["tokens"].dtype)
