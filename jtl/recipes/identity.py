"""What a run is of, as plain data: `config.json` where there is no config file.

A folder goes on only with the run that it was made for, so all that makes another run is here.
"""

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def called(function: Any) -> Any:
    """Return the name of a function, with the options that were bound to it.

    >>> called(functools.partial(int, base=2))
    {'kind': 'int', 'base': 2}
    """
    if isinstance(function, functools.partial):
        options = {name: _plain(value) for name, value in function.keywords.items()}
        return {**_named(function.func), **options}
    return _named(function)


def sources(data: Mapping[str, Any]) -> dict[str, str]:
    """Return name, number of examples and a checksum of the labels of each part."""
    return {part: f"{s.name}, {s.size} rows, labels {_sum(s)}" for part, s in data.items()}


def weights(params: Any) -> str:
    """Return a checksum of the shapes of a tree and of its smaller leaves."""
    digest = 0
    for leaf in jax.tree.leaves(params):
        digest = zlib.crc32(repr((leaf.shape, str(leaf.dtype))).encode(), digest)
        if leaf.size <= 4096:
            digest = zlib.crc32(np.asarray(leaf).tobytes(), digest)
    return f"{digest:08x}"


def _named(function: Any) -> dict[str, Any]:
    return {"kind": getattr(function, "__name__", type(function).__name__)}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | tuple | None) else str(value)


def _sum(source: Any) -> str:
    labels = np.ascontiguousarray(source.columns["label"])
    return f"{zlib.crc32(labels.tobytes()):08x}"
