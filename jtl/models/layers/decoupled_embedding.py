"""A word embedding in two tables: that of the language model, and rows that were added to it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class DecoupledEmbedding(nn.Module):
    """Rows of one table, and those beyond its end of another: so the first can be held by itself.

    Attributes:
        rows: of the first table.
        additional: rows of the second; 0 for none.
        width: of a row.
        scale: standard deviation of initial rows.
    """

    rows: int
    additional: int
    width: int
    scale: float = 0.02

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Return float32 (n, positions, width) of tokens (n, positions)."""
        init = nn.initializers.normal(self.scale)
        table = self.param("embedding", init, (self.rows, self.width))
        if not self.additional:
            return jnp.take(table, ids, axis=0)
        # float32 whatever the dtype: the gradient of a row is a sum over all tokens that took it.
        options: Any = dict(dtype=jnp.float32, embedding_init=init)
        added = nn.Embed(self.additional, self.width, name="additional_embedding", **options)
        own = jnp.take(table, jnp.minimum(ids, self.rows - 1), axis=0)
        beyond = added(jnp.maximum(ids - self.rows, 0))
        return jnp.where((ids < self.rows)[:, :, None], own, beyond)
