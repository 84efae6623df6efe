"""A first convolution for another number of channels than the checkpoint's."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def adapt_channels(
    kernel: Float[Array, "*sizes old out"], channels: int, new: str = "repeat"
) -> Float[Array, "*sizes channels out"]:
    """Return a kernel that reads `channels` channels, from one that reads others.

    Args:
        kernel: of the first convolution.
        channels: that it is to read.
        new: "repeat" has the old channels in turn, and one channel has their sum; "mean" has their
            mean in each. Both are scaled so that an image whose channels are all alike gives what
            it gave. "zeros" keeps the old channels as they are and puts zeros behind them, so that
            nothing changes at first.

    Raises:
        ValueError: `channels` is below 1, "zeros" is to take channels away, or `new` is none of the
            three.

    >>> kernel = jnp.array([1.0, 2.0, 6.0]).reshape(1, 1, 3, 1)
    >>> adapt_channels(kernel, 1).ravel().tolist(), adapt_channels(kernel, 6).ravel().tolist()
    ([9.0], [0.5, 1.0, 3.0, 0.5, 1.0, 3.0])
    >>> adapt_channels(kernel, 2, "mean").ravel().tolist()
    [4.5, 4.5]

    Reference: timm's `adapt_input_conv` (Wightman 2019).
    """
    if new not in ("repeat", "mean", "zeros"):
        raise ValueError(f"new_channels is {new!r}; give 'repeat', 'mean' or 'zeros'")
    old = kernel.shape[-2]
    if channels < 1 or (new == "zeros" and channels < old):
        raise ValueError(
            f"a kernel of {old} channels is to read {channels} with new={new!r}; "
            "give 1 or more, and for 'zeros' no fewer than there are"
        )
    if new == "zeros":
        more = jnp.zeros((*kernel.shape[:-2], channels - old, kernel.shape[-1]), kernel.dtype)
        return jnp.concatenate([kernel, more], axis=-2)
    if new == "mean" or channels == 1:
        mean = jnp.mean(kernel, axis=-2, keepdims=True) * (old / channels)
        return jnp.repeat(mean, channels, axis=-2)
    places = jnp.arange(channels) % old
    return jnp.take(kernel, places, axis=-2) * (old / channels)
