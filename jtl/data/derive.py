"""Derived columns: what depends on held parameters and the example alone is computed once.

They lie in memory, or beyond its budget in files, where a later run finds them; see `Store`.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jtl.data.batches import assembled, plan
from jtl.data.dataset import Dataset
from jtl.data.sheet import Sheet, append, finish, keep, writing
from jtl.data.store import Column, Store, Unwritable, find, fitting, left, track
from jtl.near import listed

Compute = Callable[[dict[str, np.ndarray]], Mapping[str, Any]]

_LOG = logging.getLogger(__name__)


def derive(
    dataset: Dataset,
    size: int,
    compute: Compute,
    *,
    names: Sequence[str],
    replace: bool = False,
    store: Store | None = None,
    keys: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset | None:
    """Return the dataset with the columns that `compute` gives.

    Its plans are those of the dataset itself, so a phase that reads the columns sees the same
    examples in the same batches, and the same bits wherever the columns lie.

    Args:
        dataset: encoded examples.
        size: rows of a batch while computing.
        compute: `batch -> {name: (size, ...)}`, the value of a row from that row alone; in
            evaluation mode, or the column would hold dropout's noise.
        names: of the columns.
        replace: whether raw columns are dropped; see `Dataset.only` for what stays.
        store: the budgets, and the folder of files; None is `Store()`, memory alone. Beyond the
            budgets nothing is computed but the first batch of each bucket.
        keys: {name: fingerprint of all that the column depends on}, by which files are shared; None
            shares none.
        progress: called with the rows done so far and all rows.

    Returns:
        The dataset, or None where neither budget suffices; a warning says why.

    Raises:
        ValueError: the dataset is augmented, or `compute` lacks a name or gives a column of another
            number of rows.
    """
    if not dataset.steady:
        raise ValueError(
            f"{dataset.name} is augmented: a row has other values each time it is read; a derived "
            "column would keep those of one reading; read raw batches, or switch augmentation off"
        )
    store, keys = store or Store(), keys or {}
    columns = {name: find(store, keys.get(name)) for name in names}
    columns = {name: column for name, column in columns.items() if column is not None}
    missing = [name for name in names if name not in columns]
    _reused(dataset, store, list(columns))
    if missing:
        job = _Job(dataset, size, compute, missing, store, keys, progress)
        computed = _computed(job)
        if computed is None:
            return None
        columns |= computed
    whole = with_columns(dataset, {name: columns[name] for name in names})
    return whole.only(*names) if replace else whole


def stored(dataset: Dataset, keys: Mapping[str, str], store: Store) -> Dataset:
    """Return the dataset with those of the columns that lie in finished files of the store.

    Args:
        dataset: encoded examples.
        keys: {name of a column: its fingerprint}.
        store: where to look.
    """
    found = {name: column for name, key in keys.items() if (column := find(store, key))}
    _reused(dataset, store, list(found))
    return with_columns(dataset, found)


def with_columns(dataset: Dataset, columns: Mapping[str, Column]) -> Dataset:
    """Return the dataset with derived columns: for each bucket an array with a row for each row."""
    parts = tuple(
        {**part, **{name: column[bucket] for name, column in columns.items()}}
        for bucket, part in enumerate(dataset.parts)
    )
    kept = tuple(dict.fromkeys((*dataset.derived, *columns)))
    return dataclasses.replace(dataset, parts=parts, derived=kept)


class _Job(NamedTuple):
    """What is to be computed, and where it may lie."""

    dataset: Dataset
    size: int
    compute: Compute
    names: Sequence[str]
    store: Store
    keys: Mapping[str, str]
    progress: Callable[[int, int], None] | None


def _computed(job: _Job) -> dict[str, Column] | None:
    """Return the columns, or None where there is no room for them."""
    began = time.perf_counter()
    first, rest = _firsts(job.dataset, plan(job.dataset, job.size, shuffle=False))
    done = list(_values(job, first))
    like = _shapes(job.dataset, done)
    sizes = {name: column_bytes(like[name]) for name in job.names}
    where = fitting(job.store, sizes)
    if len(where) < len(sizes):
        _refuse(job, sizes)
        return None
    try:
        columns = _filled(job, where, like, itertools.chain(done, _values(job, rest)))
    except Unwritable as error:
        _LOG.warning("columns %s of %s: %s: not derived", job.names, job.dataset.name, error)
        return None
    seconds = time.perf_counter() - began
    job.store.counts["derive_seconds"] += seconds
    if seconds > job.store.keep_seconds and job.store.disk_bytes > 0:
        _keep(job, {name: columns[name] for name in where if where[name] == "memory"})
    return columns


def _filled(
    job: _Job, where: Mapping[str, str], like: Mapping[str, Any], stream: Iterable[Any]
) -> dict[str, Column]:
    """Compute all rows, each column into arrays in memory or onto a sheet."""
    dataset, total, count = job.dataset, job.dataset.size, 0
    with contextlib.ExitStack() as stack:
        arrays = {
            name: tuple(np.empty(shape, dtype) for shape, dtype in like[name])
            for name in where
            if where[name] == "memory"
        }
        sheets: dict[str, Sheet] = {
            name: stack.enter_context(
                writing(job.store, [shape for shape, _ in like[name]], like[name][0][1])
            )
            for name in where
            if where[name] == "disk"
        }
        for rows, values in stream:
            bucket = int(dataset.bucket[rows[0]])
            for name, column in arrays.items():
                column[bucket][dataset.position[rows]] = values[name]
            for name, sheet in sheets.items():  # the rows of a bucket come in order
                append(job.store, sheet, bucket, values[name])
            count += len(rows)
            if job.progress is not None:
                job.progress(count, total)
        kept = {name: track(job.store, column) for name, column in arrays.items()}
        return kept | {n: finish(job.store, s, job.keys.get(n)) for n, s in sheets.items()}


def _keep(job: _Job, columns: Mapping[str, Column]) -> None:
    """Write columns that lie in memory for later runs, where there is a key and room."""
    for name, column in columns.items():
        if name in job.keys:
            try:
                keep(job.store, column, job.keys[name])
            except Unwritable as error:
                _LOG.info("%s of %s is not kept: %s", name, job.dataset.name, error)


def _reused(dataset: Dataset, store: Store, names: list[str]) -> None:
    if names:
        store.counts["reused"] += len(names)
        _LOG.info("columns %s of %s: reused from %s", names, dataset.name, store.place)


def _refuse(job: _Job, sizes: Mapping[str, int]) -> None:
    store = job.store
    _LOG.warning(
        "columns %s of %s would take %.1f MiB; the store has %.1f MiB of memory and %.1f MiB of "
        "disk left of budgets of %.1f and %.1f: not derived; raise one of the budgets",
        *(list(sizes), job.dataset.name, sum(sizes.values()) / 2**20),
        *(value / 2**20 for value in left(store)),
        *(store.memory_bytes / 2**20, store.disk_bytes / 2**20),
    )


def _firsts(dataset: Dataset, steps: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Split the batches into the first of each bucket and the others."""
    seen: set[int] = set()
    first, rest = [], []
    for rows in steps:
        bucket = int(dataset.bucket[rows[0]])
        (rest if bucket in seen else first).append(rows)
        seen.add(bucket)
    return first, rest


def _shapes(
    dataset: Dataset, done: list[tuple[np.ndarray, dict[str, np.ndarray]]]
) -> dict[str, list[tuple[tuple[int, ...], np.dtype]]]:
    """Return shape and dtype of each column in each bucket; a bucket may have no row."""
    counts = np.bincount(dataset.bucket, minlength=len(dataset.parts)).tolist()
    found = {int(dataset.bucket[rows[0]]): values for rows, values in done}
    anywhere = done[0][1]
    return {
        name: [
            ((count, *found.get(bucket, anywhere)[name].shape[1:]), anywhere[name].dtype)
            for bucket, count in enumerate(counts)
        ]
        for name in anywhere
    }


def column_bytes(parts: Iterable[tuple[tuple[int, ...], Any]]) -> int:
    """Return the bytes of a column, from the shape and dtype of each bucket's array.

    >>> column_bytes([((2, 3), np.float32), ((0, 5), np.float32)])
    24
    """
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in parts)


def _values(job: _Job, steps: list[np.ndarray]) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Yield rows and values of batch after batch; the next one is computed meanwhile."""
    waiting: list[tuple[np.ndarray, Mapping[str, Any]]] = []
    for rows, batch in zip(steps, assembled(job.dataset, steps, job.size), strict=True):
        waiting.append((rows, job.compute(batch)))  # jax returns before it is done
        if len(waiting) > 1:
            yield _checked(job, *waiting.pop(0))
    for rows, given in waiting:
        yield _checked(job, rows, given)


def _checked(
    job: _Job, rows: np.ndarray, given: Mapping[str, Any]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    absent = [name for name in job.names if name not in given]
    if absent:
        raise ValueError(
            f"compute gives no column {listed(absent)}; it gives {sorted(given)}; "
            "return every column of names="
        )
    values = {name: np.asarray(given[name]) for name in job.names}
    wrong = {name: value.shape for name, value in values.items() if value.shape[:1] != (job.size,)}
    if wrong:
        raise ValueError(
            f"computed columns have the shapes {wrong}; a batch has {job.size} rows; "
            "return one row for each row of the batch"
        )
    return rows, {name: value[: len(rows)] for name, value in values.items()}
