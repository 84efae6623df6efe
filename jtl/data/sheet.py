"""A derived column on its way to a file: written in a hidden folder, renamed when it is whole."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jtl.data.store import FORMAT, INDEX, NEW, Column, Store, Unwritable, find, lock, make_room


class Sheet(NamedTuple):
    """A column while it is written.

    Attributes:
        folder: hidden, with a file for each bucket.
        files: open and locked.
        shapes: of each bucket's array.
        dtype: of all of them.
        sums: checksum of each file's values so far.
    """

    folder: pathlib.Path
    files: tuple[BinaryIO, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: np.dtype
    sums: list[int]


@contextlib.contextmanager
def writing(store: Store, shapes: Sequence[tuple[int, ...]], dtype: Any) -> Iterator[Sheet]:
    """Make room for a column and give the sheet to write it on; unfinished, it is removed.

    Raises:
        Unwritable: there is no room, or no right to write.
    """
    shapes, dtype = tuple(shapes), np.dtype(dtype)
    with _safely(store), contextlib.ExitStack() as stack:
        make_room(store, sum(int(np.prod(shape)) for shape in shapes) * dtype.itemsize)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=NEW, dir=store.place))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        files = []
        for bucket, shape in enumerate(shapes):
            file = stack.enter_context(open(folder / f"{bucket}.npy", "wb"))
            lock(file)
            _write_header(file, shape, dtype)
            files.append(file)
        undo = stack.pop_all()
    with undo:
        yield Sheet(folder, tuple(files), shapes, dtype, [0] * len(shapes))


def append(store: Store, sheet: Sheet, bucket: int, values: np.ndarray) -> None:
    """Write the next rows of a bucket.

    Raises:
        Unwritable: the disk is full.
    """
    raw = np.ascontiguousarray(values, sheet.dtype).reshape(-1).view(np.uint8).data
    sheet.sums[bucket] = zlib.crc32(raw, sheet.sums[bucket])
    with _safely(store):
        sheet.files[bucket].write(raw)


def finish(store: Store, sheet: Sheet, key: str | None) -> Column:
    """Publish a whole column and return it, mapped; where another run was first, return its own.

    Without a key it is this run's alone, and later runs remove it.

    Raises:
        Unwritable: the disk is full, or does not give back what was written.
    """
    parts = [
        {"shape": list(shape), "dtype": sheet.dtype.name, "crc32": total}
        for shape, total in zip(sheet.shapes, sheet.sums, strict=True)
    ]
    with _safely(store):
        for file in sheet.files:
            file.flush()
        index = {"format": FORMAT, "parts": parts}
        (sheet.folder / INDEX).write_text(json.dumps(index))
        name = key or f"{NEW}{sheet.folder.name.removeprefix(NEW)}-whole"
        with contextlib.suppress(OSError):  # another run was first
            os.rename(sheet.folder, store.place / name)
    column = find(store, name, check=False)
    if column is None:
        raise Unwritable(f"what was written to {store.place / name} cannot be read")
    return column


def keep(store: Store, column: Column, key: str) -> None:
    """Write a column that lies in memory, for later runs.

    Raises:
        Unwritable: there is no room, or no right to write.
    """
    with writing(store, [array.shape for array in column], column[0].dtype) as sheet:
        for bucket, array in enumerate(column):
            append(store, sheet, bucket, array)
        finish(store, sheet, key)


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
    # .npy has no name for bfloat16: its bits are written as whole numbers.
    plain = dtype if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}")
    descr = np.lib.format.dtype_to_descr(plain)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


@contextlib.contextmanager
def _safely(store: Store) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unwritable(f"{store.place} cannot be written ({error})") from error
