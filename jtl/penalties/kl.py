"""KL divergence from a reference's outputs: Hinton, Vinyals and Dean 2015, arXiv:1503.02531.

The reference may be kept whole, or as the log-probabilities of its k likeliest classes and of all
others together: for a large vocabulary that is a small part of the memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

DIRECTIONS = ("forward", "reverse", "js")

# Below the smallest normal float32 a probability is 0, and its logarithm -inf.
_LEAST = float(np.log(np.finfo(np.float32).tiny))


class TopK(NamedTuple):
    """A distribution over the k likeliest classes and one bucket of all others.

    Attributes:
        log_probabilities: (..., k + 1), from likely to unlikely, the bucket last.
        classes: (..., k), int32.
    """

    log_probabilities: Array
    classes: Array


def kl(
    logits: Float[Array, "*batch classes"],
    reference_logits: Float[Array, "*batch classes"],
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    mask: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """Return T^2 times the mean divergence of p = softmax(logits / T), q = softmax(reference / T).

        forward   KL(q ‖ p) = sum_c q_c log(q_c / p_c)      p must cover all that q does
        reverse   KL(p ‖ q) = sum_c p_c log(p_c / q_c)      p must keep to where q is
        js        KL(q ‖ m) / 2 + KL(p ‖ m) / 2,  m = (p + q) / 2; symmetric, at most T^2 log 2

    T^2 keeps the gradient of the same size at every temperature: at high T that of the forward and
    reverse divergence is (logits - reference) / classes, both centred, and that of js a quarter.

    >>> reference = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> value = kl(jnp.log(jnp.array([[0.8, 0.2]])), reference)
    >>> f"{value:.4f}"  # log 0.5 - (log 0.8 + log 0.2) / 2
    '0.2231'

    Args:
        logits: the model's; in any float dtype, computed in float32.
        reference_logits: those of the frozen reference for the same rows, a constant to the
            gradient; -inf rules a class out. In reverse, where that would be infinite, q is taken
            as no less than 1.2e-38, the least float32: the gradient drives p away from there.
        temperature: T > 0.
        direction: "forward", "reverse" or "js".
        mask: True = counted, of examples or of tokens; the others give neither loss nor gradient.
            Without any it is 0.

    Raises:
        ValueError: a temperature that is not positive, an unknown direction.

    Reference: Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2.1 (T^2, high T); Gu et al.
        2023, arXiv:2306.08543 (reverse); Lin 1991, IEEE Transactions on Information Theory 37(1)
        (Jensen-Shannon).
    """
    _check(temperature, direction)
    mask = jnp.ones(logits.shape[:-1], bool) if mask is None else mask
    ours, theirs = (
        _log_probabilities(jnp.where(mask[..., None], x.astype(jnp.float32), 0.0), temperature)
        for x in (logits, reference_logits)
    )
    return temperature**2 * _mean(_divergence(ours, theirs, direction), mask)


def top_k(
    reference_logits: Float[Array, "*batch classes"], k: int, *, temperature: float = 1.0
) -> TopK:
    """Return what `kl_top_k` compares with: 8 k + 4 bytes instead of 4 for each class.

    >>> kept = top_k(jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])), 2)
    >>> kept.classes.tolist(), [f"{p:.1f}" for p in jnp.exp(kept.log_probabilities)]
    ([3, 2], ['0.4', '0.3', '0.3'])

    Args:
        reference_logits: in any float dtype, computed in float32; -inf rules a class out.
        k: number of classes kept one by one; all others are one bucket.
        temperature: T > 0, the same as in `kl_top_k`: another one gives the bucket another mass.

    Raises:
        ValueError: a k that is not in 1..classes, a temperature that is not positive.
    """
    _check(temperature, "forward")
    classes = reference_logits.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(
            f"k={k} classes are to be kept, and there are {classes}; take 1 to {classes}"
        )
    whole = _log_probabilities(reference_logits.astype(jnp.float32), temperature)
    _, likeliest = jax.lax.top_k(whole, k)
    return TopK(_bucketed(whole, likeliest), likeliest)


def kl_top_k(
    logits: Float[Array, "*batch classes"],
    log_probabilities: Float[Array, "*batch kept"],
    classes: Int[Array, "*batch k"],
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    mask: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """Return `kl` of the distributions over k classes and one bucket of all others.

    The bucket's probability is the sum of theirs, so nothing is left out and nothing is made up:
    the value is never above that of `kl`, and the same where k is the number of classes. How the
    model spreads the bucket's mass within it is free.

    >>> reference, logits = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.log(jnp.array([0.5, 0.5, 0]))
    >>> float(kl_top_k(logits, *top_k(reference, 1)))  # 1/2 and 1/2 in both
    0.0

    Args:
        logits: the model's; in any float dtype, computed in float32.
        log_probabilities: the first part of `top_k`; kept is k + 1.
        classes: the second part of `top_k`.
        temperature: that given to `top_k`.
        direction: see `kl`.
        mask: see `kl`.

    Raises:
        ValueError: a temperature that is not positive, an unknown direction, parts of `top_k` that
            do not belong together.
    """
    _check(temperature, direction)
    if log_probabilities.shape[-1] != classes.shape[-1] + 1:
        raise ValueError(
            f"log_probabilities has {log_probabilities.shape[-1]} entries for {classes.shape[-1]} "
            "classes; it must have one more, for all other classes; give both as top_k made them"
        )
    mask = jnp.ones(logits.shape[:-1], bool) if mask is None else mask
    counted = mask[..., None]
    ours = _log_probabilities(jnp.where(counted, logits.astype(jnp.float32), 0.0), temperature)
    ours = _bucketed(ours, jnp.where(counted, classes, 0))
    theirs = jnp.where(counted, log_probabilities.astype(jnp.float32), 0.0)
    return temperature**2 * _mean(_divergence(ours, theirs, direction), mask)


def _log_probabilities(logits: jax.Array, temperature: float) -> jax.Array:
    # The greatest is taken off first: divided by a small T, a large logit would be infinite.
    greatest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return jax.nn.log_softmax((logits - greatest) / temperature)


def _bucketed(whole: jax.Array, classes: jax.Array) -> jax.Array:
    """Return the log-probabilities of the classes and, last, of all others together."""
    kept = jnp.take_along_axis(whole, classes, axis=-1)
    others = jnp.put_along_axis(whole, classes, -jnp.inf, axis=-1, inplace=False)
    # The gradient of logsumexp is NaN where all are -inf.
    some = jnp.any(others > -jnp.inf, axis=-1, keepdims=True)
    rest = jax.nn.logsumexp(jnp.where(some, others, 0.0), axis=-1, keepdims=True)
    return jnp.concatenate([kept, jnp.where(some, rest, -jnp.inf)], axis=-1)


def _divergence(ours: jax.Array, theirs: jax.Array, direction: str) -> jax.Array:
    """Return the divergence of each row; 0 log 0 is 0, and its gradient too."""
    theirs = jax.lax.stop_gradient(theirs)
    p, q = jnp.exp(ours), jnp.exp(theirs)
    if direction == "forward":
        return jnp.sum(jnp.where(q > 0, q * (theirs - ours), 0.0), axis=-1)
    if direction == "reverse":
        ratio = ours - jnp.maximum(theirs, _LEAST)
        return jnp.sum(p * jnp.where(p > 0, ratio, 0.0), axis=-1)
    # log(q / m) = log 2 - softplus(log(p / q)), which is 0 to the last bit where p = q.
    ratio = jnp.where((p > 0) | (q > 0), ours - theirs, 0.0)
    own = jnp.where(p > 0, jnp.log(2.0) - jax.nn.softplus(-ratio), 0.0)
    their = jnp.where(q > 0, jnp.log(2.0) - jax.nn.softplus(ratio), 0.0)
    return 0.5 * jnp.sum(p * own + q * their, axis=-1)


def _mean(rows: jax.Array, mask: jax.Array) -> jax.Array:
    count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
    return jnp.sum(jnp.where(mask, rows, 0.0)) / count


def _check(temperature: float, direction: str) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature divides the logits, and {temperature} is given; take T > 0")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction {direction!r} is not known; take one of {DIRECTIONS}")
