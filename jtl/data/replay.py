"""Which examples of a task are kept to be trained on again: three ways to choose, and joining.

Each returns row numbers in an order of which any beginning is chosen in the same way, so a memory
is made smaller by cutting it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jtl.data.dataset import Dataset
from jtl.data.fingerprint import fingerprint


def reservoir(seen: int, size: int, *, seed: int) -> np.ndarray:
    """Return `size` of `seen` rows, met one after the other; each has the same chance, size / seen.

    Row i >= size takes the place of a kept one with probability size / (i + 1).

    Args:
        seen: rows met.
        size: rows kept; all where fewer were met.
        seed: of the choice.

    Reference: Vitter 1985, Random sampling with a reservoir, algorithm R.

    >>> sorted(reservoir(3, 5, seed=0).tolist())
    [0, 1, 2]
    """
    _check_size(size)
    rng = np.random.default_rng(seed)
    kept = np.arange(min(seen, size))
    later = np.arange(len(kept), seen)
    places = rng.integers(0, later + 1)
    for row, place in zip(later[places < size], places[places < size], strict=True):
        kept[place] = row
    return rng.permutation(kept)  # the places are not alike: row 1 is never in the first


def class_balanced(labels: Int[np.ndarray, " n"], size: int, *, seed: int) -> np.ndarray:
    """Return `size` rows, at random in each class, as many of each class as there can be.

    Args:
        labels: class of each row.
        size: rows kept; all where there are fewer.
        seed: of the choice.

    >>> labels = np.array([0, 0, 0, 0, 1])
    >>> labels[class_balanced(labels, 3, seed=0)].tolist()
    [0, 1, 0]
    """
    _check_size(size)
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    return _in_turn(rows, size)


def herding(
    features: Float[np.ndarray, "n dim"], labels: Int[np.ndarray, " n"], size: int
) -> np.ndarray:
    """Return `size` rows whose mean follows that of their class, as many of each class as can be.

    Of a class with mean m the k-th row is, of those not chosen yet, the one with the least

        |m - (x + sum of the chosen) / k|

    Args:
        features: those of the paper have length 1.
        labels: class of each row.
        size: rows kept; all where there are fewer.

    Reference: Rebuffi et al. 2017, iCaRL, arXiv:1611.07725, algorithm 4.

    >>> herding(np.array([[0.0], [4.0], [5.0]]), np.array([0, 0, 0]), 2).tolist()  # mean 3
    [1, 0]
    """
    _check_size(size)
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    kept = labels[_in_turn(rows, size)]  # which class has how many
    chosen = [r[_herded(features[r], int(np.sum(kept == labels[r[0]])))] for r in rows]
    return _in_turn(chosen, size)


def join(datasets: Sequence[Dataset], *, name: str = "replay") -> Dataset:
    """Return the rows of several datasets as one: raw columns only, labels float where they differ.

    Args:
        datasets: encoded for one backbone.
        name: of the new one.

    Raises:
        ValueError: their raw columns are not the same.
    """
    buckets = tuple(sorted({length for dataset in datasets for length in dataset.buckets}))
    own = [np.searchsorted(buckets, dataset.buckets).astype(np.int32) for dataset in datasets]
    bucket = np.concatenate([b[dataset.bucket] for b, dataset in zip(own, datasets, strict=True)])
    labels = np.concatenate([np.asarray(d.labels, _label_type(datasets)) for d in datasets])
    rest = {"bucket": bucket, "labels": labels, "classes": None, "buckets": buckets, "name": name}
    if any(dataset.read is not None for dataset in datasets):
        return Dataset(({},) * len(buckets), **rest, **_reading(datasets))
    parts: list[dict[str, np.ndarray]] = []
    for length in buckets:
        held = [_raw(d, d.buckets.index(length)) for d in datasets if length in d.buckets]
        _check_names([set(part) for part in held], name)
        parts.append({n: np.concatenate([part[n] for part in held]) for n in held[0]})
    return Dataset(tuple(parts), **rest)


def _herded(features: np.ndarray, count: int) -> np.ndarray:
    features = np.asarray(features, np.float64)
    mean, total = features.mean(axis=0), np.zeros(features.shape[1])
    chosen: list[int] = []
    for k in range(1, count + 1):
        far = np.linalg.norm(mean[None] - (features + total[None]) / k, axis=1)
        far[chosen] = np.inf
        chosen.append(int(far.argmin()))
        total += features[chosen[-1]]
    return np.asarray(chosen, np.int64)


def _in_turn(rows: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Return the first row of each class, then the second of each, and so on, `size` in all."""
    turn = np.concatenate([np.arange(len(of_class)) for of_class in rows])
    return np.concatenate(rows)[np.argsort(turn, kind="stable")][:size]


def _raw(dataset: Dataset, bucket: int) -> dict[str, np.ndarray]:
    part = dataset.parts[bucket]
    return {name: column for name, column in part.items() if name not in dataset.derived}


def _label_type(datasets: Sequence[Dataset]) -> Any:
    kinds = {dataset.labels.dtype for dataset in datasets}
    return kinds.pop() if len(kinds) == 1 else np.float32


def _reading(datasets: Sequence[Dataset]) -> dict[str, Any]:
    """Return how the rows of several datasets are read, one of which is not in memory."""
    ends = np.cumsum([dataset.size for dataset in datasets])

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        owner = np.searchsorted(ends, rows, side="right")
        found = {}
        for number in np.unique(owner).tolist():
            dataset, where = datasets[number], np.flatnonzero(owner == number)
            values = dataset.columns(rows[where] - (ends[number] - dataset.size))
            found[number] = (where, _without(values, dataset.derived))
        _check_names([set(values) for _, values in found.values()], "replay")
        order = np.argsort(np.concatenate([where for where, _ in found.values()]))
        names = next(iter(found.values()))[1]
        return {n: np.concatenate([v[n] for _, v in found.values()])[order] for n in names}

    contents = [lambda d=dataset: d.contents for dataset in datasets]
    known = all(d.read is None or d.origin is not None for d in datasets)
    return {
        "read": read,
        "augmented": any(dataset.augmented for dataset in datasets),
        "origin": (lambda: fingerprint([content() for content in contents])) if known else None,
    }


def _without(columns: dict[str, np.ndarray], derived: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {name: column for name, column in columns.items() if name not in derived}


def _check_names(names: Sequence[set[str]], what: str) -> None:
    if any(other != names[0] for other in names):
        raise ValueError(
            f"the parts of {what} have the columns {[sorted(n) for n in names]}; "
            "encode all with the inputs of the one backbone"
        )


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"a memory of {size} examples is asked for; give at least 1")
