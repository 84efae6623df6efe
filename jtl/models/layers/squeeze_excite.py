"""Squeeze and excitation: each channel is scaled by what the whole map holds.

Reference: Hu et al. 2017, arXiv:1709.01507.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.layers.activations import activation
from jtl.models.layers.pointwise import pointwise


class SqueezeExcite(nn.Module):
    """Scale channels by sigmoid(expand(act(reduce(mean of the map)))).

    The two are convolutions of size 1, as the checkpoints have them: `reduce`, `expand`.

    Attributes:
        narrow: width between the two.
        act: name of the activation there.
        dtype: of the computation; the mean and the parameters are float32.
    """

    narrow: int
    act: str = "relu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Return hidden (n, height, width, dim) with its channels scaled."""
        mean = jnp.mean(hidden.astype(jnp.float32), axis=(1, 2), keepdims=True)
        options: Any = dict(dtype=self.dtype, conv_general_dilated=pointwise)
        small = nn.Conv(self.narrow, (1, 1), **options, name="reduce")(mean)
        small = activation(self.act)(small)
        wide = nn.Conv(hidden.shape[-1], (1, 1), **options, name="expand")(small)
        return hidden * jax.nn.sigmoid(wide)
