"""Read Flax msgpack files: the structure is walked once, arrays are read when they are asked for.

`flax.serialization.msgpack_restore` needs the whole file in memory beside its arrays. Here one pass
over the bytes (https://github.com/msgpack/msgpack/blob/master/spec.md) notes where each array lies.
"""

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jtl.weights.checkpoint import AGAIN, Tensor

_NDARRAY, _SCALAR = 1, 3  # Flax's own types: (shape, name of the dtype, bytes)
_CHUNKED = "__msgpack_chunked_array__"  # arrays above 2^30 bytes: flat pieces under numbers
_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
}


class _Place(NamedTuple):
    """An array in the file: (first byte, number of bytes) of each of its pieces."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[tuple[int, int], ...]


def read_msgpack(
    path: str | Path,
) -> tuple[dict[str, Tensor], Callable[[str], np.ndarray], tuple[str, ...]]:
    """Return shape and dtype of each leaf, a function that reads one, and what is no array.

    Names are spelled `a/b/c`.

    Raises:
        ValueError: the file is cut off or no tree of arrays.
    """
    path = Path(path)
    size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("rb") as file:
            tree = _value(file)
            if file.tell() != size or not isinstance(tree, dict):
                raise ValueError(f"a {type(tree).__name__} ends at byte {file.tell()}")
        leaves = dict(_leaves(tree, ""))
        places = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, _Place)}
        _check(places, size)
    except Exception as error:  # a damaged file raises a dozen kinds of error
        raise ValueError(
            f"{str(path)!r} is cut off or no Flax checkpoint: {type(error).__name__}: {error}; it "
            f"has {size} bytes; {AGAIN}"
        ) from error

    def get(name: str) -> np.ndarray:
        shape, dtype, pieces = places[name]
        if len(pieces) == 1:
            return _flat(path, dtype, *pieces[0]).reshape(shape)
        whole, start = np.empty(math.prod(shape), dtype), 0
        for piece in pieces:
            part = _flat(path, dtype, *piece)
            whole[start : start + part.size] = part
            start += part.size
        return whole.reshape(shape)

    names = {name: Tensor(place.shape, place.dtype) for name, place in places.items()}
    return names, get, tuple(name for name in leaves if name not in places)


def _flat(path: Path, dtype: np.dtype, start: int, size: int) -> np.ndarray:
    return np.fromfile(path, dtype=dtype, count=size // dtype.itemsize, offset=start)


def _leaves(tree: Any, path: str) -> list[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        return [(path, tree)]
    if _CHUNKED in tree:
        return [(path, _joined(tree))]
    below = ((f"{path}/{name}" if path else str(name), value) for name, value in tree.items())
    return [leaf for name, value in below for leaf in _leaves(value, name)]


def _joined(tree: Mapping[str, Any]) -> _Place:
    shape = tuple(tree["shape"][str(i)] for i in range(len(tree["shape"])))
    chunks = [tree["chunks"][str(i)] for i in range(len(tree["chunks"]))]
    pieces = tuple(piece for chunk in chunks for piece in chunk.pieces)
    return _Place(shape, chunks[0].dtype, pieces)


def _check(places: Mapping[str, _Place], end: int) -> None:
    for name, (shape, dtype, pieces) in places.items():
        size = sum(size for _, size in pieces)
        numbers = dtype.kind in "biufc" or dtype in _DTYPES.values()
        whole = size == math.prod(shape) * dtype.itemsize
        if not numbers or not whole or any(a + b > end for a, b in pieces):
            raise ValueError(f"{name!r} of shape {shape} and {dtype} lies at {pieces}")


def _value(file: io.BufferedIOBase) -> Any:
    """Return the next object: dicts, lists, scalars, and `_Place` for an array."""
    code = _number(file, 1)
    if code < 0x80 or code >= 0xE0:
        return code if code < 0x80 else code - 0x100
    if code < 0x90:
        return _map(file, code & 0x0F)
    if code < 0xA0:
        return [_value(file) for _ in range(code & 0x0F)]
    if code < 0xC0:
        return _bytes(file, code & 0x1F).decode()
    if code in _CONSTANTS:
        return _CONSTANTS[code]
    if 0xD4 <= code <= 0xD8:
        return _extension(file, 1 << (code - 0xD4))
    return _long(file, code)


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_KINDS: tuple[tuple[int, int, Callable[[io.BufferedIOBase, int], Any]], ...] = (
    (0xC4, 3, lambda file, size: _skip(file, size)),
    (0xC7, 3, lambda file, size: _extension(file, size)),
    (0xD9, 3, lambda file, size: _bytes(file, size).decode()),
)


def _long(file: io.BufferedIOBase, code: int) -> Any:
    """Return the object behind a code that is followed by its length or its number."""
    for first, widths, make in _KINDS:  # lengths of 1, 2 and 4 bytes
        if first <= code < first + widths:
            return make(file, _number(file, 1 << (code - first)))
    if code in (0xCA, 0xCB):
        dtype = ">f4" if code == 0xCA else ">f8"
        return float(np.frombuffer(_bytes(file, int(dtype[-1])), dtype)[0])
    if 0xCC <= code <= 0xD3:
        signed = code >= 0xD0
        raw = _bytes(file, 1 << (code - (0xD0 if signed else 0xCC)))
        return int.from_bytes(raw, "big", signed=signed)
    if code in (0xDC, 0xDD):
        return [_value(file) for _ in range(_number(file, 2 if code == 0xDC else 4))]
    if code in (0xDE, 0xDF):
        return _map(file, _number(file, 2 if code == 0xDE else 4))
    raise ValueError(f"byte {file.tell() - 1} is {code:#x}, which begins no object")


def _map(file: io.BufferedIOBase, count: int) -> dict[Any, Any]:
    return {_value(file): _value(file) for _ in range(count)}


def _skip(file: io.BufferedIOBase, size: int) -> tuple[int, int]:
    """Return where bytes lie, and pass over them."""
    start = file.tell()
    file.seek(size, io.SEEK_CUR)
    return start, size


def _extension(file: io.BufferedIOBase, size: int) -> Any:
    kind, end = _number(file, 1), file.tell() + size
    if kind not in (_NDARRAY, _SCALAR):
        raise ValueError(f"an object of type {kind} at byte {file.tell()}, which is no array")
    shape, name, piece = _value(file)
    if file.tell() != end:
        raise ValueError(f"an array that is to end at byte {end} ends at {file.tell()}")
    name = name if isinstance(name, str) else _text(file, name)
    return _Place(tuple(shape), _DTYPES.get(name) or np.dtype(name), (piece,))


def _text(file: io.BufferedIOBase, place: tuple[int, int]) -> str:
    here = file.tell()
    file.seek(place[0])
    text = _bytes(file, place[1]).decode()
    file.seek(here)
    return text


def _number(file: io.BufferedIOBase, size: int) -> int:
    return int.from_bytes(_bytes(file, size), "big")


def _bytes(file: io.BufferedIOBase, size: int) -> bytes:
    raw = file.read(size)
    if len(raw) != size:
        raise ValueError(f"{size} bytes are wanted and {len(raw)} are left")
    return raw
