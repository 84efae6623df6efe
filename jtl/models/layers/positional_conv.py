"""Positions by a long grouped convolution over time, its weight kept as direction and length.

The weight at each place of the kernel is `g v / |v|`, the norm over both axes of channels. Leaves
are g, v and the bias under the names and in the layouts that PyTorch's checkpoints have.

Reference: Baevski et al. 2020, arXiv:2006.11477, section 2; Salimans and Kingma 2016,
arXiv:1602.07868 (weight normalisation).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def weight_norm(
    direction: Float[Array, "out inner width"], length: Float[Array, "1 1 width"]
) -> Float[Array, "out inner width"]:
    """Return `length * direction / |direction|`, the norm taken at each place of the kernel.

    >>> weight_norm(jnp.array([[[3.0, 0.0]], [[4.0, 2.0]]]), jnp.array([[[10.0, 1.0]]])).tolist()
    [[[6.0, 0.0]], [[8.0, 1.0]]]
    """
    return direction * (length / _norm(direction))


class PositionalConv(nn.Module):
    """A convolution that keeps the number of positions: leaves weight_g, weight_v, bias.

    Attributes:
        width: places of the kernel; an even one looks one place further back than ahead.
        groups: of channels.
        dtype: of the computation; parameters are float32.
    """

    width: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Return (n, positions, dim)."""
        dim = hidden.shape[-1]
        init = nn.initializers.normal(2 * (1 / (self.width * dim)) ** 0.5)
        direction = self.param("weight_v", init, (dim, dim // self.groups, self.width))
        length = self.param("weight_g", lambda key: _norm(direction))
        bias = self.param("bias", nn.initializers.zeros, (dim,))
        kernel = weight_norm(direction, length).astype(self.dtype)
        back = self.width // 2
        made = jax.lax.conv_general_dilated(
            *(hidden.astype(self.dtype), kernel, (1,), [(back, self.width - 1 - back)]),
            dimension_numbers=("NWC", "OIW", "NWC"),
            feature_group_count=self.groups,
        )
        return made + bias.astype(self.dtype)[None, None, :]


def _norm(direction: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(direction), axis=(0, 1), keepdims=True))
