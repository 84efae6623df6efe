"""Running statistics made anew for given weights, as after weights were averaged or interpolated.

BatchNorm's statistics belong to the weights that they were gathered with; those of other weights do
not average into them (Izmailov et al. 2018, arXiv:1803.05407, section 3.3).
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jtl.near import listed
from jtl.train.state import Apply, Batch
from jtl.trees import names

Recompute = Callable[[Any, Any, Iterable[Batch]], Any]


def make_recompute(apply: Apply, *, live: Collection[str]) -> Recompute:
    """Return `recompute(params, stats, batches) -> stats`, the statistics of `params` on data.

    Each is the mean over the batches of what the batch alone gives, batches weighed by their real
    rows: the exact mean of all rows, and the mean of the unbiased variances. The decay of the
    running mean plays no part, whatever it is. Shapes of batches are compiled once.

    Shuffled batches of the size that training had are wanted: of sorted ones the variance between
    batches is missing.

    >>> def apply(params, stats, batch, *, key, live):  # a running mean of decay 0.9
    ...     mean = jnp.mean(params * batch["x"])
    ...     return {}, {"mean": 0.9 * stats["mean"] + 0.1 * mean}
    >>> recompute = make_recompute(apply, live={"norm"})
    >>> batches = [{"x": np.array([1.0, 3.0])}, {"x": np.array([6.0, 8.0])}]
    >>> round(float(recompute(2.0, {"mean": jnp.float32(50.0)}, batches)["mean"]), 4)
    9.0

    Args:
        apply: the forward pass; running statistics move by `new = decay old + (1 - decay) batch`.
        live: labels that run in training mode; their statistics alone change. Dropout is off: what
            has it must not be named.

    Raises:
        ValueError: when called: no batch with a real row, or statistics that no batch can tell
            because `live` names nothing that has any.
    """
    chosen = frozenset(live)

    def moved(params: Any, stats: Any, batch: Any) -> Any:
        return apply(params, stats, batch, key=None, live=chosen)[1]

    def decay(params: Any, stats: Any, batch: Any, moving: Any) -> Any:
        # The old value of a live norm enters its running mean alone: the derivative is the decay.
        return jax.jvp(lambda old: moved(params, old, batch), (stats,), (moving,))[1]

    step, slope = jax.jit(moved), jax.jit(decay)

    def recompute(params: Any, stats: Any, batches: Iterable[Batch]) -> Any:
        if not jax.tree.leaves(stats):
            return stats
        return _mean(step, slope, params, stats, batches, chosen)

    return recompute


def recompute(
    apply: Apply, params: PyTree, stats: PyTree, batches: Iterable[Batch], *, live: Collection[str]
) -> PyTree:
    """Return the statistics of `params` on data; `make_recompute` says how, for many calls."""
    return make_recompute(apply, live=live)(params, stats, batches)


def _mean(
    step: Any, slope: Any, params: Any, stats: Any, batches: Iterable[Batch], live: Collection[str]
) -> Any:
    """Return the mean of the statistics of each batch; statistics that do not move stay."""
    moving = total = decay = None
    rows = 0
    for batch in batches:
        real = _rows(batch)
        if not real:
            continue
        if moving is None:
            moving = _moving(step, params, stats, batch)
            _check_moving(moving, live)
            tangents = jax.tree.map(lambda m, s: jnp.full_like(s, m), moving, stats)
            decay = slope(params, stats, dict(batch), tangents)
            # From zero the running mean is (1 - decay) batch, without a digit lost to the old one.
            stats = jax.tree.map(lambda m, s: jnp.zeros_like(s) if m else s, moving, stats)
        found = step(params, stats, dict(batch))
        total = _added(total, found, real)
        rows += real
    if total is None:
        raise ValueError(
            "there is no batch with a real row to take statistics from; the data is empty, the "
            "iterator spent, or every mask False"
        )

    def settled(move: bool, old: Any, summed: Any, kept: Any) -> Any:
        share = 1.0 - np.asarray(kept, np.float64)
        return jnp.asarray(summed / rows / share, old.dtype) if move else old

    return jax.tree.map(settled, moving, stats, total, decay)


def _added(total: Any, found: Any, rows: int) -> Any:
    weighed = jax.tree.map(lambda x: rows * np.asarray(x, np.float64), found)
    return weighed if total is None else jax.tree.map(np.add, total, weighed)


def _rows(batch: Batch) -> int:
    if "mask" in batch:
        return int(np.sum(np.asarray(batch["mask"])))
    return len(jax.tree.leaves(dict(batch))[0])


def _moving(step: Any, params: Any, stats: Any, batch: Batch) -> Any:
    """Return which statistics a batch moves, tried away from where they may already be right."""
    away = jax.tree.map(lambda leaf: leaf + 1, stats)
    after = step(params, away, dict(batch))
    return jax.tree.map(lambda x, y: bool(np.any(np.asarray(x) != np.asarray(y))), away, after)


def _check_moving(moving: Any, live: Collection[str]) -> None:
    if not any(jax.tree.leaves(moving)):
        raise ValueError(
            f"no statistics move with live={sorted(live)}; there are "
            f"{listed(list(names(moving)))}; name the stages that have them"
        )
