"""Elastic weight consolidation: Kirkpatrick et al. 2017, arXiv:1612.00796."""

from jaxtyping import Array, Float, PyTree

from jtl import trees


def ewc(
    params: PyTree, anchor: PyTree, fisher: PyTree, *, mask: PyTree | None = None
) -> Float[Array, ""]:
    """Return 1/2 sum F (params - anchor)^2.

    >>> import jax.numpy as jnp
    >>> params, anchor = {"w": jnp.array([1.0, 5.0])}, {"w": jnp.array([0.0, 2.0])}
    >>> float(ewc(params, anchor, {"w": jnp.array([4.0, 2.0])}))
    11.0

    Args:
        params: tree of arrays.
        anchor: parameters after the earlier task, a tree like `params`; None in a leaf outside the
            mask.
        fisher: F, the diagonal that `fisher.fisher_diagonal` took at the anchor; None likewise.
        mask: True = included; a fresh head and held leaves stay out. None includes all.

    Raises:
        ValueError: the trees differ in structure or an included leaf in shape.

    Reference: Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3, with lambda 1.
    """
    return 0.5 * trees.weighted_squared_distance(params, anchor, weight=fisher, mask=mask)
