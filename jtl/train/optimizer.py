"""One optimizer-state structure for all phases of a run: a phase swaps a pure function."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from jtl import masks


def phase_optimizer(
    txs: Mapping[str, optax.GradientTransformation],
    labels: PyTree[str],
    live: Collection[str],
    ever_live: Collection[str],
) -> optax.GradientTransformationExtraArgs:
    """Return the transform of a phase; those of all phases of a run share one state.

    A live label has its transform. A label held now that moves in another phase keeps its state
    untouched. A label that never moves has no state. Each label has moments and a step count of its
    own: leaves that joined a group with an old count would get no bias correction, and step up to 4
    times too far.

    >>> labels = {"body": "body", "head": "head", "stem": "stem"}
    >>> txs = {"body": optax.adam(1.0), "head": optax.adam(1.0)}
    >>> tx = phase_optimizer(txs, labels, {"head"}, {"head", "body"})
    >>> slots = tx.init(dict.fromkeys(labels, 1.0)).inner_states
    >>> {label: len(optax.tree.get_all_with_path(slots[label], "mu")) for label in labels}
    {'body': 1, 'head': 1, 'stem': 0}

    Args:
        txs: a transform at unit rate (`learning_rate=1.0`) for each label of `ever_live`; the step
            multiplies by the rates.
        labels: tree of labels of the parameters.
        live: labels that move in this phase.
        ever_live: labels that move in any phase of the run.

    Raises:
        ValueError: a live label that `ever_live` lacks, a label of `ever_live` without a transform,
            or one that no leaf bears.
    """
    outside = sorted(set(live) - set(ever_live))
    if outside:
        raise ValueError(
            f"live names {outside}, which ever_live {sorted(ever_live)} lacks; "
            "ever_live is the union of the live labels of all phases"
        )
    bare = sorted(set(ever_live) - set(txs))
    if bare:
        raise ValueError(
            f"labels {bare} move and have no transform; txs has {sorted(txs)}; "
            "give a transform at unit rate for each label that moves"
        )
    chosen = {label: txs[label] if label in live else masks.hold(txs[label]) for label in ever_live}
    return masks.optimizer(chosen, labels)


def reset(
    opt_state: Any, label: str, tx: optax.GradientTransformation, params: PyTree
) -> optax.PartitionState:
    """Return the optimizer state in which one label starts anew, and the others go on.

    For a head that was made again, or a group whose moments are of another task.

    >>> params, labels = {"body": 1.0, "head": 1.0}, {"body": "body", "head": "head"}
    >>> tx = masks.optimizer(dict.fromkeys(labels, optax.sgd(1.0, momentum=0.9)), labels)
    >>> _, state = tx.update(params, tx.init(params))
    >>> state = reset(state, "head", tx, params)
    >>> [float(state.inner_states[label].inner_state[0].trace[label]) for label in labels]
    [1.0, 0.0]

    Args:
        opt_state: of `phase_optimizer` or `masks.optimizer`.
        label: whose moments and count begin again.
        tx: the transform that the state is of; that of any phase.
        params: the parameters as they are now.

    Raises:
        ValueError: a state of another transform, or a label that it has no slots of.
    """
    slots = getattr(opt_state, "inner_states", None)
    if slots is None:
        raise ValueError(
            f"the optimizer state is a {type(opt_state).__name__}, which has no labels; "
            "give the state of `masks.optimizer`, the part of it where it stands in a chain"
        )
    kept = {name for name, slot in slots.items() if jax.tree.leaves(slot)}
    if label not in kept:
        raise ValueError(
            f"label {label!r} has no slots; {sorted(kept)} have; "
            "give one of these: what never moves has no state"
        )
    fresh = tx.init(params).inner_states[label]  # pyright: ignore[reportAttributeAccessIssue]
    return opt_state._replace(inner_states={**slots, label: fresh})
