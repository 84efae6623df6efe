"""DELTA, features held by what they are worth: Li et al. 2019, arXiv:1901.09229."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def delta(
    features: Float[Array, "*batch channels"],
    reference: Float[Array, "*batch channels"],
    weights: Float[Array, " channels"],
    *,
    mask: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """Return sum_c weights_c times the mean over examples and positions of (feature - reference)^2.

    The paper sums over positions, and over the examples in its loss; with a sum, the size of the
    batch and of the image would be part of the penalty's weight. The paper's term for one example
    is this mean times the number of positions. Several layers are summed by the caller.

    >>> features, reference = jnp.array([[1.0, 5.0], [3.0, 5.0]]), jnp.array([[0.0, 5.0]] * 2)
    >>> float(delta(features, reference, jnp.array([0.75, 0.25])))  # 0.75 (1 + 9) / 2
    3.75

    Args:
        features: the model's, channels last; in any float dtype, computed in float32.
        reference: those of the frozen start for the same rows, a constant to the gradient.
        weights: alpha of each channel, see `channel_weights`; 1 / channels for all alike.
        mask: True = counted, of examples or of positions; the others give neither loss nor
            gradient. Without any it is 0.

    Reference: Li et al. 2019, arXiv:1901.09229 (behavioural regularisation with attention).
    """
    mask = jnp.ones(features.shape[:-1], bool) if mask is None else mask
    start = jax.lax.stop_gradient(reference.astype(jnp.float32))
    gap = jnp.where(mask[..., None], features.astype(jnp.float32) - start, 0.0)
    count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
    means = jnp.sum(gap**2, axis=tuple(range(gap.ndim - 1))) / count
    return jnp.sum(weights.astype(jnp.float32) * means)


def channel_weights(
    losses_without: Float[Array, " channels"],
    loss: Float[Array, ""],
    *,
    spread: float | None = None,
) -> Float[Array, " channels"]:
    """Return alpha, the softmax over channels of how much the loss rises without the channel.

    >>> rises = jnp.log(jnp.array([3.0, 1.0]))
    >>> [f"{weight:.2f}" for weight in channel_weights(0.5 + rises, jnp.array(0.5))]
    ['0.75', '0.25']

    Args:
        losses_without: the loss with each channel in turn put to zero.
        loss: the loss with all channels.
        spread: None takes the rises as they are, as the paper does; of hundreds of channels each
            is worth next to nothing, and the weights come out all but even. A number standardises
            the rises over the channels and multiplies by it; the authors' code takes 0.2.

    Reference: Li et al. 2019, arXiv:1901.09229 (attention by the drop of performance).
    """
    rises = losses_without.astype(jnp.float32) - loss
    if spread is not None:
        deviation = jnp.maximum(jnp.std(rises), jnp.finfo(jnp.float32).tiny)
        rises = spread * (rises - jnp.mean(rises)) / deviation
    return jax.nn.softmax(rises)
