"""Intervals by the percentile bootstrap: Efron 1979, doi:10.1214/aos/1176344552."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Bool, Num

Values = Num[Array | np.ndarray, " n"] | Bool[Array | np.ndarray, " n"]


def bootstrap_interval(
    values: Values, *, level: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the interval that holds the mean of `values` in `level` of the resampled data sets.

    >>> low, high = bootstrap_interval(np.array([1.0] * 80 + [0.0] * 20))
    >>> 0.70 < low < 0.74 and 0.86 < high < 0.90  # 0.8 plus and minus 1.96 * 0.04
    True

    Args:
        values: one figure for each example, for instance 1.0 where it was predicted right.
        level: the share of resampled means inside.
        samples: number of data sets drawn with replacement.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        ValueError: no values, values that are not finite, or a level outside (0, 1).
    """
    rows = np.asarray(values, np.float64)
    if not len(rows) or not np.isfinite(rows).all():
        bad = np.flatnonzero(~np.isfinite(rows))[:6].tolist()
        raise ValueError(
            f"{len(rows)} values were given, not finite at rows {bad}; "
            "an interval needs at least one value, all finite"
        )
    if not 0.0 < level < 1.0 or samples < 1:
        raise ValueError(f"level {level}, samples {samples}; take 0 < level < 1 and samples >= 1")
    rng = np.random.default_rng(seed)
    means = [rows[rng.integers(0, len(rows), len(rows))].mean() for _ in range(samples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap(
    a: Values, b: Values, *, level: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of mean(a) - mean(b), where a and b are of the same examples.

    Resampling examples, not each side by itself, removes what both find hard: an interval above
    zero says that a is better.

    >>> paired_bootstrap(np.array([1.0, 0.0, 1.0]), np.array([0.5, -0.5, 0.5]))
    (0.5, 0.5)

    Raises:
        ValueError: a and b differ in length, and as `bootstrap_interval`.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"a has {len(a)} values and b has {len(b)}; give both on the same examples in one order"
        )
    return bootstrap_interval(a - b, level=level, samples=samples, seed=seed)


def resampled_interval(
    figure: Callable[[np.ndarray], float],
    rows: int,
    *,
    level: float = 0.95,
    samples: int = 500,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the interval of a figure that is no mean over examples, such as macro F1.

    >>> values = np.array([1.0] * 80 + [0.0] * 20)
    >>> low, high = resampled_interval(lambda rows: values[rows].mean(), 100, samples=2000)
    >>> 0.70 < low < 0.74 and 0.86 < high < 0.90  # 0.8 plus and minus 1.96 * 0.04
    True

    Args:
        figure: `rows -> figure` of the examples at these rows, some of them more than once. For a
            paired difference, the figure of one side minus that of the other.
        rows: number of examples.
        level: the share of resampled figures inside.
        samples: number of data sets drawn with replacement.
        seed: of the draws.

    Raises:
        ValueError: no rows, no samples, or a level outside (0, 1).
    """
    if rows < 1 or not 0.0 < level < 1.0 or samples < 1:
        raise ValueError(
            f"{rows} rows, level {level}, samples {samples}; take at least one row and one sample, "
            "and 0 < level < 1"
        )
    rng = np.random.default_rng(seed)
    drawn = [figure(rng.integers(0, rows, rows)) for _ in range(samples)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
