"""Rematerialisation by block: keep what enters a block, compute its inside again for the gradient.

What is kept falls to one array for each block and the inside of one, for one more forward pass of
the blocks that the backward pass reaches.

Reference: Chen et al. 2016, arXiv:1604.06174.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from jtl import masks
from jtl.models import backbone as stages
from jtl.models.backbone import Batch

Block = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]


def again(block: Block) -> Block:
    """Return `block(params, hidden, stats) -> (hidden, stats)` that keeps its arguments alone.

    The backward pass computes the inside a second time. Gradients reach params and hidden, not the
    statistics and not what the function closes over.

    >>> import jax.numpy as jnp
    >>> block = again(lambda w, x, stats: (jnp.sin(w * x), stats))
    >>> float(jax.grad(lambda w: block(w, jnp.array(2.0), {})[0])(0.0))  # 2 cos 0
    2.0
    """

    @jax.custom_vjp
    def run(params: Any, hidden: jax.Array, stats: Any) -> tuple[jax.Array, Any]:
        return block(params, hidden, stats)

    def forward(*arguments: Any) -> tuple[Any, Any]:
        return block(*arguments), arguments

    def backward(arguments: Any, cotangents: Any) -> tuple[Any, Any, None]:
        params, hidden, stats = arguments
        # Not jax.checkpoint: XLA on a CPU drops its barrier, computes the inside a second time at
        # once, and keeps it. What waits for a number of the cotangent cannot come early.
        late = 0 * cotangents[0].ravel()[0]
        hidden = hidden + late.astype(hidden.dtype)
        _, pull = jax.vjp(lambda params, hidden: block(params, hidden, stats), params, hidden)
        return (*pull(cotangents), None)

    run.defvjp(forward, backward)
    return run


def apply(
    module: Any,
    labels: PyTree[str],
    variables: Any,
    batch: Batch,
    live: frozenset[str],
    rngs: Any,
    *,
    hold_statistics: bool = False,
) -> tuple[Any, Any]:
    """Return `(out, moved)` as `module.apply` does, each block that a gradient reaches `again`.

    Those are the blocks from the lowest live stage up; those below run as ever.

    Args:
        module: a family module.
        labels: of the leaves of its parameters.
        variables: "params", and "batch_stats" where there are statistics.
        batch: raw columns, or the column of a border.
        live: labels of the stages that run in training mode.
        rngs: Linen's; dropout draws what it draws without rematerialisation.
        hold_statistics: whether the statistics stay as they are.
    """
    names = stages.stage_labels(module.blocks)
    params = variables["params"]
    stats = {name: value for name, value in variables.items() if name != "params"}
    lowest = next((stage for stage, name in enumerate(names) if name in live), len(names))

    def run(params: Any, stats: Any, batch: Batch, live: frozenset[str], stop: int | None) -> Any:
        own = {"params": params, **stats}
        mutable = [] if hold_statistics else list(stats)
        out, moved = module.apply(own, batch, live, stop, rngs=rngs, mutable=mutable)
        return out, stats if hold_statistics else moved

    first = max(1, lowest, stages.given(batch, module.blocks))
    if first > module.blocks:
        return run(params, stats, batch, live, None)

    def one(stage: int, params: Any, hidden: jax.Array, stats: Any) -> Any:
        column, on = stages.column(stage, module.blocks), live & {names[stage]}
        stop = stage + 1 if stage <= module.blocks else None
        return run(params, stats, {**batch, column: hidden}, on, stop)

    hidden, stats = run(params, stats, batch, live, first)
    for stage in range(first, module.blocks + 1):
        own = jax.tree_util.tree_map_with_path(
            functools.partial(_read_by, names[stage], module), labels
        )
        block = again(functools.partial(one, stage))
        hidden, stats = block(masks.split(params, own)[0], hidden, stats)
    return one(module.blocks + 1, params, hidden, stats)


def _read_by(name: str, module: Any, path: Any, label: str) -> bool:
    """Return whether the block of this label reads the leaf at a path."""
    place = jax.tree_util.keystr(path, simple=True, separator="/")
    return label == name or any(re.fullmatch(regex, place) for regex in stages.common(module))
