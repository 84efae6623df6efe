"""Where derived columns lie: in memory, or in a folder of files that several runs share.

    folder/KEY/0.npy, 1.npy, ...    the column of each bucket
    folder/KEY/column.json          shapes and checksums; its time is that of the last use

A column is written in a hidden folder and renamed when it is whole, so nobody sees half of one and
the first of two runs wins. Each file that is written or mapped is locked (shared) by the operating
system until its last array is gone or its process ends, even by kill -9: what can be locked alone
is in nobody's use and may be removed.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil
import time
import weakref
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes  # noqa: F401  gives numpy the name "bfloat16"
import numpy as np

FORMAT = 1
MEMORY_BYTES = 2**30
MARGIN_BYTES = 2**30

INDEX = "column.json"
NEW = ".new-column-"
_STALE_SECONDS = 3600.0
_LOG = logging.getLogger(__name__)

Column = tuple[np.ndarray, ...]


class Unwritable(Exception):
    """The folder of columns cannot be written: no room, no permission."""


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """Budgets of derived columns, and the folder of those that lie in files.

    Attributes:
        memory_bytes: of the columns of this store in memory at once.
        disk_bytes: of the whole folder, with what other runs left there; what was unused longest is
            removed to make room, never what a live run uses. 0 writes and reads no file.
        folder: of the files; None is `jtl/columns` in the user's cache folder.
        keep_seconds: columns that fit in memory are written for later runs too, where computing
            them took longer.
        margin_bytes: of the disk that always stay free.
        arrays: references to the columns that are in use; filled by use.
        counts: seconds spent computing, and columns reused from files; filled by use.
    """

    memory_bytes: int = MEMORY_BYTES
    disk_bytes: int = 0
    folder: pathlib.Path | None = None
    keep_seconds: float = 5.0
    margin_bytes: int = MARGIN_BYTES
    arrays: list[weakref.ref] = dataclasses.field(default_factory=list)
    counts: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"derive_seconds": 0.0, "reused": 0}
    )

    @property
    def place(self) -> pathlib.Path:
        """The folder of the files."""
        if self.folder is not None:
            return pathlib.Path(self.folder)
        cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        return pathlib.Path(cache) / "jtl" / "columns"

    def account(self) -> dict[str, float]:
        """Return the seconds spent, the MiB that columns take now, and how many were reused."""
        memory, disk = _used(self)
        return {**self.counts, "column_mib": memory / 2**20, "disk_mib": disk / 2**20}


def track(store: Store, column: Column) -> Column:
    """Return the column, counted in the store's account for as long as it is in use."""
    store.arrays.extend(weakref.ref(array) for array in column)
    return column


def fitting(store: Store, sizes: Mapping[Any, int]) -> dict[Any, str]:
    """Return "memory" or "disk" for those columns, in their order, that a budget has room for.

    Args:
        store: what it holds already counts.
        sizes: {column: bytes}.
    """
    memory, disk = left(store)
    free: dict[str, int] = {"memory": memory, "disk": disk}
    where: dict[Any, str] = {}
    for name, needed in sizes.items():
        kind = next((kind for kind in free if needed <= free[kind]), None)
        if kind is not None:
            where[name] = kind
            free[kind] -= needed
    return where


def left(store: Store) -> tuple[int, int]:
    """Return the bytes that new columns may take in memory and on disk."""
    return max(0, store.memory_bytes - _used(store)[0]), room(store)


def room(store: Store) -> int:
    """Return the bytes that new columns may take on disk, once all that is unused is removed."""
    if store.disk_bytes <= 0:
        return 0
    entries = _entries(store)
    held = sum(entry.bytes for entry in entries if not entry.unused)
    unused = sum(entry.bytes for entry in entries if entry.unused)
    return max(0, min(store.disk_bytes - held, _free(store) + unused))


def find(store: Store, key: str | None, *, check: bool = True) -> Column | None:
    """Return a finished column, mapped from its files, or None; a damaged one is removed.

    Args:
        store: where to look.
        key: of the column; None finds nothing.
        check: whether every byte is compared with its checksum.
    """
    entry = store.place / str(key)
    if key is None or store.disk_bytes <= 0 or not os.path.isdir(entry):
        return None
    try:
        index = json.loads((entry / INDEX).read_text())
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']}, not {FORMAT}")
        parts = enumerate(index["parts"])
        column = tuple(_mapped(entry / f"{bucket}.npy", part, check) for bucket, part in parts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if os.path.isdir(entry):  # another run may have removed it just now
            _LOG.warning("the column in %s is damaged (%s): it is computed again", entry, error)
            _remove(entry)
        return None
    with contextlib.suppress(OSError):
        os.utime(entry / INDEX)
    return track(store, column)


class _Entry(NamedTuple):
    path: pathlib.Path
    bytes: int
    used: float
    unused: bool


def _entries(store: Store) -> list[_Entry]:
    """Return all columns in the folder, half-written ones too, the one unused longest first."""
    found, paths = [], []
    with contextlib.suppress(OSError):
        paths = list(store.place.iterdir())
    for path in paths:
        half = path.name.startswith(NEW)
        with contextlib.suppress(OSError):  # not ours, or removed by another run meanwhile
            used = (path if half else path / INDEX).stat().st_mtime
            files = list(path.glob("*.npy"))
            size = sum(file.stat().st_size for file in files)
            old = not half or time.time() - used > _STALE_SECONDS
            found.append(_Entry(path, size, used, old and all(map(_unused, files))))
    return sorted(found, key=lambda entry: entry.used)


def make_room(store: Store, needed: int) -> None:
    """Remove what is stale, and the columns unused longest, until `needed` bytes fit."""
    store.place.mkdir(parents=True, exist_ok=True)
    entries = _entries(store)
    total = sum(entry.bytes for entry in entries)
    for entry in entries:
        fits = total + needed <= store.disk_bytes and needed <= _free(store)
        if entry.unused and (entry.path.name.startswith(NEW) or not fits):
            _remove(entry.path)
            total -= entry.bytes
    if total + needed > store.disk_bytes or needed > _free(store):
        raise Unwritable(
            f"{needed / 2**20:.1f} MiB are needed; the budget is {store.disk_bytes / 2**20:.1f} "
            f"MiB, {total / 2**20:.1f} of them in use, and the disk has "
            f"{max(0, _free(store)) / 2**20:.1f} MiB to spare"
        )


def _remove(entry: pathlib.Path) -> None:
    """Remove a column: out of sight at once, so that nobody opens half of it."""
    hidden = entry.with_name(f"{NEW}gone-{entry.name.removeprefix(NEW)}-{os.getpid()}")
    with contextlib.suppress(OSError):
        os.rename(entry, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _free(store: Store) -> int:
    place = store.place
    while not os.path.exists(place):
        place = place.parent
    return shutil.disk_usage(place).free - store.margin_bytes


def _used(store: Store) -> tuple[int, int]:
    """Return the bytes in memory and in files of the columns that are in use."""
    alive = [array for ref in store.arrays if (array := ref()) is not None]
    disk = sum(array.nbytes for array in alive if isinstance(array, np.memmap))
    return sum(array.nbytes for array in alive) - disk, disk


def _mapped(path: pathlib.Path, part: Mapping[str, Any], check: bool) -> np.ndarray:
    """Return the array in a file; the mapping keeps the file's lock as long as it lives."""
    shape, dtype = tuple(part["shape"]), np.dtype(part["dtype"])
    with open(path, "rb") as file:
        lock(file)
        np.lib.format.read_magic(file)
        found, _, _ = np.lib.format.read_array_header_1_0(file)
        if found != shape:
            raise ValueError(f"{path.name} is of shape {found}, not {shape}")
        if 0 in shape:
            return np.empty(shape, dtype)
        array = np.memmap(file, dtype, "r", offset=file.tell(), shape=shape)
    if check and zlib.crc32(array.reshape(-1).view(np.uint8).data) != part["crc32"]:
        raise ValueError(f"the checksum of {path.name} is another")
    return array


def lock(file: BinaryIO) -> None:
    """Mark a file as in use until it and all its mappings are closed."""
    with contextlib.suppress(ImportError, OSError):  # no such locks here: nothing can be removed
        import fcntl

        fcntl.flock(file, fcntl.LOCK_SH)


def _unused(path: pathlib.Path) -> bool:
    """Return whether nobody writes or maps a file: then it can be locked alone."""
    try:
        import fcntl

        with open(path, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (ImportError, OSError):
        return False
