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


def grouped_conv(
    hidden: Float[Array, "n positions dim"],
    kernel: Float[Array, "dim inner width"],
    *,
    fourier: bool | None = None,
) -> Float[Array, "n positions dim"]:
    """Return the convolution over positions of each group of channels; their number stays.

    Args:
        hidden: there are `dim / inner` groups of channels.
        kernel: out, in (of the same group), place; an even width looks one place further back than
            ahead.
        fourier: whether to multiply spectra, in float32; None does so on a CPU, where XLA's own
            gradient of a long grouped kernel is slower by an order of magnitude.

    >>> x = jnp.arange(1.0, 4.0).reshape(1, 3, 1)
    >>> grouped_conv(x, jnp.array([[[1.0, 10.0]]]), fourier=False).ravel().tolist()
    [10.0, 21.0, 32.0]
    """
    if fourier is None:
        fourier = jax.default_backend() == "cpu"
    width = kernel.shape[-1]
    back, groups = width // 2, hidden.shape[-1] // kernel.shape[1]
    if fourier:
        return _by_spectra(hidden, kernel, back, groups)
    return jax.lax.conv_general_dilated(
        *(hidden, kernel, (1,), [(back, width - 1 - back)]),
        dimension_numbers=("NWC", "OIW", "NWC"),
        feature_group_count=groups,
    )


def _by_spectra(hidden: jax.Array, kernel: jax.Array, back: int, groups: int) -> jax.Array:
    n, positions, dim = hidden.shape
    length = -(-(positions + kernel.shape[-1] - 1) // 64) * 64  # nothing wraps; quick to transform
    ends = ((0, 0), (back, length - positions - back), (0, 0))
    waves = jnp.fft.rfft(jnp.pad(hidden.astype(jnp.float32), ends), axis=1)
    kernels = jnp.conj(jnp.fft.rfft(kernel.astype(jnp.float32), n=length, axis=-1))
    inner = dim // groups
    made = jnp.einsum(
        "nfgi,goif->nfgo",
        waves.reshape(n, -1, groups, inner),
        kernels.reshape(groups, inner, inner, -1),
    )
    whole = jnp.fft.irfft(made.reshape(n, -1, dim), n=length, axis=1)
    return whole[:, :positions].astype(hidden.dtype)


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
        made = grouped_conv(hidden.astype(self.dtype), kernel)
        return made + bias.astype(self.dtype)[None, None, :]


def _norm(direction: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(direction), axis=(0, 1), keepdims=True))
