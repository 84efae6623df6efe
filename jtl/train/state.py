"""What training carries from step to step, and what a term sees of it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jtl.train import average

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


Apply = Callable[..., tuple[Any, Any]]
"""`(params, stats, batch, *, key, live) -> (out, stats)`, any library's forward pass.

`live` is the static frozenset of labels that run in training mode; all others run in evaluation
mode. Statistics come back as they were where nothing in `live` has any.
"""


class TrainState(NamedTuple):
    """Everything that a run saves; arrays only.

    Attributes:
        step: number of steps taken, int32.
        params: all parameters, live and held.
        stats: running statistics, {} where the model has none.
        opt_state: one structure for all phases of a run.
        refs: arrays that terms read and nobody trains, by name.
        key: the run's key; a step uses `fold_in(key, step)`.
        finite: whether every step so far was. Once one is not, no step changes anything, the count
            of steps included: a loop may read metrics late and loses nothing.
        ema: {"params", "stats"}: moving averages of the leaves that move in some phase, None in
            place of the others, and of the statistics; {} where none are kept.
        watch: state of the transform that watches the updates (`make_step`); {} for none.
    """

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any
    refs: Any
    key: jax.Array
    finite: jax.Array
    ema: Any
    watch: Any


class Context(NamedTuple):
    """What a term may read.

    Attributes:
        params: all parameters; gradients reach the live ones.
        out: what `apply` returned.
        batch: the columns of this microbatch.
        refs: the state's `refs`.
        step: number of steps taken before this one.
        key: of this term alone.
    """

    params: Any
    out: Any
    batch: Any
    refs: Any
    step: jax.Array
    key: jax.Array


Term = Callable[[Context], tuple[Any, Any]]
"""`Context -> (sum, weight)`; the weight depends on the batch, never on parameters."""

Step = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]
"""`(state, batch, start) -> (state, metrics)`; `start` is the step at which the phase began."""


def create(
    params: Any,
    stats: Any,
    tx: optax.GradientTransformation,
    *,
    refs: Any = None,
    averaged: PyTree[bool] | None = None,
    watch: Any = None,
    key: jax.Array,
) -> TrainState:
    """Return the state before the first step.

    All arrays are copied: the step donates its state, and a buffer that two leaves share, or that
    the caller still holds, would be gone.

    Args:
        params: all parameters.
        stats: running statistics, {} for none.
        tx: the transform of any phase of the run; all have the same state.
        refs: arrays that terms read, by name; None for none.
        averaged: mask of the parameters of which a moving average is kept; None keeps none.
        watch: state of the transform that watches the updates, `watched.begin(...)`; None for none.
        key: the run's key.
    """
    ema = {} if averaged is None else average.begin(params, stats, averaged)
    refs, watch = ({} if tree is None else tree for tree in (refs, watch))
    parts = (params, stats, tx.init(params), refs, key, ema, watch)
    # With a dtype: a weakly typed leaf would come back typed from the step, and cost a compile.
    params, stats, opt_state, refs, key, ema, watch = jax.tree.map(
        lambda x: jnp.array(x, jnp.result_type(x), copy=True), parts
    )
    step, finite = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    return TrainState(step, params, stats, opt_state, refs, key, finite, ema, watch)
