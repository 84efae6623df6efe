"""Buckets of relative places as DeBERTa v2 has them: signed, exact when near, logarithmic when far.

Reference: He et al. 2021, arXiv:2006.03654, and the published code of DeBERTa v2.
"""

import numpy as np


def log_buckets(distance: np.ndarray, *, buckets: int, farthest: int) -> np.ndarray:
    """Return the bucket of each signed distance, odd in it: near ones are their own bucket.

    Distances up to `buckets // 2` stand for themselves; farther ones share the buckets up to
    `buckets - 1`, which the distance `farthest - 1` has. Beyond it the numbers grow on: clip them.

    Args:
        distance: query - key.
        buckets: on each side.
        farthest: number of distances that the table was made for.

    >>> log_buckets(np.array([-15, -3, 0, 4, 7, 15]), buckets=8, farthest=16).tolist()
    [-7, -3, 0, 4, 6, 7]
    """
    middle = buckets // 2
    far = np.maximum(np.abs(distance), middle)
    # In float32: where a bucket ends hangs on the rounding that the weights were trained with.
    ratio = np.log(far.astype(np.float32) / np.float32(middle)) / np.log(
        np.float32((farthest - 1) / middle)
    )
    wide = np.ceil(ratio * np.float32(middle - 1)).astype(np.int32) + middle
    return np.where(np.abs(distance) <= middle, distance, wide * np.sign(distance)).astype(np.int32)
