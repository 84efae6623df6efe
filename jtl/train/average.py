"""A moving average of the live weights: what is evaluated and kept in place of the last weights.

    average_t = average_(t-1) + (1 - d_t) (weights_t - average_(t-1))
    d_t = min(decay, (1 + t) / (10 + t))

It is a phase's own: it starts at the weights that the phase starts from, with t counted from there,
and what it came to are the weights that the phase leaves. Leaves that are held in a phase have
their own value, so columns derived from them stay right. The statistics are averaged alike.

Reference: Polyak and Juditsky 1992, doi:10.1137/0330046; the slow start is TensorFlow's
`ExponentialMovingAverage(num_updates=t)`.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jtl import masks

if TYPE_CHECKING:
    from jtl.train.state import TrainState


def begin(params: PyTree, stats: PyTree, averaged: PyTree[bool]) -> dict[str, Any]:
    """Return the average at its start, in float32: the weights themselves.

    Args:
        params: all parameters.
        stats: running statistics.
        averaged: mask of the parameters that are averaged; the others are None.

    >>> begin({"a": jnp.ones(1), "b": jnp.ones(1)}, {}, {"a": True, "b": False})["params"]["b"]
    """
    chosen, _ = masks.split(params, averaged)
    return jax.tree.map(_wide, {"params": chosen, "stats": stats})


def moved(average: PyTree, weights: PyTree, before: PyTree, decay: float, since: Any) -> PyTree:
    """Return the average after a step.

    >>> after = moved({"w": 0.0}, {"w": jnp.float32(9.0)}, {"w": None}, 0.999, 8)
    >>> float(after["w"])  # d is 9 / 18
    4.5

    Args:
        average: as `begin` gave it.
        weights: the leaves after the step, None where a leaf is held.
        before: the leaves before the step; one that was passed through is left alone, bit for bit.
        decay: of the average, in [0, 1).
        since: number of steps since the start of the phase, this one not counted.
    """
    since = jnp.asarray(since, jnp.float32)
    keep = jnp.minimum(decay, (1.0 + since) / (10.0 + since))

    def one(mean: Any, new: Any, old: Any) -> Any:
        if mean is None or new is None or new is old:
            return mean
        if not jnp.issubdtype(jnp.result_type(new), jnp.inexact):
            return new
        return mean + (1.0 - keep) * (new - mean)

    return jax.tree.map(one, average, weights, before, is_leaf=lambda x: x is None)


def weights(state: "TrainState", labels: PyTree[str], live: Collection[str]) -> tuple[Any, Any]:
    """Return (params, stats) that a phase is judged by: the average of what moves, if one is kept.

    Args:
        state: of the run.
        labels: tree of labels of the parameters.
        live: labels that move in the phase.
    """
    if not state.ema:
        return state.params, state.stats
    chosen = masks.mask(labels, live)
    moving, held = masks.split(state.params, chosen)
    mean, _ = masks.split(state.ema["params"], chosen)
    params = masks.merge(jax.tree.map(_like, mean, moving), held)
    return params, jax.tree.map(_like, state.ema["stats"], state.stats)


def restarted(state: "TrainState", labels: PyTree[str], live: Collection[str]) -> "TrainState":
    """Return the state at the start of a phase: its average begins at its weights, in copies."""
    if not state.ema:
        return state
    fresh = begin(state.params, state.stats, masks.mask(labels, live))
    fresh = jax.tree.map(lambda x: jnp.array(x, copy=True), fresh)
    _, kept = masks.split(state.ema["params"], masks.mask(labels, live))
    return state._replace(ema={**fresh, "params": masks.merge(fresh["params"], kept)})


def _wide(leaf: Any) -> Any:
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return leaf
    return jnp.asarray(leaf, jnp.promote_types(dtype, jnp.float32))


def _like(mean: Any, leaf: Any) -> Any:
    return mean.astype(leaf.dtype)
