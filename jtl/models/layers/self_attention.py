"""Self-attention with its query, key and value layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.layers.attention import attention
from jtl.models.layers.dense import flat_dot
from jtl.models.layers.dropout import Dropout


class SelfAttention(nn.Module):
    """Multi-head self-attention without its output projection: leaves query, key, value.

    Attributes:
        dim: width of the input and of the output.
        heads: number of heads, a divisor of `dim`.
        dropout: rate of dropout of the attention probabilities, where live.
        bias: whether the three projections have one.
        scale: standard deviation of the initial kernels.
        dtype: of the computation; parameters are float32.
    """

    dim: int
    heads: int
    dropout: float = 0.0
    bias: bool = True
    scale: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, hidden: jax.Array, mask: jax.Array | None = None, live: bool = False
    ) -> jax.Array:
        """Return (n, positions, dim) from hidden (n, positions, dim) and mask (n, positions)."""
        if self.dim % self.heads:
            raise ValueError(
                f"{self.heads} attention heads do not divide the width {self.dim}; "
                "give a number of heads that does"
            )
        shape = (*hidden.shape[:-1], self.heads, self.dim // self.heads)
        query, key, value = (
            nn.Dense(
                self.dim,
                use_bias=self.bias,
                dtype=self.dtype,
                dot_general=flat_dot,
                kernel_init=nn.initializers.normal(self.scale),
                name=name,
            )(hidden).reshape(shape)
            for name in ("query", "key", "value")
        )
        drop = None
        if live and self.dropout > 0:
            drop = Dropout(self.dropout, deterministic=False)
        return attention(query, key, value, mask=mask, dropout=drop).reshape(hidden.shape)
