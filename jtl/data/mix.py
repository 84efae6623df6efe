"""Batches in which a fixed number of rows comes from each of several datasets.

The task's own rows come first, then those of each stream. An epoch is one of the task's own rows; a
stream goes round and round in an order of its own, so a small one repeats and shapes never change.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jtl.data.batches import Batch, assemble, plan, steps_per_epoch
from jtl.data.dataset import Dataset
from jtl.data.threads import ahead

WINDOW = 16  # batches of a stream among which its rows are sorted by length, for less padding


class _Piece(NamedTuple):
    """Rows of one bucket: number of their stream, padded length, columns and the derived ones."""

    number: int
    length: int
    columns: Mapping[str, np.ndarray]
    derived: tuple[str, ...]


def split_rows(size: int, shares: Sequence[int | float]) -> tuple[int, ...]:
    """Return how many rows of a batch are the task's own, and how many each stream's.

    Args:
        size: rows of the whole batch.
        shares: for each stream rows, or, below 1, a share of the batch, which is one row at least.

    Raises:
        ValueError: a share is not above 0, rows are not whole, or none are left for the task.

    >>> split_rows(32, [0.25, 3])
    (21, 8, 3)
    """
    bad = [share for share in shares if share <= 0 or (share >= 1 and share != int(share))]
    if bad:
        raise ValueError(
            f"streams take {list(shares)} rows of a batch, and {bad[0]} is no number of rows; give "
            "whole rows from 1 up, or a share of the batch between 0 and 1"
        )
    rows = [max(1, round(share * size)) if share < 1 else int(share) for share in shares]
    if sum(rows) >= size:
        raise ValueError(
            f"streams take {sum(rows)} rows of a batch of {size}, which leaves the task none; "
            "give the streams fewer rows, or take a larger batch"
        )
    return (size - sum(rows), *rows)


def mixed_batches(
    dataset: Dataset,
    streams: Sequence[tuple[Dataset, int]],
    size: int,
    *,
    seed: int = 0,
    start: int = 0,
    stop: int | None = None,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Return an iterator over the batches of steps `start`, `start + 1`, ..., epoch after epoch.

    Beside what `batches` gives there is an int32 column "stream": 0 in the task's own rows, k in
    those of the k-th stream, whose "index" is -1. A column that a stream lacks is zeros there. A
    label of another dtype or shape than the task's is in the column "label/k" instead. Texts are
    padded to the longest of the batch, rounded up to a length that the task's own batches have.

    Args:
        dataset: of the task.
        streams: (dataset, rows of each batch).
        size: rows of the whole batch.
        seed: of all orders; the batch of a step depends on seed and step alone.
        start: the first step.
        stop: the step before which to end; None never ends.
        prefetch: batches made ahead by threads where images are read.

    Raises:
        ValueError: no rows are left for the task, it has fewer than its rows of a batch, a stream
            is empty, or a column has other shapes in two datasets.
    """
    own = split_rows(size, [rows for _, rows in streams])[0]
    steps = steps_per_epoch(dataset, own)
    orders = [make_order(d, rows, seed=(seed, k)) for k, (d, rows) in enumerate(streams, 1)]
    lengths = _lengths([dataset, *(stream for stream, _ in streams)])

    @functools.lru_cache(maxsize=2)
    def planned(epoch: int) -> list[np.ndarray]:
        return plan(dataset, own, seed=seed, epoch=epoch)

    def make(step: int) -> Batch:
        rows = planned(step // steps)[step % steps]
        length = dataset.buckets[dataset.bucket[rows[0]]]
        pieces = [_Piece(0, length, assemble(dataset, rows, own), dataset.derived)]
        for k, ((stream, _), order) in enumerate(zip(streams, orders, strict=True), 1):
            pieces += _pieces(k, stream, order(step))
        return _joined(pieces, _rounded(lengths, max(piece.length for piece in pieces)))

    planned(start // steps)  # refuses a batch larger than the data at once
    if any(d.read is not None for d in (dataset, *(stream for stream, _ in streams))):
        return ahead(make, start, stop, prefetch=prefetch)
    return map(make, itertools.count(start) if stop is None else range(start, stop))


def mixed_shapes(
    datasets: Sequence[Dataset], shapes: Sequence[Sequence[Mapping[str, Any]]], size: int
) -> list[dict[str, Any]]:
    """Return the shapes of mixed batches of `size` rows, one for each length that may come.

    Args:
        datasets: of the task, then of each stream; their lengths and derived columns are read.
        shapes: for each of them those of `batch_shapes`, one for each bucket that has rows.
        size: rows of the whole batch, or those of one process.
    """
    lengths, used = _lengths(datasets), [_used(dataset) for dataset in datasets]
    least = max(min(lengths_of) for lengths_of in used[1:])
    longer = {length for lengths_of in used[1:] for length in lengths_of if length >= least}
    found: dict[int, dict[str, Any]] = {}
    for first, own in zip(used[0], shapes[0], strict=True):
        shortest = [
            (first, own),
            *((u[0], s[0]) for u, s in zip(used[1:], shapes[1:], strict=True)),
        ]
        pieces = [
            _Piece(k, length, _stand_ins(columns), dataset.derived)
            for k, ((length, columns), dataset) in enumerate(zip(shortest, datasets, strict=True))
        ]
        for length in {_rounded(lengths, max(first, other)) for other in longer} - found.keys():
            found[length] = _with_rows(_joined(pieces, length), size)
    return [found[length] for length in sorted(found)]


def _stand_ins(shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.zeros((1, *shape.shape[1:]), shape.dtype) for name, shape in shapes.items()}


def _with_rows(batch: Batch, size: int) -> dict[str, Any]:
    import jax

    return {
        name: jax.ShapeDtypeStruct((size, *column.shape[1:]), column.dtype)
        for name, column in batch.items()
    }


def make_order(
    dataset: Dataset, rows: int, *, seed: Sequence[int] = (0,)
) -> Callable[[int], np.ndarray]:
    """Return `step -> (rows,)` rows of a stream: round after round, each row once in a round.

    Among 16 steps rows are sorted by their bucket, so that a batch has few lengths; the order of
    these steps is shuffled.

    Args:
        dataset: gives the number of rows and their buckets.
        rows: of a batch; a dataset with fewer repeats them.
        seed: whole numbers; the rows of a step depend on these and the step alone.

    Raises:
        ValueError: the dataset is empty.
    """
    if not dataset.size:
        raise ValueError(
            f"the stream {dataset.name} has 0 examples; {rows} rows of each batch are to be its; "
            "give it some, or leave the stream out"
        )
    first, *last = seed

    @functools.lru_cache(maxsize=2)
    def round_of(number: int) -> np.ndarray:
        return np.random.default_rng([first, number, *last]).permutation(dataset.size)

    @functools.lru_cache(maxsize=2)
    def window(number: int) -> np.ndarray:
        places = np.arange(number * WINDOW * rows, (number + 1) * WINDOW * rows)
        rounds = range(places[0] // dataset.size, places[-1] // dataset.size + 1)
        chosen = np.concatenate([round_of(q) for q in rounds])
        chosen = chosen[places - rounds[0] * dataset.size]
        if len(dataset.parts) == 1:
            return chosen.reshape(WINDOW, rows)
        chosen = chosen[np.argsort(dataset.bucket[chosen], kind="stable")]
        shuffled = np.random.default_rng([first, number, *last, 1])
        return shuffled.permutation(chosen.reshape(WINDOW, rows))

    return lambda step: window(step // WINDOW)[step % WINDOW]


def _pieces(number: int, dataset: Dataset, rows: np.ndarray) -> list[_Piece]:
    """Return rows of a stream, which are sorted by bucket, in one piece for each bucket."""
    found = []
    for bucket in np.unique(dataset.bucket[rows]).tolist():
        chosen = rows[dataset.bucket[rows] == bucket]
        columns = assemble(dataset, chosen, len(chosen))
        columns["index"] = np.full(len(chosen), -1, np.int32)
        found.append(_Piece(number, dataset.buckets[bucket], columns, dataset.derived))
    return found


def _joined(pieces: Sequence[_Piece], length: int) -> Batch:
    """Return the pieces as one batch, padded to a length, zeros where one lacks a column."""
    label = pieces[0].columns["label"]
    parts = [_widened(piece, length, label) for piece in pieces]
    like = {name: column for part in reversed(parts) for name, column in part.items()}
    for name in like:
        _check_alike(name, [part[name] for part in parts if name in part])
    sizes = [len(piece.columns["label"]) for piece in pieces]
    batch = {
        name: np.concatenate(
            [
                part[name] if name in part else np.zeros((n, *column.shape[1:]), column.dtype)
                for part, n in zip(parts, sizes, strict=True)
            ]
        )
        for name, column in like.items()
    }
    numbers = np.asarray([piece.number for piece in pieces], np.int32)
    return {**batch, "stream": np.repeat(numbers, sizes)}


def _check_alike(name: str, columns: Sequence[np.ndarray]) -> None:
    first = columns[0]
    if any((x.shape[1:], x.dtype) != (first.shape[1:], first.dtype) for x in columns[1:]):
        there = sorted({(column.shape[1:], str(column.dtype)) for column in columns})
        raise ValueError(
            f"column {name!r} differs between the task's data and its streams; there are {there}; "
            "encode all with the inputs of the one backbone"
        )


def _widened(piece: _Piece, length: int, label: np.ndarray) -> dict[str, np.ndarray]:
    """Return a piece's columns padded with zeros to a length, its label under the right name."""
    columns, own = dict(piece.columns), piece.columns["label"]
    if (own.dtype, own.shape[1:]) != (label.dtype, label.shape[1:]):
        columns[f"label/{piece.number}"] = columns.pop("label")
    more = length - piece.length
    for name, column in columns.items() if more else ():
        ids = column.ndim == 2 and column.dtype.kind == "i" and name not in piece.derived
        if (ids or column.ndim >= 3) and column.shape[1] == piece.length:
            pads = [(0, 0), (0, more), *[(0, 0)] * (column.ndim - 2)]
            columns[name] = np.pad(column, pads)
    return columns


def _used(dataset: Dataset) -> list[int]:
    """Return the padded lengths of the buckets that have rows."""
    return [dataset.buckets[bucket] for bucket in np.unique(dataset.bucket).tolist()]


def _lengths(datasets: Sequence[Dataset]) -> list[int]:
    """Return the lengths of mixed batches: the task's own, and one for streams longer than all."""
    own, *others = (_used(dataset) for dataset in datasets)
    longest = max((length for used in others for length in used), default=0)
    return sorted({*own, *([longest] if longest > max(own) else [])})


def _rounded(lengths: Sequence[int], needed: int) -> int:
    return next(length for length in lengths if length >= needed)
