"""Patches of an image, or tubelets of a few frames, each made into one vector."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Patches(nn.Module):
    """A convolution whose stride is its size: leaves `projection/kernel` and `projection/bias`.

    Attributes:
        dim: width of the vectors.
        size: of a patch, (height, width) or (frames, height, width). What is left of an image at
            its right and lower edge is not read.
        scale: standard deviation of the initial kernel.
        bias: whether there is one.
        at: name of the convolution.
        dtype: of the computation; parameters are float32.
    """

    dim: int
    size: tuple[int, ...]
    scale: float = 0.02
    bias: bool = True
    at: str = "projection"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Return (n, patches, dim), row by row, from images (n, *places, channels)."""
        maps = nn.Conv(
            self.dim,
            self.size,
            strides=self.size,
            padding="VALID",
            use_bias=self.bias,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(self.scale),
            name=self.at,
        )(images)
        return maps.reshape(maps.shape[0], -1, maps.shape[-1])


def grid(image: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many whole patches there are along each side.

    Raises:
        ValueError: the image is smaller than a patch.

    >>> grid((9, 12), (4, 4))
    (2, 3)
    """
    found = tuple(side // own for side, own in zip(image, patch, strict=True))
    if math.prod(found) < 1:
        raise ValueError(
            f"image_size={image} has no patch of patch_size={patch}; "
            "give larger images or smaller patches"
        )
    return found


def pair(value: Any, name: str) -> tuple[int, int]:
    """Return (height, width) of a field of a config that may be one number for both.

    Raises:
        ValueError: it is neither one whole number nor two.

    >>> pair(224, "image_size"), pair([8, 12], "image_size")
    ((224, 224), (8, 12))
    """
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or not all(isinstance(side, int) and side > 0 for side in both):
        raise ValueError(f"{name} is {value!r}; give one whole number, or (height, width)")
    return both


def cut(images: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """Return the numbers of each patch: (n, patches, height * width * channels) of the patch.

    >>> cut(jnp.arange(8.0).reshape(1, 2, 4, 1), (1, 2))[0].tolist()
    [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    """
    n, channels = images.shape[0], images.shape[-1]
    (high, wide), (rows, columns) = patch, grid(images.shape[1:3], patch)
    images = images[:, : rows * high, : columns * wide]
    parts = images.reshape(n, rows, high, columns, wide, channels).swapaxes(2, 3)
    return parts.reshape(n, rows * columns, high * wide * channels)
