"""Where a run stands, with its arrays, and its way to disk and back."""

import dataclasses
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jtl import masks
from jtl.train import average, checkpoint, progress
from jtl.train.plan import Plan
from jtl.train.state import TrainState


class At(NamedTuple):
    """Where a run stands.

    Attributes:
        state: what the next step takes.
        progress: the plain data.
        best: the best weights so far of a phase that has `until`, else None.
    """

    state: TrainState
    progress: progress.Progress
    best: Any = None


def own_weights(state: TrainState, labels: PyTree[str], live: frozenset[str]) -> Any:
    """Return what a phase may change, the live parameters and the statistics, in copies.

    Where a moving average is kept, its values: they are what was evaluated.
    """
    params, stats = average.weights(state, labels, live)
    judged = state._replace(params=params, stats=stats)
    return jax.tree.map(jnp.copy, _weights(judged, labels, live))


def put_weights(
    state: TrainState, weights: Any, labels: PyTree[str], live: frozenset[str]
) -> TrainState:
    """Return the state with the weights that `own_weights` kept; they are not copied."""
    held = masks.split(state.params, masks.mask(labels, live))[1]
    return state._replace(params=masks.merge(weights["params"], held), stats=weights["stats"])


def save_at(checkpoints: checkpoint.Checkpoints | None, at: At, *, wait: bool = False) -> None:
    """Save where a run stands: after the last step that was finite.

    Nothing is saved without a folder, when a second Ctrl-C cut a step in two and its arrays are
    gone, and while Python shuts down.
    """
    gone = any(x.is_deleted() for x in jax.tree.leaves(at.state))
    if checkpoints is None or gone or sys.is_finalizing():
        return
    if not at.state.finite:  # steps that nobody has read yet changed nothing
        found = dataclasses.replace(at.progress, step=int(at.state.step))
        at = at._replace(state=at.state._replace(finite=jnp.ones((), bool)), progress=found)
    items = {"state": at.state} if at.best is None else {"state": at.state, "best": at.best}
    record = progress.to_record(at.progress)
    checkpoint.save(checkpoints, at.progress.step, items, record, wait=wait)


def resumed(
    checkpoints: checkpoint.Checkpoints | None, begin: At, plan: Plan, labels: PyTree[str]
) -> At:
    """Return where the newest checkpoint stands, `begin` where there is none.

    Raises:
        ValueError: the checkpoint is of a plan with other phases, or of another model.
    """
    record = None if checkpoints is None else checkpoint.latest(checkpoints)
    if checkpoints is None or record is None:
        return begin
    found = progress.from_record(record)
    if found.plan != begin.progress.plan:
        raise ValueError(
            f"the checkpoints in {checkpoints.folder} are of a plan with the phases "
            f"{list(found.plan)}; this one has {list(begin.progress.plan)}; go on with that plan, "
            "or take an empty folder"
        )
    like: dict[str, Any] = {"state": begin.state}
    if found.entered and found.metric is not None and plan[found.phase].until is not None:
        like["best"] = _weights(begin.state, labels, plan[found.phase].live)
    arrays = checkpoint.restore(checkpoints, like)
    return At(arrays["state"], found, arrays.get("best"))


def _weights(state: TrainState, labels: PyTree[str], live: frozenset[str]) -> Any:
    chosen = masks.mask(labels, live)
    return {"params": masks.split(state.params, chosen)[0], "stats": state.stats}
