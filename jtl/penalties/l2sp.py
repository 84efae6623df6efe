"""L2-SP, decay towards the start: Li, Grandvalet and Davoine 2018, arXiv:1802.01483."""

from jaxtyping import Array, Float, PyTree

from jtl import trees


def l2_sp(params: PyTree, anchor: PyTree, *, mask: PyTree | None = None) -> Float[Array, ""]:
    """Return 1/2 sum (params - anchor)^2.

    >>> import jax.numpy as jnp
    >>> float(l2_sp({"w": jnp.array([1.0, 5.0])}, {"w": jnp.array([1.0, 2.0])}))
    4.5

    Args:
        params: tree of arrays.
        anchor: the start, a tree like `params`; None in a leaf outside the mask.
        mask: True = included; a fresh head stays out. None includes all.

    Raises:
        ValueError: the trees differ in structure or an included leaf in shape.

    Reference: Li, Grandvalet and Davoine 2018, arXiv:1802.01483, equation 3, first term.
    """
    return 0.5 * trees.weighted_squared_distance(params, anchor, mask=mask)
