"""Proof that what is held in a phase kept its bits: a digest of each held array, before and after.

Digests instead of copies: they take no memory of the device, and go with the checkpoint, so that
the proof spans a phase that was interrupted.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jtl import masks, trees
from jtl.near import listed
from jtl.train.state import TrainState


def digests(state: TrainState, labels: PyTree[str], live: frozenset[str]) -> dict[str, str]:
    """Return {name: digest} of every held parameter, statistic and optimizer slot.

    Args:
        state: its `params` have the structure of `labels`.
        labels: tree of labels of the parameters.
        live: labels that move; all others are held.
    """
    held = jax.tree.map(lambda label: label not in live, labels)
    slots = getattr(state.opt_state, "inner_states", {})
    parts = {
        "params": masks.split(state.params, held)[0],
        "stats": masks.split(state.stats, held_stats(state.stats, labels, live))[0],
        "opt_state": {label: slot for label, slot in slots.items() if label not in live},
    }
    leaves = zip(trees.names(parts), jax.tree.leaves(parts), strict=True)
    return {name: _digest(leaf) for name, leaf in leaves}


def held_stats(stats: PyTree, labels: PyTree[str], live: frozenset[str]) -> PyTree[bool]:
    """Return the mask of the statistics that must stay: those of modules without a live label.

    A statistic belongs to the nearest module above it that has parameters.

    >>> stats = {"stem": {"norm": {"mean": 0.0}}, "block": {"norm": {"mean": 0.0}}}
    >>> labels = {"stem": {"norm": {"scale": "stem"}}, "block": {"norm": {"scale": "block"}}}
    >>> held_stats(stats, labels, frozenset({"block"}))
    {'block': {'norm': {'mean': False}}, 'stem': {'norm': {'mean': True}}}
    """
    owners: dict[str, set[str]] = {}
    for name, label in zip(trees.names(labels), jax.tree.leaves(labels), strict=True):
        for module in _modules(name):
            owners.setdefault(module, set()).add(label)

    def held(name: str) -> bool:
        found = (owners[module] for module in _modules(name) if module in owners)
        return not next(found, set()) & live

    return jax.tree.unflatten(
        jax.tree.structure(stats), [held(name) for name in trees.names(stats)]
    )


def check_held(before: Mapping[str, str], after: Mapping[str, str], phase: str) -> None:
    """Raise unless every held array is the same bit for bit.

    Raises:
        ValueError: names the arrays that changed.
    """
    moved = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if moved:
        raise ValueError(
            f"{len(moved)} of {len(before)} held arrays changed in phase {phase!r}: "
            f"{listed(moved)}; "
            "the forward pass must return the statistics of held groups as they came (those whose "
            "label is not in `live`), and each label's transform must keep to its own leaves"
        )


def _modules(name: str) -> list[str]:
    """Return the paths above a name, nearest first: 'a/b/c' gives 'a/b', 'a', ''."""
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]


def _digest(leaf: Any) -> str:
    array = np.asarray(leaf)
    digest = hashlib.blake2b(f"{array.dtype}{array.shape}".encode(), digest_size=8)
    digest.update(array.tobytes())
    return digest.hexdigest()
