"""Penalties that need the step itself: what it did to each weight, and for which gradient."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jtl import masks
from jtl.penalties import si as si_formula
from jtl.recipes.terms.part import Part, Start, check_weight
from jtl.train.state import Context


def si(start: Start, *, weight: float = 1.0, damping: float = 0.1) -> Part:
    """Return weight times the surrogate loss of synaptic intelligence, and what watches the next.

    Each task adds the importance that its weights gathered on their way, and the anchor is where
    the last task ended. It covers the leaves that move, of the backbone and of kept heads.

    Where a moving average or the best weights are kept, the path is that of the weights which the
    steps moved, and its ends are those which the tasks left.

    Args:
        start: before the first task the part watches and has no term.
        weight: c of the paper.
        damping: xi of the paper.

    Raises:
        ValueError: no path of a task before: only a recipe of several tasks has it.

    Reference: Zenke, Poole and Ganguli 2017, arXiv:1703.04200, equations 4 and 5.
    """
    check_weight(weight, "si")
    watch = si_formula.path_integral()
    if start.first:
        return Part("si", None, {}, watch=watch)
    if start.watched is None or start.began is None:
        raise ValueError(
            "si needs the path of the steps of the task before, and the start model came without "
            "it; take it in a recipe of several tasks (continual), or ewc, mas or l2_sp, which "
            "need the model alone"
        )
    params = start.model.params
    earlier = {} if start.previous is None else start.previous.refs
    importance = _added(
        _covering(earlier.get("si/importance"), params),
        _importance(start, params, damping),
    )
    covered = _covered(start, importance)
    anchor, _ = masks.split(params, covered)

    def term(c: Context) -> Any:
        anchor, importance = c.refs["si/anchor"], c.refs["si/importance"]
        value = si_formula.si(c.params, anchor, importance, mask=covered)
        return weight * value, jnp.float32(1.0)

    refs = {"si/anchor": anchor, "si/importance": importance}
    return Part("si", term, refs, watch=watch)


def _importance(start: Start, params: PyTree, damping: float) -> PyTree:
    """Return the importance that the last task gave, None where nothing was watched."""
    omega, began = (_covering(tree, params) for tree in (start.watched.omega, start.began))
    return si_formula.importance(omega, began, params, damping=damping)


def _covered(start: Start, importance: PyTree) -> PyTree[bool]:
    """Return the mask of leaves that move, were there before, and have an importance."""
    outside = frozenset(start.model.heads) - frozenset(start.kept)
    labels = start.model.labels
    return jax.tree.map(
        lambda label, found: found is not None and label in start.live - outside,
        *(labels, importance),
        is_leaf=_hole,
    )


def _covering(tree: PyTree | None, params: PyTree) -> PyTree:
    """Return a tree like `params` with the leaves that `tree` has under the same names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: found.get(jax.tree_util.keystr(path)), params
    )


def _added(a: PyTree, b: PyTree) -> PyTree:
    def one(x: Any, y: Any) -> Any:
        return y if x is None else x if y is None else x + y

    return jax.tree.map(one, a, b, is_leaf=_hole)


def _hole(node: Any) -> bool:
    return node is None
