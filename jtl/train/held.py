"""Proof that what is held in a phase kept its bits: a digest of each held array, before and after.

Digests instead of copies: they take no memory of the device, and go with the checkpoint, so that
the proof spans a phase that was interrupted. A digest is of the values alone, wherever they lie, so
a run may go on with another number of devices or processes.
"""

import concurrent.futures
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jtl import masks, trees
from jtl.near import listed
from jtl.train.mesh import is_apart, on_host
from jtl.train.state import TrainState

_THREADS = 4  # and so many arrays at most are copied to the host at once


def digests(
    state: TrainState,
    labels: PyTree[str],
    live: frozenset[str],
    *,
    known: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return {name: digest} of every held parameter, statistic and optimizer slot.

    Args:
        state: its `params` have the structure of `labels`.
        labels: tree of labels of the parameters.
        live: labels that move; all others are held.
        known: digests of arrays that have not changed since; they are not read again.
    """
    held = jax.tree.map(lambda label: label not in live, labels)
    slots = getattr(state.opt_state, "inner_states", {})
    parts = {
        "params": masks.split(state.params, held)[0],
        "stats": masks.split(state.stats, held_stats(state.stats, labels, live))[0],
        "opt_state": {label: slot for label, slot in slots.items() if label not in live},
    }
    leaves = dict(zip(trees.names(parts), jax.tree.leaves(parts), strict=True))
    fresh = {name: leaf for name, leaf in leaves.items() if name not in (known or {})}
    found = {**(known or {}), **dict(zip(fresh, _digests(list(fresh.values())), strict=True))}
    return {name: found[name] for name in leaves}


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


def digest(leaf: Any) -> str:
    """Return 16 hex digits of dtype, shape and bits of an array, wherever it lies.

    An array that is split over processes is gathered, and all of them must call this.

    >>> digest(np.float32([0.0])) == digest(np.float32([-0.0]))
    False
    """
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    host = on_host(leaf)
    # SHA-256: most processors have instructions for it, so it is faster than blake2b.
    found = hashlib.sha256(f"{host.dtype}{host.shape}".encode())
    found.update(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]


def _digests(leaves: list[Any]) -> list[str]:
    if any(is_apart(leaf) for leaf in leaves):  # gathered by all processes in one order
        return [digest(leaf) for leaf in leaves]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(digest, leaves))
