"""Length buckets: few padded lengths, so few compiled shapes, with the least padding."""

from typing import Any

import numpy as np


def choose_buckets(
    lengths: Any, count: int, *, multiple: int = 8, limit: int | None = None
) -> tuple[int, ...]:
    """Return at most `count` lengths that pad the fewest tokens in all.

    Minimises sum_i bucket(length_i) over all choices of lengths, where bucket(l) is the least
    chosen length that is at least l. Exact: dynamic programming over the distinct rounded lengths.

    Args:
        lengths: tokens of each example.
        count: of buckets.
        multiple: a bucket's length is a multiple of it.
        limit: no bucket is longer, whatever the multiple.

    Raises:
        ValueError: there are no lengths, or fewer than one bucket is asked for.

    >>> choose_buckets([5, 6, 7, 30], 2)
    (8, 32)
    """
    lengths = np.asarray(lengths)
    if count < 1 or multiple < 1 or not len(lengths):
        raise ValueError(
            f"{count} buckets of a multiple of {multiple} are asked for {len(lengths)} lengths; "
            "give at least one of each"
        )
    rounded = -(-np.maximum(lengths, 1) // multiple) * multiple
    rounded = np.minimum(rounded, limit) if limit else rounded
    sizes, rows = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(rows)])  # examples shorter than each size
    # cost[j], ends[j]: least padded tokens of the first j sizes, and their buckets, the last at j-1
    cost = [0.0] + [float("inf")] * len(sizes)
    ends: list[tuple[int, ...]] = [()] * (len(sizes) + 1)
    for _ in range(min(count, len(sizes))):
        table = [
            min((cost[i] + float(sizes[j] * (below[j + 1] - below[i])), i) for i in range(j + 1))
            for j in range(len(sizes))
        ]
        ends = [(), *((*ends[i], int(sizes[j])) for j, (_, i) in enumerate(table))]
        cost = [0.0, *(value for value, _ in table)]
    return ends[-1]


def bucket_of(lengths: Any, buckets: tuple[int, ...]) -> np.ndarray:
    """Return the position (n,) of the least bucket that holds each length.

    >>> bucket_of([5, 8, 9], (8, 32)).tolist()
    [0, 0, 1]
    """
    return np.searchsorted(np.asarray(buckets), np.asarray(lengths)).astype(np.int32)
