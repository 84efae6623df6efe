"""A loss that is not finite: replay the batch and say which step, term, column, label and block."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jtl import masks, trees
from jtl.near import listed
from jtl.train.gradients import make_sums
from jtl.train.state import Apply, Batch, Term, TrainState

Locate = Callable[[Any, Any, Any], str | None]


class NonFiniteError(ValueError):
    """A loss, a gradient or a new weight was NaN or infinite; the state before it is kept."""


def explain(
    apply: Apply,
    terms: Mapping[str, Term],
    state: TrainState,
    batch: Batch,
    *,
    labels: PyTree[str],
    live: frozenset[str],
    step: int | None = None,
    locate: Locate | None = None,
) -> NonFiniteError:
    """Return the error of a step whose metrics said that it was not finite.

    Args:
        apply: as in `make_step`.
        terms: as in `make_step`.
        state: the state before the step, or after it: parameters stayed. Or any state since, if all
            steps since were refused.
        batch: the batch of that step.
        labels: tree of labels of the parameters.
        live: labels that moved.
        step: number of the step that failed; None takes `state.step`.
        locate: `(params, stats, batch) -> name of the first block that is not finite, or None`.
    """
    number = int(state.step) if step is None else step
    state = state._replace(step=jnp.asarray(number, jnp.int32))
    columns, weights = _columns(batch), _bad_leaves(state)
    losses, gradients = _replay(apply, terms, state, batch, labels, live)
    block = locate(state.params, state.stats, batch) if locate is not None else None
    there = [
        *(f"term {name!r} is {value}" for name, value in losses.items()),
        *([f"the first block that is not finite is {block!r}"] if block else []),
        *(f"column {name!r} is not finite in {rows}" for name, rows in columns.items()),
        *weights,
        *([f"the gradient is not finite at labels {gradients}"] if gradients else []),
    ]
    wrong = "loss" if losses else "gradient" if gradients else "update"
    return NonFiniteError(
        f"step {number}: the {wrong} is not finite: "
        f"{'; '.join(there) or 'the batch gives a finite loss and gradient when it is replayed'}; "
        f"the state before step {number} is kept; {_remedy(columns, weights, losses, gradients)}"
    )


def _replay(
    apply: Apply,
    terms: Mapping[str, Term],
    state: TrainState,
    batch: Batch,
    labels: PyTree[str],
    live: frozenset[str],
) -> tuple[dict[str, float], list[str]]:
    """Return the terms that are not finite, and the labels whose gradients are not."""
    chosen = masks.mask(labels, live)
    sums = make_sums(apply, terms, live)

    @jax.jit
    def gradients(moving: Any, held: Any, state: TrainState, batch: Any) -> Any:
        key = jax.random.fold_in(state.key, state.step)

        def objective(moving: Any) -> Any:
            found, _ = sums(masks.merge(moving, held), state.stats, batch, state, key)
            values = {name: s / jnp.where(w > 0, w, 1.0) for name, (s, w) in found.items()}
            return sum(values.values()), values

        (_, values), grads = jax.value_and_grad(objective, has_aux=True)(moving)
        return values, jax.tree.map(trees.all_finite, grads)

    rest = state._replace(params=None, opt_state=None)
    values, finite = gradients(*masks.split(state.params, chosen), rest, dict(batch))
    names, _ = masks.split(labels, chosen)
    pairs = zip(jax.tree.leaves(names), jax.tree.leaves(finite), strict=True)
    bad = {name: float(v) for name, v in values.items() if not np.isfinite(v)}
    return bad, sorted({label for label, good in pairs if not good})


def _columns(batch: Batch) -> dict[str, str]:
    """Return, for each column with a number that is not finite, the rows that hold one."""
    found = {}
    for name, value in batch.items():
        value = np.asarray(value)
        if jnp.issubdtype(value.dtype, jnp.inexact):
            rows = np.flatnonzero(~np.isfinite(value.reshape(len(value), -1)).all(1))
            if len(rows):
                found[name] = _rows(batch, rows)
    return found


def _rows(batch: Batch, rows: np.ndarray) -> str:
    if "index" not in batch or (np.asarray(batch["index"])[rows] < 0).any():
        # Rows of another stream have no number in the data.
        return f"rows {rows[:6].tolist()} of the batch"
    return f"examples {np.asarray(batch['index'])[rows[:6]].tolist()} of the data"


def _bad_leaves(state: TrainState) -> list[str]:
    def bad(tree: Any) -> list[str]:
        pairs = zip(trees.names(tree), jax.tree.leaves(tree), strict=True)
        return [name for name, leaf in pairs if not trees.all_finite(leaf)]

    parts = {"params": state.params, "stats": state.stats, "refs": state.refs}
    found = {what: bad(tree) for what, tree in parts.items()}
    return [f"{what} are not finite at {listed(n)}" for what, n in found.items() if n]


def _remedy(columns: Any, weights: Any, losses: Any, gradients: list[str]) -> str:
    if columns:
        return "clean these rows"
    if weights:
        return "start from finite weights and refs"
    if losses:
        return "lower the rates, set clip, or check what the term divides by and takes the log of"
    if gradients:
        return f"lower the rates of {gradients} or set clip"
    return "it came of dropout, accumulation or the optimizer: lower the rates"
