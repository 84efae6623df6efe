"""Buckets of relative places as T5 has them: exact when near, ever wider when far.

Reference: Raffel et al. 2020, arXiv:1910.10683, section 2.1.
"""

import math

import numpy as np


def relative_buckets(
    offset: np.ndarray, *, buckets: int, farthest: int, both_ways: bool
) -> np.ndarray:
    """Return the bucket of each offset from query to key, whole numbers below `buckets`.

    One half of the buckets has one offset each, the other half grows with its logarithm up to
    `farthest`; what is beyond falls into the last one.

    Args:
        offset: key - query.
        buckets: in all; with `both_ways`, the upper half of them is for keys after the query.
        farthest: distance from which on all is one bucket.
        both_ways: False puts every key after the query into bucket 0 (a causal stack masks them).

    >>> near = np.array([-20, -3, -1, 0, 1, 3, 20])
    >>> relative_buckets(near, buckets=8, farthest=16, both_ways=True).tolist()
    [3, 2, 1, 0, 5, 6, 7]
    >>> relative_buckets(near, buckets=8, farthest=16, both_ways=False).tolist()
    [7, 3, 1, 0, 0, 0, 0]
    """
    first = np.zeros(offset.shape, np.int32)
    if both_ways:
        buckets //= 2
        first = np.where(offset > 0, buckets, 0).astype(np.int32)
        distance = np.abs(offset)
    else:
        distance = np.maximum(-offset, 0)
    exact = buckets // 2
    # In float32: where a bucket ends hangs on the rounding that the weights were trained with.
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    growth = np.log(ratio) / np.float32(math.log(farthest / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + growth.astype(np.int32), buckets - 1)
    return (first + np.where(distance < exact, distance, far)).astype(np.int32)
