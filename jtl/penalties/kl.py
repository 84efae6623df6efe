"""KL divergence from a reference's outputs: Hinton, Vinyals and Dean 2015, arXiv:1503.02531."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def kl(
    logits: Float[Array, "*batch classes"],
    reference_logits: Float[Array, "*batch classes"],
    *,
    temperature: float = 1.0,
    mask: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """Return T^2 times the mean over rows of KL(softmax(reference / T) ‖ softmax(logits / T)).

    T^2 keeps the gradient of the same size at every temperature.

    >>> reference = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> value = kl(jnp.log(jnp.array([[0.8, 0.2]])), reference)
    >>> f"{value:.4f}"  # log 0.5 - (log 0.8 + log 0.2) / 2
    '0.2231'

    Args:
        logits: the model's; in any float dtype, computed in float32.
        reference_logits: those of the frozen reference for the same rows; -inf rules a class out.
        temperature: T > 0.
        mask: True = counted; masked rows give neither loss nor gradient. Without any row it is 0.

    Raises:
        ValueError: a temperature that is not positive.

    Reference: Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2.1; with the outputs of the
        model before an update as reference, Li and Hoiem 2016, arXiv:1606.09282.
    """
    if temperature <= 0:
        raise ValueError(f"temperature divides the logits, and {temperature} is given; take T > 0")
    mask = jnp.ones(logits.shape[:-1], bool) if mask is None else mask
    ours, theirs = (
        jax.nn.log_softmax(jnp.where(mask[..., None], x.astype(jnp.float32), 0.0) / temperature)
        for x in (logits, reference_logits)
    )
    terms = jnp.where(jnp.isneginf(theirs), 0.0, jnp.exp(theirs) * (theirs - ours))
    rows = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
    return temperature**2 * jnp.sum(terms) / rows
