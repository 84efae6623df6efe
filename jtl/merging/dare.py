"""DARE, drop most of a task vector and rescale what is left: Yu et al. 2024, arXiv:2311.03099."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jtl import trees


def dare(vector: PyTree, drop: float | int, *, key: jax.Array) -> PyTree:
    """Return the vector with each number dropped with probability `drop`, the rest / (1 - drop).

    Its mean over keys is the vector itself.

    >>> thin = dare({"w": jnp.full(1000, 3.0)}, 0.75, key=jax.random.key(0))["w"]
    >>> sorted(set(thin.tolist())), bool(abs(jnp.mean(thin) - 3.0) < 0.5)
    ([0.0, 12.0], True)

    Args:
        vector: task vector; a None is a hole.
        drop: probability, 0 or more and below 1; 0 gives the vector as it is.
        key: of what is dropped; each leaf has its own.

    Raises:
        ValueError: another probability, or a leaf that is no floating point.

    Reference: Yu et al. 2024, arXiv:2311.03099, equation 2.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop is {drop}; give a probability of 0 or more and below 1")
    keys = iter(jax.random.split(key, max(len(jax.tree.leaves(vector)), 1)))

    def thinned(x: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(next(keys), 1.0 - drop, x.shape)
        return jnp.where(kept, x / (1.0 - drop), 0.0)

    return trees.in_float32(thinned, vector)
