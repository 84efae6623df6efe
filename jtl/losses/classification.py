"""Cross entropy with label smoothing, class weights and masked rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    smoothing: float = 0.0,
    class_weights: Float[Array, " classes"] | None = None,
    mask: Bool[Array, "*batch"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the sum of cross entropies in nats and the sum of weights; their quotient is the mean.

        loss_i = (1 - s) w_y nll_y + s / C sum_c w_c nll_c,    nll_c = -log softmax(logits_i)_c

    and example i weighs w_y, y its label; the same numbers as PyTorch's `CrossEntropyLoss`.

    >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.8, 0.2]]))
    >>> total, weight = cross_entropy(logits, jnp.array([0, 1]))
    >>> f"{total:.4f} {weight:.0f}"  # -log 0.5 - log 0.2
    '2.3026 2'

    Args:
        logits: unnormalised scores in any float dtype; computed in float32.
        labels: class numbers; one outside 0..C-1 gives NaN unless it is masked.
        smoothing: s, the share of the target spread evenly over all C classes, 0 to 1.
        class_weights: w, for instance `metrics.class_weights(counts)`; None weighs all classes 1.
        mask: True = counted; masked rows give neither loss nor gradient, even where they are NaN.

    Raises:
        ValueError: smoothing outside [0, 1).

    Reference: Szegedy et al. 2016, arXiv:1512.00567, section 7 (smoothing).
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(
            f"smoothing is a share of the target, and {smoothing} is given; take 0 <= smoothing < 1"
        )
    classes = logits.shape[-1]
    mask = jnp.ones(labels.shape, bool) if mask is None else mask
    scores = jnp.where(mask[..., None], logits.astype(jnp.float32), 0.0)
    label = jnp.where(mask, labels, 0)
    weights = jnp.ones(classes) if class_weights is None else class_weights.astype(jnp.float32)
    costs = -jax.nn.log_softmax(scores) * jnp.broadcast_to(weights, scores.shape)
    own = jnp.take_along_axis(costs, jnp.clip(label, 0, classes - 1)[..., None], axis=-1)[..., 0]
    loss = (1 - smoothing) * own + (smoothing * jnp.mean(costs, axis=-1) if smoothing else 0.0)
    loss = jnp.where((label >= 0) & (label < classes), loss, jnp.nan)
    weight = weights[jnp.clip(label, 0, classes - 1)]
    return jnp.sum(jnp.where(mask, loss, 0.0)), jnp.sum(jnp.where(mask, weight, 0.0))
