"""Elastic weight consolidation: Kirkpatrick et al. 2017, arXiv:1612.00796.

Several tasks cost what one costs. A sum of quadratics is one quadratic (`merged`); the online form
keeps one anchor, the newest, and lets old information decay (`decayed`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jtl import trees


class Quadratic(NamedTuple):
    """The sum of EWC penalties of several tasks: `ewc(params, anchor, fisher)` plus a constant.

    Attributes:
        anchor: mean of the tasks' parameters, weighted by their information; None in a leaf that
            no task covers.
        fisher: sum of the tasks' information; None likewise.
        constant: what the penalty cannot fall below: the tasks do not agree on the parameters.
    """

    anchor: PyTree
    fisher: PyTree
    constant: Any


def ewc(
    params: PyTree, anchor: PyTree, fisher: PyTree, *, mask: PyTree | None = None
) -> Float[Array, ""]:
    """Return 1/2 sum F (params - anchor)^2.

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


def merged(earlier: Quadratic, anchor: PyTree, fisher: PyTree) -> Quadratic:
    """Return the sum of earlier tasks' penalties and that of one more task, exactly.

    F (t - a)^2 + G (t - b)^2 = (F + G) (t - m)^2 + F G / (F + G) (b - a)^2, where m is the mean of
    a and b weighted by F and G. No term is a difference of large numbers.

    >>> both = merged(Quadratic(jnp.float32(0.0), jnp.float32(1.0), 0.0), 4.0, 3.0)
    >>> float(both.anchor), float(both.fisher), float(both.constant)
    (3.0, 4.0, 6.0)

    At t = 4, the first task's penalty is 16 / 2 and the second's 0; merged, 4 (4 - 3)^2 / 2 + 6.

    Args:
        earlier: of the tasks before; `Quadratic(anchor, fisher, 0.0)` for one.
        anchor: parameters after the new task; leaves where both informations are None are not read.
        fisher: the new task's information; None in a leaf that it does not cover.

    Raises:
        ValueError: the trees differ in structure.
    """
    for what, tree in {"earlier.fisher": earlier.fisher, "earlier.anchor": earlier.anchor}.items():
        trees.check_structure(fisher, tree, what)
    trees.check_structure(fisher, anchor, "anchor")
    found = jax.tree.map(
        _merged_leaf, earlier.anchor, earlier.fisher, anchor, fisher, is_leaf=lambda x: x is None
    )
    anchors, fishers, constants = (
        jax.tree.map(lambda three, i=i: three[i], found, is_leaf=_is_leaf) for i in range(3)
    )
    constant = jnp.float32(earlier.constant) + sum(jax.tree.leaves(constants))
    return Quadratic(anchors, fishers, constant)


def decayed(earlier: PyTree, fisher: PyTree, decay: float | Float[Array, ""]) -> PyTree:
    """Return decay times the earlier information plus that of the newest task (online EWC).

    The anchor that goes with it is the newest task's: the earlier information says how far one may
    go, and where the earlier anchors were is in the parameters already.

    >>> decayed({"w": jnp.float32(4.0)}, {"w": jnp.float32(1.0)}, 0.5)
    {'w': Array(3., dtype=float32)}

    Args:
        earlier: information of the tasks before; None in a leaf that they do not cover.
        fisher: of the newest task; None likewise.
        decay: gamma, above 0 and at most 1, where nothing is let go.

    Raises:
        ValueError: the trees differ in structure.

    Reference: Schwarz et al. 2018, arXiv:1805.06370, section 4, equation 9; on the anchor, Huszar
        2018, arXiv:1712.03847.
    """
    trees.check_structure(fisher, earlier, "earlier")

    def added(old: Any, new: Any) -> Any:
        if old is None:
            return new
        return decay * old if new is None else decay * old + new

    return jax.tree.map(added, earlier, fisher, is_leaf=lambda x: x is None)


class _Leaf(NamedTuple):
    anchor: Any
    fisher: Any
    constant: Any


def _is_leaf(node: Any) -> bool:
    return isinstance(node, _Leaf)


def _merged_leaf(a: Any, old: Any, b: Any, new: Any) -> _Leaf:
    if old is None or new is None:
        return _Leaf(a, old, None) if new is None else _Leaf(b, new, None)
    a, old, b, new = (jnp.asarray(x, jnp.float32) for x in (a, old, b, new))
    total = old + new
    # Where neither knows anything, the newest is as good an anchor as any.
    share = jnp.where(total > 0, new / jnp.where(total > 0, total, 1.0), 1.0)
    constant = 0.5 * jnp.sum(old * share * (b - a) ** 2)
    return _Leaf(a + share * (b - a), total, constant)
