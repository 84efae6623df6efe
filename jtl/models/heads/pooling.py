"""One vector for each example, from the vectors of its positions."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

POOLINGS = ("cls", "last", "mean")


def pool(out: Mapping[str, jax.Array], batch: Mapping[str, Any], pooling: str | None) -> jax.Array:
    """Return one vector for each example, (n, dim), from tokens of shape (n, positions, dim).

    Args:
        out: "pooled" for None, "tokens" for the others.
        batch: its "attention_mask" (n, positions), if any, says which positions are real, unless
            `out["token_mask"]` does: tokens may be other positions than the batch's.
        pooling: "cls" takes the first position, "last" the last real one (with padding on either
            side), "mean" the mean over real positions, None the backbone's own.

    >>> tokens = jnp.array([[[1.0], [3.0], [9.0]]])
    >>> float(pool({"tokens": tokens}, {"attention_mask": jnp.array([[1, 1, 0]])}, "mean")[0, 0])
    2.0
    >>> float(pool({"tokens": tokens}, {"attention_mask": jnp.array([[1, 1, 0]])}, "last")[0, 0])
    3.0
    """
    if pooling is None:
        return out["pooled"]
    if pooling == "cls":
        return out["tokens"][:, 0]
    mask = out.get("token_mask", batch.get("attention_mask"))
    if pooling == "last":
        return _last(out["tokens"], mask)
    if pooling != "mean":
        raise ValueError(f"pooling {pooling!r} is not known; give one of {POOLINGS}, or None")
    tokens = out["tokens"].astype(jnp.float32)
    if mask is None:
        return jnp.mean(tokens, axis=1).astype(out["tokens"].dtype)
    weight = jnp.asarray(mask, jnp.float32)[:, :, None]
    mean = jnp.sum(tokens * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1e-9)
    return mean.astype(out["tokens"].dtype)


def _last(tokens: jax.Array, mask: Any) -> jax.Array:
    """Return the last real position of each row; a row without any gives its first."""
    if mask is None:
        return tokens[:, -1]
    places = jnp.arange(tokens.shape[1])[None, :] * jnp.asarray(mask).astype(bool)
    last = jnp.argmax(places, axis=1)[:, None, None]
    return jnp.take_along_axis(tokens, last, axis=1)[:, 0]


class AttentionPool(nn.Module):
    """A mean over positions whose weights are a softmax of products with one trained vector.

    The vector begins as zeros, so that pooling begins as the mean over real positions.
    """

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: Any = None) -> jax.Array:
        """Return float32 (n, dim) from tokens (n, positions, dim) and mask (n, positions)."""
        tokens = tokens.astype(jnp.float32)
        query = self.param("query", nn.initializers.zeros, (tokens.shape[-1],))
        scores = jnp.einsum("npd,d->np", tokens, query) / jnp.sqrt(tokens.shape[-1])
        if mask is not None and mask.shape == scores.shape:
            scores = jnp.where(jnp.asarray(mask).astype(bool), scores, jnp.finfo(jnp.float32).min)
        return jnp.einsum("np,npd->nd", jax.nn.softmax(scores, axis=-1), tokens)
