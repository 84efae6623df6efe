"""Normalisation: of layers, by the root mean square, and of batches over their real rows.

In batch normalisation, padding rows (False in `batch["mask"]`) do not count, so a padded last
batch, and devices with unequal numbers of real rows, give the statistics that the real rows alone
would give.

Reference: Ba et al. 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467; Ioffe and
Szegedy 2015, arXiv:1502.03167.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def layer_norm(
    epsilon: float, dtype: Any = jnp.float32, *, bias: bool = True, name: str | None = None
) -> nn.LayerNorm:
    """Return Linen's layer normalisation in two passes: params scale and bias, both float32.

    E[x^2] - E[x]^2, which is Linen's default, loses digits where the mean is large beside the
    deviation.
    """
    return nn.LayerNorm(
        epsilon=epsilon, dtype=dtype, use_bias=bias, use_fast_variance=False, name=name
    )


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, in float32; param scale.

    Attributes:
        epsilon: added to the mean square.
        dtype: of the output.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        """Return x normalised."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normal = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        lead = (1,) * (x.ndim - 1)
        return (normal * scale.reshape(*lead, -1)).astype(self.dtype)


def batch_moments(
    x: Float[Array, "n *positions dim"],
    mask: Bool[Array, " n"] | None = None,
    *,
    axis_name: str | None = None,
) -> tuple[Float[Array, " dim"], Float[Array, " dim"], Float[Array, ""]]:
    """Return mean, biased variance and number of values of each channel over the real rows.

    All are float32, and in two passes: E[x^2] - E[x]^2 loses digits where the mean is large beside
    the deviation. No real row at all gives zeros.

    Args:
        x: channels last.
        mask: True at real rows; None for all.
        axis_name: axis of devices over which sums and counts are added up.

    >>> x = jnp.array([[1.0], [3.0], [50.0]])
    >>> mean, variance, count = batch_moments(x, jnp.array([True, True, False]))
    >>> mean.tolist(), variance.tolist(), float(count)
    ([2.0], [1.0], 2.0)
    """
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    per_row = x[0, ..., 0].size
    rows = jnp.ones((x.shape[0],), bool) if mask is None else mask
    real = rows.reshape((-1,) + (1,) * (x.ndim - 1))

    def total(values: jax.Array) -> jax.Array:
        return values if axis_name is None else jax.lax.psum(values, axis_name)

    count = total(jnp.sum(rows, dtype=jnp.float32) * per_row)
    divisor = jnp.maximum(count, 1.0)
    mean = total(jnp.sum(jnp.where(real, x, 0.0), axes)) / divisor
    centred = jnp.where(real, x - mean.reshape((1,) * (x.ndim - 1) + (-1,)), 0.0)
    return mean, total(jnp.sum(centred**2, axes)) / divisor, count


class Moments(NamedTuple):
    """What a batch was normalised by.

    Attributes:
        mean: (dim,) of the real rows.
        var: (dim,), biased.
        count: of real values a channel.
    """

    mean: Float[Array, " dim"]
    var: Float[Array, " dim"]
    count: Float[Array, ""]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def normalise(
    x: Float[Array, "n *positions dim"],
    scale: Float[Array, " dim"],
    bias: Float[Array, " dim"],
    mask: Bool[Array, " n"] | None,
    otherwise: tuple[Float[Array, " dim"], Float[Array, " dim"]],
    epsilon: float,
    axis_name: str | None,
    dtype: Any,
) -> tuple[Float[Array, "n *positions dim"], Moments]:
    """Return x normalised by the moments of its real rows, and these moments.

    The gradient is written out (equations at the end of section 3 of the paper, with padding rows):
    two sums and one pass over x, where that of the formula takes x apart three times as often. It
    reaches x, scale and bias; none passes through the moments that are returned.

    >>> x = jnp.array([[1.0], [3.0], [50.0]])
    >>> real = jnp.array([True, True, False])
    >>> y, moments = normalise(x, jnp.ones(1), jnp.zeros(1), real, (0.0, 1.0), 0.0, None, x.dtype)
    >>> y[:2].tolist(), moments.mean.tolist()
    ([[-1.0], [1.0]], [2.0])

    Args:
        x: channels last.
        scale: of each channel.
        bias: of each channel.
        mask: True at real rows; None for all.
        otherwise: mean and variance where no row is real.
        epsilon: added to the variance.
        axis_name: axis of devices over which the moments are taken.
        dtype: of what is returned.
    """
    return _normalised(x, scale, bias, mask, otherwise, epsilon, axis_name, dtype)[0]


def _normalised(
    x: Any,
    scale: Any,
    bias: Any,
    mask: Any,
    otherwise: Any,
    epsilon: float,
    axis_name: str | None,
    dtype: Any,
) -> Any:
    moments = Moments(*batch_moments(x, mask, axis_name=axis_name))
    known = moments.count > 0
    mean, var = (jnp.where(known, *pair) for pair in zip(moments, otherwise, strict=False))
    root = jax.lax.rsqrt(var + epsilon)
    lead = (1,) * (x.ndim - 1)
    centred = x.astype(jnp.float32) - mean.reshape(*lead, -1)
    y = centred * (scale * root).reshape(*lead, -1) + bias.reshape(*lead, -1)
    return (y.astype(dtype), moments), (x, scale, mask, mean, root, moments.count, otherwise)


def _pulled_back(
    epsilon: float, axis_name: str | None, dtype: Any, kept: Any, cotangents: Any
) -> Any:
    del epsilon, dtype
    x, scale, mask, mean, root, count, otherwise = kept
    lead, axes = (1,) * (x.ndim - 1), tuple(range(x.ndim - 1))
    slope = cotangents[0].astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean.reshape(*lead, -1)) * root.reshape(*lead, -1)
    own = jnp.sum(slope * normal, axes), jnp.sum(slope, axes)
    whole = own if axis_name is None else jax.lax.psum(own, axis_name)
    by_scale, by_bias = ((total / jnp.maximum(count, 1.0)).reshape(*lead, -1) for total in whole)
    by_moments = by_bias + normal * by_scale
    if mask is not None:  # padding rows are normalised, and are in no moment
        by_moments = jnp.where(mask.reshape(-1, *lead), by_moments, 0.0)
    pulled = (slope - by_moments) * (scale * root).reshape(*lead, -1)
    nothing = jax.tree.map(jnp.zeros_like, otherwise)
    return pulled.astype(x.dtype), *own, None, nothing


normalise.defvjp(_normalised, _pulled_back)


class BatchNorm(nn.Module):
    """Normalise each channel: params scale and bias, batch_stats mean and var, all float32.

    Where live and the running statistics may move (`batch_stats` is mutable), by the moments of the
    real rows, and the statistics move by
    `new = (1 - momentum) old + momentum batch`, with the unbiased variance, as PyTorch does. Where
    not live, by the running statistics, which stay as they are. A live batch without any real row
    is treated as one that is not live.

    Attributes:
        momentum: weight of the batch in the running statistics (PyTorch's convention, not Flax's).
        epsilon: added to the variance.
        axis_name: axis of devices over which the moments are taken; None for one program.
        dtype: of the output.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n *positions dim"],
        mask: Bool[Array, " n"] | None = None,
        live: bool = False,
    ) -> Float[Array, "n *positions dim"]:
        """Return x normalised; x (n, ..., dim), mask (n,) True at real rows.

        Raises:
            ValueError: live, and each channel has one value only, on one device.
        """
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        stored_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        stored_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        mean, var = stored_mean.value, stored_var.value
        moving = self.is_mutable_collection("batch_stats") and not self.is_initializing()
        if live and moving:
            self._check(x)
            how = (self.epsilon, self.axis_name, self.dtype)
            made: Any = normalise(x, scale, bias, mask, (mean, var), *how)
            y, (batch_mean, batch_var, count) = made[0], jax.lax.stop_gradient(made[1])
            unbiased = batch_var * count / jnp.maximum(count - 1.0, 1.0)
            rate = jnp.where(count > 0, self.momentum, 0.0)
            stored_mean.value = (1.0 - rate) * mean + rate * batch_mean
            stored_var.value = (1.0 - rate) * var + rate * unbiased
            return y
        lead = (1,) * (x.ndim - 1)
        factor = (scale * jax.lax.rsqrt(var + self.epsilon)).reshape(*lead, -1)
        centred = x.astype(jnp.float32) - mean.reshape(*lead, -1)
        return (centred * factor + bias.reshape(*lead, -1)).astype(self.dtype)

    def _check(self, x: jax.Array) -> None:
        if self.axis_name is None and x[..., 0].size == 1:
            raise ValueError(
                f"a live BatchNorm has input {x.shape}: one value a channel has no variance; "
                "give a batch of two rows or more, or larger images, or hold the block"
            )
