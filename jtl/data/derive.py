"""Derived columns: what depends on held parameters and the example alone is computed once."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jtl.data.batches import assemble, plan
from jtl.data.dataset import Dataset
from jtl.near import listed

BUDGET_BYTES = 2**30

_LOG = logging.getLogger(__name__)


def derive(
    dataset: Dataset,
    size: int,
    compute: Callable[[dict[str, np.ndarray]], Mapping[str, Any]],
    *,
    names: Sequence[str],
    replace: bool = False,
    budget_bytes: int = BUDGET_BYTES,
) -> Dataset | None:
    """Return the dataset with the columns that `compute` gives, in memory.

    Its plans are those of the dataset itself, so a phase that reads the columns sees the same
    examples in the same batches.

    Args:
        dataset: encoded examples.
        size: rows of a batch while computing.
        compute: `batch -> {name: (size, ...)}`, the value of a row from that row alone; in
            evaluation mode, or the column would hold dropout's noise.
        names: of the columns.
        replace: whether raw columns are dropped; see `Dataset.only` for what stays.
        budget_bytes: of all columns together; beyond it nothing is computed but the first batch of
            each bucket.

    Returns:
        The dataset, or None where the columns exceed the budget; the reason is logged.

    Raises:
        ValueError: `compute` lacks a name, or gives a column of another number of rows.
    """
    steps = plan(dataset, size, shuffle=False)
    first, rest = _firsts(dataset, steps)
    done = [_computed(dataset, rows, size, compute, names) for rows in first]
    needed = _bytes(dataset, first, done)
    if needed > budget_bytes:
        _LOG.info(
            "columns %s of %s would take %.1f MiB, the budget is %.1f MiB: not derived",
            *(list(names), dataset.name, needed / 2**20, budget_bytes / 2**20),
        )
        return None
    counts = np.bincount(dataset.bucket, minlength=len(dataset.parts))
    # A bucket without a row has its columns too, of no rows.
    columns = [{name: value[:0] for name, value in done[0].items()} for _ in dataset.parts]
    for rows, values in zip(first, done, strict=True):
        bucket = int(dataset.bucket[rows[0]])
        columns[bucket] = {
            name: np.empty((counts[bucket], *value.shape[1:]), value.dtype)
            for name, value in values.items()
        }
        _write(dataset, columns, rows, values)
    for rows in rest:
        _write(dataset, columns, rows, _computed(dataset, rows, size, compute, names))
    parts = tuple({**part, **new} for part, new in zip(dataset.parts, columns, strict=True))
    kept = tuple(dict.fromkeys((*dataset.derived, *names)))
    whole = dataclasses.replace(dataset, parts=parts, derived=kept)
    return whole.only(*names) if replace else whole


def _firsts(dataset: Dataset, steps: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Split the batches into the first of each bucket and the others."""
    seen: set[int] = set()
    first, rest = [], []
    for rows in steps:
        bucket = int(dataset.bucket[rows[0]])
        (rest if bucket in seen else first).append(rows)
        seen.add(bucket)
    return first, rest


def _computed(
    dataset: Dataset, rows: np.ndarray, size: int, compute: Any, names: Sequence[str]
) -> dict[str, np.ndarray]:
    given = compute(assemble(dataset, rows, size))
    absent = [name for name in names if name not in given]
    if absent:
        raise ValueError(
            f"compute gives no column {listed(absent)}; it gives {sorted(given)}; "
            "return every column of names="
        )
    values = {name: np.asarray(given[name]) for name in names}
    wrong = {name: value.shape for name, value in values.items() if value.shape[:1] != (size,)}
    if wrong:
        raise ValueError(
            f"computed columns have the shapes {wrong}; a batch has {size} rows; "
            "return one row for each row of the batch"
        )
    return {name: value[: len(rows)] for name, value in values.items()}


def _bytes(dataset: Dataset, first: list[np.ndarray], done: list[dict[str, np.ndarray]]) -> int:
    counts = np.bincount(dataset.bucket, minlength=len(dataset.parts))
    return sum(
        int(counts[dataset.bucket[rows[0]]]) * value[:1].nbytes
        for rows, values in zip(first, done, strict=True)
        for value in values.values()
    )


def _write(
    dataset: Dataset,
    columns: list[dict[str, np.ndarray]],
    rows: np.ndarray,
    values: Mapping[str, np.ndarray],
) -> None:
    bucket, position = int(dataset.bucket[rows[0]]), dataset.position[rows]
    for name, value in values.items():
        columns[bucket][name][position] = value
