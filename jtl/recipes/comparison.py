"""What the ways of a continual run come to over seeds, as `result.json` holds it.

    runs.WAY    {matrix, average, backward_transfer, forward_transfer, forgetting, learning: means
                over seeds on the test splits; averages: mean over the tasks so far after each;
                spread: {FIGURE: standard deviation over seeds, null for one seed}, with
                averages too; values: {FIGURE: [one for each seed]};
                validation: {the same on the validation splits};
                seeds: [{seed, test: matrix, validation: matrix, fresh: {test, validation},
                seconds: {penalties, training, scores}, penalties: {TASK: {penalties, warnings}}
                where shares of the gradient were probed}]}
    joint       {average, tasks: mean figure on each task; spread, values of the average;
                validation: {the same}; seeds: [{seed, test, validation}]}

matrix[i][j] is the figure on task j after task i, null where nobody scored it. The deviation is
that of a sample (n - 1).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jtl.diagnose.forgetting import averages, figures
from jtl.recipes.sequence import Learned

Fresh = Mapping[str, Sequence[float]]


def way_entry(
    learned: Sequence[Learned], fresh: Sequence[Fresh], seeds: Sequence[int]
) -> dict[str, Any]:
    """Return the entry of one way.

    Args:
        learned: what it came to from each seed.
        fresh: {part: figures of the start model on each task} from each seed.
        seeds: their numbers.
    """
    tables = {
        part: _summary([one.scores[part] for one in learned], [one[part] for one in fresh])
        for part in ("test", "validation")
    }
    rows = []
    for seed, one, start in zip(seeds, learned, fresh, strict=True):
        beside = {"seconds": one.seconds, "penalties": one.penalties}
        rows.append({"seed": seed, **one.scores, "fresh": dict(start), **beside})
    return {**tables["test"], "validation": tables["validation"], "seeds": rows}


def joint_entry(scores: Sequence[Fresh], seeds: Sequence[int]) -> dict[str, Any]:
    """Return the entry of learning all tasks at once; arguments as for `way_entry`."""
    tables = {}
    for part in ("test", "validation"):
        each = np.asarray([one[part] for one in scores])
        means = each.mean(axis=1)
        tables[part] = {
            "average": float(means.mean()),
            "tasks": each.mean(axis=0),
            "spread": {"average": spread(means)},
            "values": {"average": means},
        }
    rows = [{"seed": seed, **one} for seed, one in zip(seeds, scores, strict=True)]
    return {**tables["test"], "validation": tables["validation"], "seeds": rows}


def spread(values: Sequence[float] | np.ndarray) -> float | None:
    """Return the standard deviation of a sample, None for fewer than two values.

    >>> spread([1.0, 3.0]) == 2**0.5, spread([1.0])
    (True, None)
    """
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _summary(matrices: Sequence[np.ndarray], fresh: Sequence[Sequence[float]]) -> dict[str, Any]:
    each = [figures(m, start)._asdict() for m, start in zip(matrices, fresh, strict=True)]
    values = {name: [one[name] for one in each] for name in each[0]}
    curves = np.asarray([averages(matrix) for matrix in matrices])
    return {
        "matrix": np.mean(matrices, axis=0),
        **{name: float(np.mean(row)) for name, row in values.items()},
        "averages": curves.mean(axis=0),
        "spread": {
            **{name: spread(row) for name, row in values.items()},
            "averages": None if len(curves) < 2 else curves.std(axis=0, ddof=1),
        },
        "values": values,
    }
