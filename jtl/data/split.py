"""A seeded split of one source into parts that share no example."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jtl.data.sources import Source


def split(
    source: Source, sizes: Mapping[str, int], *, seed: int, stratify: bool = False
) -> dict[str, Source]:
    """Return parts of the given sizes; copies of one input are kept once, so none crosses parts.

    The rows of the last part do not depend on the sizes of the others, and a smaller "train" named
    first is the beginning of a larger one: learning curves share their validation and test rows.

    Args:
        source: all examples.
        sizes: {name: number of examples}.
        seed: of the order.
        stratify: whether every part has the classes in the proportions of the whole.

    Raises:
        ValueError: there are too few distinct examples, a part is empty, a class is absent from
            "train", or a regression is to be stratified.

    >>> from jtl.data import from_arrays
    >>> source = from_arrays({"text": ["a", "b", "a", "c"], "label": [0.0, 1.0, 0.0, 2.0]})
    >>> parts = split(source, {"train": 2, "test": 1}, seed=0)
    >>> sorted(parts["train"].columns["text"] + parts["test"].columns["text"])
    ['a', 'b', 'c']
    """
    distinct = _distinct(source)
    _check_sizes(source, sizes, len(distinct))
    order = _order(source, distinct, seed, stratify)
    parts, start = {}, 0
    for name in reversed(list(sizes)):
        parts[name] = source.take(order[start : start + sizes[name]])
        start += sizes[name]
    if "train" in parts:
        _check_classes(parts["train"])
    return {name: parts[name] for name in sizes}


def _distinct(source: Source) -> np.ndarray:
    """Return the rows of the first copy of every input."""
    first: dict[Any, int] = {}
    for row, value in enumerate(source.columns[source.modality]):
        first.setdefault(_identity(value), row)
    return np.fromiter(first.values(), np.int64)


def _identity(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, Path):
        value = value.read_bytes()
    if isinstance(value, tuple):  # a recording and its rate
        return tuple(_identity(part) for part in value)
    if isinstance(value, bytes):
        return hashlib.blake2b(value, digest_size=16).digest()
    array = np.ascontiguousarray(value)
    return array.shape, hashlib.blake2b(array.tobytes(), digest_size=16).digest()


def _check_sizes(source: Source, sizes: Mapping[str, int], rows: int) -> None:
    empty = [name for name, size in sizes.items() if size < 1]
    if empty or not sizes:
        raise ValueError(
            f"parts {empty} of {source.name} would be empty; sizes are {dict(sizes)}; "
            "give every part at least one example"
        )
    if sum(sizes.values()) > rows:
        raise ValueError(
            f"{source.name} has {rows} distinct examples ({source.size} rows); "
            f"{dict(sizes)} ask for {sum(sizes.values())}; take smaller parts or more data"
        )


def _order(source: Source, rows: np.ndarray, seed: int, stratify: bool) -> np.ndarray:
    rows = np.random.default_rng(seed).permutation(rows)
    if not stratify:
        return rows
    if source.classes is None:
        raise ValueError(
            f"{source.name} has numbers for labels; only classes can be stratified; "
            "leave stratify out"
        )
    # The k-th of n_c examples of a class stands at (k + 1/2) / n_c: every stretch has its share.
    labels = source.columns["label"][rows]
    place = np.empty(len(rows))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return rows[np.argsort(place, kind="stable")]


def _check_classes(train: Source) -> None:
    if train.classes is None:
        return
    counts = np.bincount(train.columns["label"], minlength=len(train.classes))
    absent = [train.classes[i] for i in np.flatnonzero(counts == 0)]
    if absent:
        there = dict(zip(train.classes, counts.tolist(), strict=True))
        raise ValueError(
            f"the training part of {train.name} has no example of {absent}; it has {there}; "
            "take more rows, another seed, or stratify=True"
        )
