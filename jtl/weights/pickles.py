"""Read PyTorch's pickled checkpoints without PyTorch; tensors stay in the file until asked for.

What `torch.save` writes is read: the zip form (`archive/data.pkl`, `archive/data/0`) and the one
before PyTorch 1.6 (pickles in a row, then raw storages). `unpickle.py` says what may lie in them.
"""

import io
import math
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jtl.weights.checkpoint import AGAIN, Tensor
from jtl.weights.unpickle import Array, Refused, Stored, unpickle

_MAGIC = 0x1950A86A20F9469CFC6C


class _File(NamedTuple):
    """What a file says before any tensor is read; `places` are the bytes where storages begin."""

    value: Any
    places: dict[str, int]
    swapped: bool


def read_pickle(
    path: str | Path, key: str | None = None
) -> tuple[dict[str, Tensor], Callable[[str], np.ndarray], tuple[str, ...]]:
    """Return shape and dtype of each tensor, a function that reads one, and what was left alone.

    Args:
        path: of a file that `torch.save` wrote.
        key: the entry that holds the weights ("a/b" for one inside another, "" for the whole file,
            its nested names joined by dots). None finds the one entry that holds tensors, such as
            `model` or `state_dict`, or takes a file that is itself a dict of tensors.

    Raises:
        ValueError: the file asks for a class that is not a tensor or a plain value, is cut off or
            no such file, or holds several dicts of tensors and no key says which is meant.
    """
    path = Path(path)
    file = _opened(path)
    chosen, ignored = _weights(file.value, key, path)
    stored = {}
    for name, value in _flat(chosen, ""):
        if isinstance(value, Stored | Array):
            stored[name] = value
        else:
            ignored.append(name)
    names = {}
    for name, value in stored.items():
        if isinstance(value, Stored):
            _check_bounds(name, value, path)
            names[name] = Tensor(value.shape, value.dtype)
        else:
            names[name] = Tensor(value.value.shape, value.value.dtype)

    def get(name: str) -> np.ndarray:
        value = stored[name]
        return _tensor(path, value, file) if isinstance(value, Stored) else value.value

    return names, get, tuple(ignored)


def contents(path: str | Path) -> Any:
    """Return all that a checkpoint holds, each tensor as a `Stored`, to see what is beside them.

    Raises:
        ValueError: as for `read_pickle`.
    """
    return _opened(Path(path)).value


def _opened(path: Path) -> _File:
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _open_zip(path) if zipped else _open_legacy(path, file)
    except Refused:
        raise
    except Exception as error:  # a damaged pickle or zip raises a dozen kinds of error
        size = path.stat().st_size if path.is_file() else 0
        raise ValueError(
            f"{str(path)!r} is cut off or no file of torch.save: {type(error).__name__}: {error}; "
            f"it has {size} bytes; {AGAIN}"
        ) from error


def _open_zip(path: Path) -> _File:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        roots = [name[:-8] for name in entries if re.fullmatch(r"[^/]*/?data\.pkl", name)]
        if not roots:
            raise ValueError(f"no data.pkl among {sorted(entries)[:8]}")
        root = roots[0]
        if f"{root}constants.pkl" in entries:
            raise Refused(
                f"{str(path)!r} is a TorchScript program, which is code with weights in it; its "
                f"archive holds {sorted(entries)[:4]}; load it once by torch.jit.load and save "
                "what its state_dict() gives by torch.save"
            )
        value, storages = unpickle(io.BytesIO(archive.read(f"{root}data.pkl")), path)
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
    with path.open("rb") as file:
        places = {
            key: _place_in_zip(file, entries[f"{root}data/{key}"], size)
            for key, size in storages.items()
        }
    return _File(value, places, order.strip() == b"big")


def _place_in_zip(file: io.BufferedIOBase, entry: zipfile.ZipInfo, size: int) -> int:
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < size:
        raise ValueError(f"{entry.filename} is compressed or shorter than its {size} bytes")
    file.seek(entry.header_offset + 26)  # the local header's own lengths: PyTorch pads in them
    name, extra = struct.unpack("<HH", file.read(4))
    return entry.header_offset + 30 + name + extra


def _open_legacy(path: Path, file: io.BufferedIOBase) -> _File:
    magic, _ = unpickle(file, path)
    if magic != _MAGIC:
        raise ValueError("it begins with neither a zip nor PyTorch's magic number")
    unpickle(file, path)  # the number of the protocol
    system, _ = unpickle(file, path)
    value, storages = unpickle(file, path)
    keys, _ = unpickle(file, path)
    places, end = {}, path.stat().st_size
    for key in keys:
        file.seek(8, io.SEEK_CUR)  # the count of elements, known already
        places[str(key)] = file.tell()
        file.seek(storages[str(key)], io.SEEK_CUR)
    if file.tell() > end or not set(storages) <= set(places):
        raise ValueError(f"its tensors end at byte {file.tell()}")
    return _File(value, places, not system.get("little_endian", True))


def _weights(value: Any, key: str | None, path: Path) -> tuple[Mapping[str, Any], list[str]]:
    """Return the dict of tensors and the names of the entries beside it."""
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{str(path)!r} holds a {type(value).__name__}, no dict of tensors; "
            "save what state_dict() gives"
        )
    if key is not None:
        return _entry(value, key, path)
    inner = {str(name): _count(entry) for name, entry in value.items()}
    inner = {name: count for name, count in inner.items() if count}
    own = _count(value)
    if own > max(inner.values(), default=0):
        return value, []
    if len(inner) == 1:
        return _entry(value, next(iter(inner)), path)
    if inner:
        raise ValueError(
            f"{str(path)!r} holds several dicts of tensors ({_table(inner)}) and it is not said "
            f"which one is meant; give key= with one of {sorted(inner)}"
        )
    raise ValueError(
        f"{str(path)!r} holds no tensors that are found; its entries are "
        f"{[str(name) for name in value][:12]}; give key= with the entry that holds them"
    )


def _entry(value: Mapping[Any, Any], key: str, path: Path) -> tuple[Mapping[str, Any], list[str]]:
    for part in key.split("/") if key else ():
        if not isinstance(value, Mapping) or part not in value:
            there = [str(name) for name in value] if isinstance(value, Mapping) else []
            raise ValueError(
                f"{str(path)!r} has no entry {key!r}: there is no {part!r} among {there[:12]}; "
                "correct key="
            )
        value, beside = value[part], [str(name) for name in value if name != part]
    if not isinstance(value, Mapping):
        raise ValueError(
            f"the entry {key!r} of {str(path)!r} is a {type(value).__name__}, no dict of tensors; "
            "correct key="
        )
    return value, beside if key else []


def _count(value: Any) -> int:
    """Return how many tensors a dict holds under names, not under numbers as an optimizer's."""
    if not isinstance(value, Mapping):
        return 0
    return sum(isinstance(k, str) and isinstance(v, Stored | Array) for k, v in value.items())


def _table(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count} tensors" for name, count in counts.items())


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(name, value)]
    below = ((f"{name}.{key}" if name else str(key), entry) for key, entry in value.items())
    return [pair for key, entry in below for pair in _flat(entry, key)]


def _span(stored: Stored) -> int:
    """Return how many elements lie from the first to the last one of the tensor."""
    steps = zip(stored.shape, stored.strides, strict=True)
    return 0 if 0 in stored.shape else 1 + sum((size - 1) * step for size, step in steps)


def _check_bounds(name: str, stored: Stored, path: Path) -> None:
    numbers = (stored.offset, *stored.shape, *stored.strides)
    whole = all(isinstance(number, int) and number >= 0 for number in numbers)
    fits = whole and len(stored.shape) == len(stored.strides)
    end = (stored.offset + _span(stored)) * stored.dtype.itemsize if fits else 0
    if not fits or end > stored.storage.size:
        raise ValueError(
            f"{str(path)!r} is corrupt: {name!r} of shape {stored.shape} and strides "
            f"{stored.strides} ends at byte {end} of a storage of {stored.storage.size}; {AGAIN}"
        )


def _tensor(path: Path, stored: Stored, file: _File) -> np.ndarray:
    storage, offset, shape, strides, dtype = stored
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    start = file.places[storage.key] + storage.start + offset * dtype.itemsize
    flat = np.fromfile(path, dtype=dtype, count=_span(stored), offset=start)
    if file.swapped:
        flat = flat.byteswap()
    steps = [step * dtype.itemsize for step in strides]
    # Of bytes, since numpy takes no buffer of bfloat16 or float8.
    view = np.ndarray(shape, dtype, buffer=flat.view(np.uint8), strides=steps)
    return np.asarray(view, order="C")
