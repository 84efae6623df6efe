"""Squared error with masked rows."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num


def squared_error(
    predictions: Float[Array, "*batch"],
    targets: Num[Array, "*batch"],
    *,
    mask: Bool[Array, "*batch"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return sum (prediction - target)^2 and the number of predictions; the quotient is the mean.

    >>> total, weight = squared_error(jnp.array([1.0, 5.0]), jnp.array([3.0, 4.0]))
    >>> float(total), float(weight)
    (5.0, 2.0)

    Args:
        predictions: in any float dtype; computed in float32.
        targets: one for each prediction.
        mask: True = counted; masked rows give neither loss nor gradient, even where they are NaN.
    """
    mask = jnp.ones(predictions.shape, bool) if mask is None else mask
    gap = predictions.astype(jnp.float32) - targets.astype(jnp.float32)
    return jnp.sum(jnp.where(mask, gap, 0.0) ** 2), jnp.sum(mask, dtype=jnp.float32)
