"""Fingerprints: a hash of values bit for bit, by which a later run knows what was computed from."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def fingerprint(*values: Any) -> str:
    """Return a hash of values, in their order; the same in every process.

    Arrays count with dtype, shape and bits, mappings with their names in sorted order, files (a
    `Path`) with their bytes, images of Pillow with their pixels, and all else by its `repr`.

    >>> fingerprint(1, "a") == fingerprint(1, "a"), fingerprint(1, "a") == fingerprint(1, "b")
    (True, False)
    """
    digest = hashlib.sha256()
    for value in values:
        _feed(digest, value)
    return digest.hexdigest()[:32]


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        _feed(digest, ("mapping", [(name, value[name]) for name in sorted(value)]))
    elif isinstance(value, Path):
        _feed(digest, value.read_bytes())
    elif isinstance(value, str | bytes):
        content = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        digest.update(f"{type(value).__name__} {len(content)} ".encode() + content)
    elif isinstance(value, Sequence):
        digest.update(f"sequence {len(value)} ".encode())
        for item in value:
            _feed(digest, item)
    elif hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        array = np.asarray(value)
        digest.update(f"array {array.dtype} {array.shape} ".encode())
        # ml_dtypes such as bfloat16 have no buffer of their own.
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    else:
        _feed(digest, repr(value))
