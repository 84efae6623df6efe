"""Depthwise convolution: each channel with a small kernel of its own."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Sides = Sequence[tuple[int, int]]
# Rows of a kernel that are written out; more of them are a loop, which compiles sooner.
_UNROLLED = 5
_NAMES = ("NHWC", "HWIO", "NHWC")


def depthwise(
    images: Float[Array, "n height width dim"],
    kernel: Float[Array, "high wide 1 dim"],
    *,
    stride: int = 1,
    padding: str | Sides = "SAME",
    shifted: bool | None = None,
) -> Float[Array, "n rows columns dim"]:
    """Return the convolution of each channel with its own kernel.

    Args:
        images: channels last.
        kernel: one for each channel.
        stride: along both sides.
        padding: "SAME", "VALID", or ((top, bottom), (left, right)). "SAME" is TensorFlow's: where
            a strided kernel needs an odd number, the one more is at the bottom and right.
        shifted: whether to add up shifted copies of the images, one for each place of the kernel,
            rather than to call XLA's convolution; None does so on a CPU, where XLA's convolution
            with one channel in each group is slower by an order of magnitude.

    >>> row = jnp.arange(4.0).reshape(1, 1, 4, 1)
    >>> depthwise(row, jnp.ones((1, 3, 1, 1))).ravel().tolist()
    [1.0, 3.0, 6.0, 5.0]
    >>> depthwise(row, jnp.ones((1, 3, 1, 1)), stride=2).ravel().tolist()
    [3.0, 5.0]
    """
    if isinstance(padding, str):
        sides = jax.lax.padtype_to_pads(
            images.shape[1:3], kernel.shape[:2], (stride, stride), padding
        )
    else:
        sides = list(padding)
    if shifted is None:
        shifted = jax.default_backend() == "cpu"
    if shifted:
        return _shifted(images, kernel, stride, sides)
    return jax.lax.conv_general_dilated(
        *(images, kernel, (stride, stride), sides),
        dimension_numbers=_NAMES,
        feature_group_count=images.shape[-1],
    )


def _shifted(images: jax.Array, kernel: jax.Array, stride: int, sides: Sides) -> jax.Array:
    """Return the sum over the kernel's places, added up in float32."""
    high, wide = kernel.shape[:2]
    padded = jnp.pad(images, ((0, 0), *sides, (0, 0)))
    n, height, width, dim = padded.shape
    down = ((height - high) // stride) * stride + 1
    across = ((width - wide) // stride) * stride + 1

    @jax.checkpoint  # else the scan would keep a copy of the images for each row
    def row(padded: jax.Array, weights: jax.Array, i: Any) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(padded, i, down, axis=1)
        columns = (
            jax.lax.slice(part, (0, 0, j, 0), (n, down, j + across, dim), (1, stride, stride, 1))
            for j in range(wide)
        )
        return sum(
            (x.astype(jnp.float32) * weights[None, j : j + 1] for j, x in enumerate(columns)),
            start=jnp.float32(0),
        )

    if high <= _UNROLLED:
        total = sum((row(padded, kernel[i], i) for i in range(high)), start=jnp.float32(0))
    else:
        shape = (n, (down - 1) // stride + 1, (across - 1) // stride + 1, dim)
        rows = (kernel, jnp.arange(high))
        total, _ = jax.lax.scan(
            lambda sofar, own: (sofar + row(padded, *own), None), jnp.zeros(shape), rows
        )
    return jnp.asarray(total).astype(images.dtype)


class DepthwiseConv(nn.Module):
    """A depthwise convolution: leaves `kernel` (size, size, 1, dim) and `bias`.

    Attributes:
        size: of the kernel, along both sides.
        stride: along both sides.
        padding: as for `depthwise`.
        bias: whether there is one.
        scale: standard deviation of the initial kernel; None is He's, 2 over the kernel's places.
        dtype: of the computation; parameters are float32.
    """

    size: int
    stride: int = 1
    padding: str | Sides = "SAME"
    bias: bool = True
    scale: float | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Return (n, rows, columns, dim) of images (n, height, width, dim)."""
        dim = images.shape[-1]
        scale = (2.0**0.5) / self.size if self.scale is None else self.scale
        init = nn.initializers.normal(scale)
        kernel = self.param("kernel", init, (self.size, self.size, 1, dim))
        made = depthwise(
            images.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            padding=self.padding,
        )
        if not self.bias:
            return made
        bias = self.param("bias", nn.initializers.zeros, (dim,))
        return made + bias.astype(self.dtype).reshape(1, 1, 1, -1)
