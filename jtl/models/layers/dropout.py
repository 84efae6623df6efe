"""Dropout with half the random bits."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Dropout(nn.Module):
    """Dropout as `nn.Dropout`, with two numbers for each 32 bits: on a CPU, drawing is its cost.

    The rate is kept to 1/65536, and what stays is divided by the exact share that stays.

    Attributes:
        rate: share of the numbers that become zero, in [0, 1).
        deterministic: whether the input passes as it is.
    """

    rate: float
    deterministic: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Return numbers of the shape of the input."""
        if not 0.0 <= self.rate < 1.0:
            raise ValueError(f"dropout is {self.rate}; a rate is in [0, 1); give 0 for none")
        dropped = round(self.rate * 65536)
        if self.deterministic or not dropped:
            return inputs
        key = self.make_rng("dropout")
        *rows, last = inputs.shape
        words = jax.random.bits(key, (*rows, -(-last // 2)), jnp.uint32)
        halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*rows, -1)[..., :last]
        kept = halves >= dropped
        return jnp.where(kept, inputs * (65536 / (65536 - dropped)), 0.0).astype(inputs.dtype)
