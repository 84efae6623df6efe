"""A tree as named arrays for Orbax, and back: keys bare, empty arrays apart, each in its place."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jtl import trees
from jtl.near import nearest_leaves

Tables = Mapping[str, Mapping[str, Any]]


def flat(tree: PyTree) -> dict[str, Any]:
    """Return {name: array} without empty arrays, which Orbax refuses.

    >>> sorted(flat({"a": {"b": np.ones(2)}, "none": np.ones((0, 2))}))
    ['a/b']
    """
    leaves = map(_bare, jax.tree.leaves(tree))
    return {n: x for n, x in zip(trees.names(tree), leaves, strict=True) if np.size(x)}


def table(tree: PyTree) -> dict[str, str]:
    """Return {name: dtype and shape} of all leaves.

    >>> table({"a": np.ones((2, 3), np.float32)})
    {'a': 'float32[2, 3]'}
    """
    leaves = map(_bare, jax.tree.leaves(tree))
    return {
        name: f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"
        for name, leaf in zip(trees.names(tree), leaves, strict=True)
    }


def targets(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Orbax is asked for: arrays in their shardings, numpy for what is not committed.

    It commits to a device what was not, and that costs another compilation.
    """
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        if isinstance(x, jax.Array) and x.committed
        else np.broadcast_to(np.zeros((), jnp.result_type(x)), np.shape(x))
        for name, x in arrays.items()
    }


def unflat(arrays: Mapping[str, Any], like: PyTree) -> PyTree:
    """Return `like` with these arrays in place of the leaves that they name."""
    leaves = [
        _placed(arrays[name], leaf) if name in arrays else leaf
        for name, leaf in zip(trees.names(like), jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def choose(tables: Tables, patterns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what the patterns match, * for any text; a name begins with that of its tree.

    >>> tables = {"state": {"params/body/w": 1, "params/head/w": 2, "step": 3}}
    >>> choose(tables, ["state/params/b*", "state/step"])
    {'state': {'params/body/w': 1, 'step': 3}}
    """

    def matches(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return {
        tree: {name: value for name, value in table.items() if matches(_whole(tree, name))}
        for tree, table in tables.items()
    }


def check_patterns(patterns: Sequence[str], *tables: Tables) -> None:
    """Raise unless each pattern matches a name in one of the tables.

    Raises:
        ValueError: names the pattern and what comes near.
    """
    names = {_whole(tree, name): 0 for some in tables for tree in some for name in some[tree]}
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"include has {pattern!r}, which matches no leaf; "
                f"{nearest_leaves(pattern, sorted(names))}; give patterns of these names"
            )


def _whole(tree: str, name: str) -> str:
    return f"{tree}/{name}" if name else tree


def _bare(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _placed(array: Any, like: Any) -> Any:
    if _is_key(like):
        raw = _placed(array, jax.random.key_data(like))
        return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(like))
    if isinstance(like, jax.Array):
        return array if like.committed else jnp.array(array)
    return np.array(array)
