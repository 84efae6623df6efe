"""Feature distillation, or hints: Romero et al. 2015, arXiv:1412.6550."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

KINDS = ("squared", "cosine")


def features(
    features: Float[Array, "*batch channels"],
    reference: Float[Array, "*batch channels"],
    *,
    kind: str = "squared",
    mask: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """Return the mean over examples and positions of half a squared distance.

        squared   1/2 |f - r|^2, summed over channels
        cosine    1/2 |f / |f| - r / |r||^2 = 1 - cos(f, r): the lengths are free

    >>> ours, reference = jnp.array([[3.0, 4.0]]), jnp.array([[1.0, 0.0]])
    >>> float(features(ours, reference))  # (4 + 16) / 2
    10.0
    >>> f"{features(ours, reference, kind='cosine'):.3f}"  # 1 - 3/5
    '0.400'

    Args:
        features: the model's, channels last; in any float dtype, computed in float32.
        reference: those of the frozen reference for the same rows, a constant to the gradient.
        kind: "squared" or "cosine"; there, a vector of zeros has no direction and stays zero.
        mask: True = counted, of examples or of positions; the others give neither loss nor
            gradient. Without any it is 0.

    Raises:
        ValueError: an unknown kind.

    Reference: Romero et al. 2015, arXiv:1412.6550, equation 3; start and model have the same width,
        so there is no regressor between them.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} of feature distance is not known; take one of {KINDS}")
    mask = jnp.ones(features.shape[:-1], bool) if mask is None else mask
    ours, theirs = (
        jnp.where(mask[..., None], x.astype(jnp.float32), 0.0) for x in (features, reference)
    )
    if kind == "cosine":
        ours, theirs = _unit(ours), _unit(theirs)
    gap = ours - jax.lax.stop_gradient(theirs)
    count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
    return 0.5 * jnp.sum(gap**2) / count


def _unit(vectors: jax.Array) -> jax.Array:
    # The greatest entry is taken off first: the square of a large one would be infinite.
    greatest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))
    scaled = vectors / jnp.where(greatest > 0, greatest, 1.0)
    return scaled * jax.lax.rsqrt(jnp.maximum(jnp.sum(scaled**2, axis=-1, keepdims=True), 1e-12))
