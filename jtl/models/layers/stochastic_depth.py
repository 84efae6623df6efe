"""Stochastic depth: where live, a residual branch is left out for whole rows.

Reference: Huang et al. 2016, arXiv:1603.09382.
"""

import flax.linen as nn
import jax


class StochasticDepth(nn.Module):
    """Put zeros in place of a branch for each row by itself; what stays is scaled up.

    Attributes:
        rate: probability that a row's branch is left out, in [0, 1).
    """

    rate: float

    @nn.compact
    def __call__(self, branch: jax.Array, live: bool = False) -> jax.Array:
        """Return the branch (n, ...), as it is where not live."""
        axes = tuple(range(1, branch.ndim))
        return nn.Dropout(self.rate, broadcast_dims=axes, deterministic=not live)(branch)


def growing_rates(last: float, blocks: int) -> tuple[float, ...]:
    """Return the rate of each block, from 0 in the first evenly to `last` in the last.

    >>> growing_rates(0.5, 3)
    (0.0, 0.25, 0.5)
    """
    return tuple(last * i / max(blocks - 1, 1) for i in range(blocks))
