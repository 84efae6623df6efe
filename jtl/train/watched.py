"""A transform that sees each update as it was applied, whatever came before it, and changes none.

An importance that is an integral along the path of training needs the gradient of the task and the
step that was really taken: after clip, moments, decay, masks and rates.
"""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jtl import masks

if TYPE_CHECKING:
    from jtl.train.state import TrainState


def begin(
    watch: optax.GradientTransformation,
    params: PyTree,
    labels: PyTree[str],
    ever_live: Collection[str],
) -> Any:
    """Return the state of `watch` before the first step, over the leaves that move in some phase.

    >>> begin(optax.trace(0.9), {"a": 1.0, "b": 2.0}, {"a": "a", "b": "b"}, {"b"}).trace["a"]

    Args:
        watch: transform over a tree with None where a leaf never moves.
        params: all parameters.
        labels: tree of labels of the parameters.
        ever_live: labels that move in some phase.
    """
    return watch.init(masks.split(params, masks.mask(labels, ever_live))[0])


def make_watching(
    watch: optax.GradientTransformation | None,
    labels: PyTree[str],
    live: frozenset[str],
    ever_live: Collection[str] | None,
) -> Callable[["TrainState", Any, Any, Any], Any]:
    """Return `see(state, moved, moving, task_grads) -> state of the watch` after a step.

    `moved`, `moving` and `task_grads` have the live leaves alone.

    Args:
        watch: as in `make_step`; None passes on what the state has.
        labels: tree of labels of the parameters.
        live: labels that move in this phase.
        ever_live: labels that `watch` covers; None is `live`.

    Raises:
        ValueError: a live label that `ever_live` lacks; when traced: a state without the watch's.
    """
    if watch is None:
        return lambda state, moved, moving, task_grads: state.watch
    ever = live if ever_live is None else frozenset(ever_live)
    if live - ever:
        raise ValueError(
            f"live has {sorted(live - ever)}, which ever_live {sorted(ever)} lacks; ever_live is "
            "the union of the live labels of all phases"
        )
    update = optax.with_extra_args_support(watch).update
    covered, waits = masks.mask(labels, ever), masks.mask(labels, ever - live)

    def see(state: "TrainState", moved: Any, moving: Any, task_grads: Any) -> Any:
        if isinstance(state.watch, dict) and not state.watch:
            raise ValueError(
                "watch is given and the state keeps nothing of it; create it with `watch=` what "
                "`watched.begin` returns, or give watch=None"
            )
        applied = jax.tree.map(lambda a, b: _wide(a) - _wide(b), moved, moving)
        params, still = (masks.split(state.params, mask)[0] for mask in (covered, waits))
        zeros = jax.tree.map(lambda p: jnp.zeros_like(_wide(p)), still)
        applied, grads = (masks.merge(tree, zeros) for tree in (applied, task_grads))
        return update(applied, state.watch, params, task_grads=grads)[1]

    return see


def _wide(leaf: Any) -> jax.Array:
    return jnp.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32))
