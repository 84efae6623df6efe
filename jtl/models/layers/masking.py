"""Random masking of patches: those with the smallest noise are kept.

Reference: He et al. 2021, arXiv:2111.06377, section 3.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Masking(NamedTuple):
    """Which patches are kept, and how to put them back.

    Attributes:
        keep: (n, kept) places of the kept patches, in the order of their noise.
        restore: (n, patches), for each patch its place in that order.
        mask: (n, patches), 1.0 at patches that are hidden.
    """

    keep: Int[Array, "n kept"]
    restore: Int[Array, "n patches"]
    mask: Float[Array, "n patches"]


def masking(noise: Float[Array, "n patches"], ratio: float) -> Masking:
    """Return the masking that given noise makes.

    Args:
        noise: one number for each patch; the same noise gives the same masking.
        ratio: share of the patches that is hidden.

    Raises:
        ValueError: no patch is left, or none is hidden.

    >>> made = masking(jnp.array([[0.3, 0.1, 0.9, 0.2]]), 0.5)
    >>> made.keep.tolist(), made.mask.tolist()
    ([[1, 3]], [[1.0, 0.0, 1.0, 0.0]])
    """
    patches = noise.shape[1]
    kept = int(patches * (1 - ratio))
    if not 0 < kept < patches:
        raise ValueError(
            f"a mask_ratio of {ratio} keeps {kept} of {patches} patches; "
            "give one that keeps some and hides some"
        )
    order = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(order, axis=1)
    return Masking(order[:, :kept], restore, (restore >= kept).astype(jnp.float32))
