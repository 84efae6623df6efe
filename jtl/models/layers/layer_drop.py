"""LayerDrop: where live, a whole layer is left out at random, for all rows of a batch at once.

Reference: Fan et al. 2019, arXiv:1909.11556.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class LayerDrop(nn.Module):
    """Choose between what enters a layer and what leaves it.

    Attributes:
        rate: probability that the layer is left out, in [0, 1). Nothing is scaled up.
    """

    rate: float

    @nn.compact
    def __call__(self, before: jax.Array, after: jax.Array, live: bool = False) -> jax.Array:
        """Return `after`, or, where live, `before` at the rate; both of one shape.

        >>> before, after = jnp.zeros(2), jnp.ones(2)
        >>> LayerDrop(0.5).apply({}, before, after).tolist()
        [1.0, 1.0]
        """
        if not live or self.rate == 0:
            return after
        left_out = jax.random.bernoulli(self.make_rng("dropout"), self.rate)
        return jnp.where(left_out, before, after)
