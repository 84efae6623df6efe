"""Batches of one fixed size in a seeded order; seed and step alone say which rows a batch has."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jtl.data.dataset import Dataset
from jtl.data.threads import ahead

Batch = dict[str, np.ndarray]

_ADDED = {"mask": np.bool_, "index": np.int32}


def plan(
    dataset: Dataset, size: int, *, seed: int = 0, epoch: int = 0, shuffle: bool = True
) -> list[np.ndarray]:
    """Return the rows of each batch of an epoch: every row once, one bucket a batch.

    Each bucket's last batch may be short. The same arguments give the same plan.

    Args:
        dataset: gives the bucket of each row.
        size: rows of a full batch.
        seed: of the order.
        epoch: each has its own order.
        shuffle: False keeps the order of the rows, shorter buckets first.

    Raises:
        ValueError: `size` is less than one, or, in training order, more than the dataset.
    """
    _check_size(dataset, size, shuffle)
    rng = np.random.default_rng([seed, epoch])
    chunks: list[np.ndarray] = []
    for bucket in range(len(dataset.parts)):
        rows = np.flatnonzero(dataset.bucket == bucket)
        rows = rng.permutation(rows) if shuffle else rows
        chunks += [rows[i : i + size] for i in range(0, len(rows), size)]
    return [chunks[i] for i in rng.permutation(len(chunks))] if shuffle else chunks


def steps_per_epoch(dataset: Dataset, size: int) -> int:
    """Return the number of batches in which every row comes once.

    Raises:
        ValueError: `size` is less than one.
    """
    _check_size(dataset, size, shuffle=False)
    rows = np.bincount(dataset.bucket, minlength=len(dataset.parts))
    return int(np.sum(-(-rows // size)))


def batches(
    dataset: Dataset,
    size: int,
    *,
    seed: int = 0,
    start: int = 0,
    stop: int | None = None,
    shuffle: bool = True,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Return an iterator over the batches of steps `start`, `start + 1`, ..., epoch after epoch.

    A batch has the dataset's columns and "label", "mask" (False in padding rows, which repeat the
    batch's first row) and "index" (row of the dataset, -1 in padding rows), `size` rows of each.

    Args:
        dataset: encoded examples.
        size: rows of a batch.
        seed: of the order; the batch of a step depends on seed and step alone.
        start: the first step, to go on where a run has stopped.
        stop: the step before which to end; None never ends.
        shuffle: False gives the rows in order, for evaluation.
        prefetch: batches made ahead by threads where images are read; rows in memory and in mapped
            files need none (threads there made an epoch slower, cold files too).

    Raises:
        ValueError: `size` is less than one, or, in training order, more than the dataset.
    """
    _check_size(dataset, size, shuffle)
    steps = steps_per_epoch(dataset, size)

    @functools.lru_cache(maxsize=2)
    def planned(epoch: int) -> list[np.ndarray]:
        return plan(dataset, size, seed=seed, epoch=epoch, shuffle=shuffle)

    def make(step: int) -> Batch:
        return assemble(dataset, planned(step // steps)[step % steps], size)

    if dataset.read is not None:
        return ahead(make, start, stop, prefetch=prefetch)
    return map(make, itertools.count(start) if stop is None else range(start, stop))


def assembled(
    dataset: Dataset, steps: Sequence[np.ndarray], size: int, *, prefetch: int = 2
) -> Iterator[Batch]:
    """Return an iterator over the batches of these rows; as `plan` gives them, one bucket each."""

    def make(step: int) -> Batch:
        return assemble(dataset, steps[step], size)

    if dataset.read is not None:
        return ahead(make, 0, len(steps), prefetch=prefetch)
    return map(make, range(len(steps)))


def assemble(dataset: Dataset, rows: np.ndarray, size: int) -> Batch:
    """Return the batch of rows of one bucket, padded to `size` rows."""
    short = size - len(rows)
    filled = np.concatenate([rows, np.repeat(rows[:1], short)]) if short else rows
    if dataset.read is None:
        columns = dataset.columns(filled)
    else:  # a padding row is copied, not decoded again
        columns = {name: _padded(value, short) for name, value in dataset.columns(rows).items()}
    mask = np.arange(size) < len(rows)
    index = np.where(mask, filled, -1).astype(np.int32)
    return {**columns, "label": dataset.labels[filled], "mask": mask, "index": index}


def row_shapes(dataset: Dataset, size: int) -> list[dict[str, Any]]:
    """Return the columns of `size` rows in each bucket that has rows, as `jax.ShapeDtypeStruct`.

    Label, mask and index are not among them. Nothing is computed; where images are read, one is.
    """
    found = []
    for bucket in range(len(dataset.parts)):
        rows = np.flatnonzero(dataset.bucket == bucket)[:1]
        columns = dataset.columns(rows) if len(rows) else {}
        if columns:
            found.append({name: _shape(size, value) for name, value in columns.items()})
    return found


def batch_shapes(dataset: Dataset, size: int) -> list[dict[str, Any]]:
    """Return the shapes of the batches of `size` rows, one for each bucket that has rows."""
    label = _shape(size, dataset.labels)
    more = {name: _shape(size, np.empty(0, kind)) for name, kind in _ADDED.items()}
    return [{**columns, "label": label, **more} for columns in row_shapes(dataset, size)]


def check_finite(batch: Mapping[str, Any]) -> None:
    """Refuse a batch that has NaN or infinity in a real row of a floating column.

    Raises:
        ValueError: it names the column and the rows of the dataset.

    >>> check_finite({"label": np.array([0.5, np.nan]), "mask": np.array([True, False])})
    """
    for name, column in batch.items():
        values = np.asarray(column)
        if values.dtype.kind in "biuOSU":
            continue
        bad = ~np.isfinite(values.astype(np.float32)).reshape(len(values), -1).all(axis=1)
        bad &= np.asarray(batch.get("mask", np.ones(len(values), bool)))
        if bad.any():
            rows = np.asarray(batch.get("index", np.arange(len(values))))[bad].tolist()
            raise ValueError(
                f"column {name!r} has values that are not finite in {len(rows)} of {len(values)} "
                f"rows of the batch: rows {rows[:8]} of the dataset; drop or repair these examples"
            )


def _shape(size: int, values: np.ndarray) -> Any:
    """Return the shape of `size` such rows, of the dtype that a jitted function sees."""
    import jax

    dtype = jax.dtypes.canonicalize_dtype(values.dtype)
    return jax.ShapeDtypeStruct((size, *values.shape[1:]), dtype)


def _padded(values: np.ndarray, short: int) -> np.ndarray:
    return np.concatenate([values, np.repeat(values[:1], short, axis=0)]) if short else values


def _check_size(dataset: Dataset, size: int, shuffle: bool) -> None:
    if size < 1:
        raise ValueError(f"a batch of {size} rows is asked for; give at least 1")
    if shuffle and size > dataset.size:
        raise ValueError(
            f"a batch of {size} rows is larger than the data: {dataset.name} has {dataset.size}; "
            "take a smaller batch or more data"
        )
