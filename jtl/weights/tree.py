"""A tree that is already in memory, as a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jtl.weights.checkpoint import Checkpoint, Tensor


def from_tree(params: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Return a tree of arrays as a checkpoint of layout "flax".

    Arrays of jax are handed on as they are; arrays of numpy are copied when they are read, since
    jax may take their memory for its own and would see what is written into them later.

    Args:
        params: a dict of dicts, frozen or plain, with our own names and kernel layouts, such as
            `FlaxPreTrainedModel.params`; BatchNorm statistics lie in it under `batch_stats`.
        config: the fields of its `config.json`.

    Raises:
        ValueError: a leaf is no array.

    >>> checkpoint = from_tree({"dense": {"kernel": np.ones((2, 3))}})
    >>> checkpoint.layout, checkpoint.names["dense/kernel"].shape
    ('flax', (2, 3))
    """
    flat = dict(_leaves(params, ""))
    for name, leaf in flat.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"the leaf {name!r} is to be an array and is a {type(leaf).__name__}; "
                "give a tree of arrays"
            )
    names = {name: Tensor(tuple(x.shape), np.dtype(x.dtype)) for name, x in flat.items()}

    def get(name: str) -> Any:
        leaf = flat[name]
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    return Checkpoint("flax", names, get, dict(config or {}), Path("memory"))


def _leaves(tree: Any, path: str) -> list[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        return [(path, tree)]
    below = ((f"{path}/{name}" if path else str(name), value) for name, value in tree.items())
    return [leaf for name, value in below for leaf in _leaves(value, name)]
