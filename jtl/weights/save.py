"""Write tensors to a safetensors file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write(path: str | Path, tensors: Mapping[str, Any]) -> None:
    """Write `{name: array}` to one safetensors file; it appears whole or not at all.

    Args:
        path: of the file; its folder exists.
        tensors: arrays in the layout in which they are to lie in the file.

    Raises:
        ValueError: there is nothing to write.
    """
    from safetensors.numpy import save_file

    if not tensors:
        raise ValueError(f"{str(path)!r} was to hold no tensors at all; give at least one")
    # order="C", since ascontiguousarray gives a scalar a dimension; safetensors ignores strides.
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    unfinished = f"{path}.unfinished"
    # transformers reads only files whose metadata names the framework of their layout.
    save_file(arrays, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, path)
