"""Self-attention inside the windows of a map, which may be shifted.

Reference: Liu et al. 2021, arXiv:2103.14030 (Swin), section 3.2.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.layers.attention import attention
from jtl.models.layers.dense import flat_dot
from jtl.models.layers.dropout import Dropout
from jtl.models.layers.windows import (
    cut_windows,
    join_windows,
    padded,
    relative_places,
    shifted_bias,
)


class WindowAttention(nn.Module):
    """Multi-head attention of each place to those of its window, without an output projection.

    Leaves: query, key, value, and `relative_position_bias_table` ((2 size - 1)^2, heads). A map
    whose sides are no multiples of the window is padded with zeros, which are attended to.

    Attributes:
        heads: number of heads, a divisor of the width.
        size: of a window, along both sides.
        shift: of the windows, 0 for none. A map of one window across is never shifted.
        dropout: rate of dropout of the attention probabilities, where live.
        bias: whether query, key and value have one.
        scale: standard deviation of the initial kernels.
        dtype: of the computation; parameters are float32.
    """

    heads: int
    size: int
    shift: int = 0
    dropout: float = 0.0
    bias: bool = True
    scale: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: jax.Array, live: bool = False) -> jax.Array:
        """Return (n, height, width, dim) of maps (n, height, width, dim).

        Raises:
            ValueError: a side of the map is smaller than a window.
        """
        size, (height, width) = self.size, maps.shape[1:3]
        if min(height, width) < size:
            raise ValueError(
                f"a map is {height} by {width}, smaller than the windows of {size}; "
                "give larger images, or take a checkpoint of smaller windows"
            )
        shift = 0 if min(height, width) == size else self.shift
        whole = padded(maps, size, size)
        rows, columns = whole.shape[1:3]
        windows = cut_windows(jnp.roll(whole, (-shift, -shift), (1, 2)), size)
        windows = self._attend(windows, self._bias(len(windows), rows, columns, shift), live)
        whole = jnp.roll(join_windows(windows, rows, columns), (shift, shift), (1, 2))
        return whole[:, :height, :width]

    def _bias(self, windows: int, rows: int, columns: int, shift: int) -> jax.Array:
        """Return (windows or 1, heads, positions, positions)."""
        shape = ((2 * self.size - 1) ** 2, self.heads)
        init = nn.initializers.truncated_normal(0.02)
        table = self.param("relative_position_bias_table", init, shape)
        bias = table[relative_places(self.size)].transpose(2, 0, 1)[None]
        if not shift:
            return bias
        far = shifted_bias(rows, columns, self.size, shift)[:, None]
        return jnp.tile(bias + far, (windows // len(far), 1, 1, 1))

    def _attend(self, windows: jax.Array, bias: jax.Array, live: bool) -> jax.Array:
        dim = windows.shape[-1]
        query, key, value = (
            nn.Dense(
                dim,
                use_bias=self.bias,
                dtype=self.dtype,
                dot_general=flat_dot,
                kernel_init=nn.initializers.normal(self.scale),
                name=name,
            )(windows).reshape(*windows.shape[:-1], self.heads, dim // self.heads)
            for name in ("query", "key", "value")
        )
        drop = Dropout(self.dropout, deterministic=False) if live and self.dropout > 0 else None
        # The fused kernels of a GPU have no gradient of a bias at the odd lengths of windows.
        way = "matmul" if jax.default_backend() == "cpu" else "einsum"
        out = attention(query, key, value, bias=bias, dropout=drop, implementation=way)
        return out.reshape(windows.shape)
