"""Convolutions whose kernel is one place, as matrix products.

    nn.Conv(width, (size, size), ..., conv_general_dilated=pointwise)

A CPU's convolution takes the gradient of such a kernel several times slower than the product does
(`python -m benchmarks.backbones --models resnet`); on other devices they are one and the same.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

_PLAIN = ("lhs_dilation", "rhs_dilation")


def pointwise(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """Return `jax.lax.conv_general_dilated` of the same arguments, by a product where that is one.

    It is one for a kernel of one place without padding, groups and dilation; any other is convolved
    as it stands.

    >>> import jax.numpy as jnp
    >>> images = jnp.arange(8.0).reshape(1, 2, 4, 1)
    >>> pointwise(images, jnp.full((1, 1, 1, 1), 10.0), (1, 2), "SAME")[0, :, :, 0].tolist()
    [[0.0, 20.0], [40.0, 60.0]]

    Args:
        images: (n, *places, channels).
        kernel: (*sizes, channels, width).
        window_strides: one for each side.
        padding: "SAME", "VALID" or (before, after) for each side.
        options: as for `lax.conv_general_dilated`; `nn.Conv` gives them.
    """
    if not _one_place(kernel, padding, options):
        options.setdefault("dimension_numbers", _channels_last(images.ndim))
        return lax.conv_general_dilated(images, kernel, window_strides, padding, **options)
    strided = images[(slice(None), *(slice(None, None, step) for step in window_strides))]
    dims = (((images.ndim - 1,), (0,)), ((), ()))
    how = {name: options.get(name) for name in ("precision", "preferred_element_type")}
    return lax.dot_general(strided, kernel.reshape(kernel.shape[-2:]), dims, **how)


def _one_place(
    kernel: jax.Array, padding: str | Sequence[tuple[int, int]], options: dict[str, Any]
) -> bool:
    dilated = any(set(options.get(name) or (1,)) != {1} for name in _PLAIN)
    padded = not isinstance(padding, str) and any(set(pair) != {0} for pair in padding)
    grouped = {options.get("feature_group_count", 1), options.get("batch_group_count", 1)} != {1}
    numbers = options.get("dimension_numbers")
    usual = numbers is None or lax.conv_dimension_numbers(
        (1,) * kernel.ndim, kernel.shape, numbers
    ) == lax.conv_dimension_numbers((1,) * kernel.ndim, kernel.shape, _channels_last(kernel.ndim))
    return usual and not (dilated or padded or grouped) and set(kernel.shape[:-2]) == {1}


def _channels_last(rank: int) -> lax.ConvDimensionNumbers:
    last = rank - 1
    images, kernel = (0, last, *range(1, last)), (last, last - 1, *range(rank - 2))
    return lax.ConvDimensionNumbers(images, kernel, images)
