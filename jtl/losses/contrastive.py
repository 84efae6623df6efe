"""Losses over the scores of all images against all texts of a batch; pairs lie on the diagonal.

Both return (sum, weight) with one weight for each pair; their quotient is the mean over pairs. The
scores are those of the batch at hand: who trains over several devices gathers the embeddings first.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def contrastive(
    logits: Float[Array, "n n"], mask: Bool[Array, " n"] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the symmetric cross entropy in nats, of images over texts and of texts over images.

        loss_i = -(log softmax_j(s_ij)_i + log softmax_j(s_ji)_i) / 2

    Args:
        logits: s, row i of image i, column j of text j; pair i is on the diagonal.
        mask: True = a real pair; others are no candidates either, and give no gradient.

    >>> scores = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]]))
    >>> total, weight = contrastive(scores)
    >>> f"{total:.4f} {weight:.0f}"  # -log(3/4) - log(1/2)
    '0.9808 2'

    Reference: Radford et al. 2021, arXiv:2103.00020, figure 3.
    """
    real, scores = _real(logits, mask, -jnp.inf)
    # A row of padding would have no candidate at all: its own place gives it one.
    scores = jnp.where(jnp.eye(len(scores), dtype=bool) & ~real[:, None], 0.0, scores)
    of_images = jnp.diagonal(jax.nn.log_softmax(scores, axis=1))
    of_texts = jnp.diagonal(jax.nn.log_softmax(scores, axis=0))
    loss = jnp.where(real, -(of_images + of_texts) / 2, 0.0)
    return jnp.sum(loss), jnp.sum(real, dtype=jnp.float32)


def sigmoid_pairs(
    logits: Float[Array, "n n"], mask: Bool[Array, " n"] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the sum over all pairings of the binary cross entropy in nats: is it a pair or not.

        loss_i = -sum_j log sigmoid(z_ij s_ij),    z_ij = 1 for i = j, else -1

    Args:
        logits: s, row i of image i, column j of text j; pair i is on the diagonal.
        mask: True = a real pair; others do not count on either side, and give no gradient.

    >>> scores = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]]))
    >>> total, weight = sigmoid_pairs(scores)
    >>> f"{total:.4f} {weight:.0f}"  # -log(3/4) - 3 log(1/2)
    '2.3671 2'

    Reference: Zhai et al. 2023, arXiv:2303.15343, equation 1.
    """
    real, scores = _real(logits, mask, 0.0)
    sign = 2.0 * jnp.eye(len(scores)) - 1.0
    losses = jnp.where(real[:, None] & real[None, :], -jax.nn.log_sigmoid(sign * scores), 0.0)
    return jnp.sum(losses), jnp.sum(real, dtype=jnp.float32)


def _real(logits: jax.Array, mask: jax.Array | None, fill: float) -> tuple[jax.Array, jax.Array]:
    """Return the mask, and float32 scores with `fill` wherever a side is no real pair's."""
    real = jnp.ones(len(logits), bool) if mask is None else mask
    both = real[:, None] & real[None, :]
    return real, jnp.where(both, logits.astype(jnp.float32), fill)
