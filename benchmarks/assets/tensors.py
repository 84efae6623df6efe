"""Write a safetensors file one tensor at a time: a big model is never held whole."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from jtl.weights.files import Tensor

_TYPES = {"float16": "F16", "float32": "F32"}


def write(path: Path, names: Mapping[str, Tensor], get: Callable[[str], np.ndarray]) -> None:
    """Write tensors in the order of `names`.

    Args:
        path: of the file.
        names: shape and dtype of each.
        get: makes one, when its turn comes.

    Raises:
        ValueError: a tensor is not of its shape and dtype, or of a dtype that is not written here.
    """
    header = json.dumps({"__metadata__": {"format": "pt"}, **_entries(names)}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name, wanted in names.items():
            array = get(name)
            if (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(
                    f"{name!r} is {array.dtype}{array.shape}; announced was "
                    f"{wanted.dtype}{wanted.shape}; the carrier is of another layout"
                )
            np.ascontiguousarray(array).tofile(file)


def _entries(names: Mapping[str, Tensor]) -> dict[str, object]:
    entries, start = {}, 0
    for name, (shape, dtype) in names.items():
        if dtype.name not in _TYPES:
            raise ValueError(f"{name!r} is {dtype}; written are {sorted(_TYPES)}; convert it")
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": _TYPES[dtype.name],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    return entries
