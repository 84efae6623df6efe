"""How many frames convolutions without padding make of a recording, and which of them are real."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Length = TypeVar("Length", int, jax.Array)


def frames(samples: Length, kernels: Sequence[int], strides: Sequence[int]) -> Length:
    """Return the number of frames of so many samples, 0 or less where they are too few.

    >>> frames(16000, (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2))
    49
    """
    for kernel, stride in zip(kernels, strides, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def samples_of(count: int, kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Return the least number of samples that gives `count` frames.

    >>> samples_of(49, (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2))
    15760
    """
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        count = (count - 1) * stride + kernel
    return count


def frame_mask(
    mask: Int[Array, "n samples"] | Bool[Array, "n samples"],
    kernels: Sequence[int],
    strides: Sequence[int],
) -> Bool[Array, "n frames"]:
    """Return True at the frames that are made of real samples alone.

    Args:
        mask: 1 at real samples, which come first in each row.
        kernels: width of each convolution.
        strides: of each convolution.

    >>> frame_mask(jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]), (2,), (2,)).tolist()
    [[True, True, True], [True, True, False]]
    """
    real = frames(jnp.sum(mask, axis=1, dtype=jnp.int32), kernels, strides)
    places = jnp.arange(frames(mask.shape[1], kernels, strides))
    return places[None, :] < real[:, None]
