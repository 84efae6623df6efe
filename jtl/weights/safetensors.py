"""Read safetensors files: a JSON header with the place of each tensor, then their bytes.

The reader is our own because the package's numpy one cannot read bfloat16 before ml_dtypes is
imported and fails on a whole file for the sake of one float8 tensor.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jtl.weights.checkpoint import AGAIN, Tensor

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_PACKED = ("F4", "F6_E2M3", "F6_E3M2")


def read_safetensors(
    path: str | Path,
) -> tuple[dict[str, Tensor], Callable[[str], np.ndarray]]:
    """Return shape and dtype of each tensor in a file, and a function that reads one.

    Raises:
        ValueError: the file is cut off or corrupt, or has a dtype that is not known.
    """
    path = Path(path)
    header, start = _header(path)
    room = path.stat().st_size - start
    names, places = {}, {}
    for name, entry in header.items():
        _refuse_packed(path, name, entry)
        try:
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            shape = tuple(int(size) for size in entry["shape"])
            begin, end = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} says {entry} of {name!r}, which is no tensor of a known dtype "
                f"({sorted(_DTYPES)}); {AGAIN}"
            ) from error
        if not 0 <= begin <= end or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{str(path)!r} is corrupt: {name!r} of shape {shape} is said to lie in bytes "
                f"{begin} to {end}; {AGAIN}"
            )
        if end > room:
            raise ValueError(
                f"{str(path)!r} is cut off: {name!r} ends at byte {start + end} of a file of "
                f"{start + room}; {AGAIN}"
            )
        names[name] = Tensor(shape, dtype)
        places[name] = start + begin

    def get(name: str) -> np.ndarray:
        shape, dtype = names[name]
        count = math.prod(shape)
        if not count:
            return np.zeros(shape, dtype)
        flat = np.fromfile(path, dtype=dtype, count=count, offset=places[name])
        return flat.reshape(shape)

    return names, get


def _refuse_packed(path: Path, name: str, entry: Any) -> None:
    if isinstance(entry, dict) and entry.get("dtype") in _PACKED:
        raise ValueError(
            f"{str(path)!r} is quantized: {name!r} has the dtype {entry['dtype']}, of which "
            "several share a byte; jtl reads floats of 8 bits and more; give the checkpoint that "
            "it was made from"
        )


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and the byte at which its data begins."""
    if not path.is_file():
        there = (
            sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        )
        raise ValueError(f"{str(path)!r} is missing; beside it lie {there[:10]}; {AGAIN}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{str(path)!r} is cut off or no safetensors file: its header is said to have "
                f"{length} bytes, the file has {size}; {AGAIN}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is corrupt: its header of {length} bytes is no JSON object; {AGAIN}"
        ) from error
    return header, 8 + length
