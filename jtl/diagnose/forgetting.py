"""What a run over several tasks comes to: average, transfer and forgetting, from its matrix.

matrix[i, j] is the figure on task j after training on the tasks up to i; higher is better. What
nobody scored is NaN.

Reference: Lopez-Paz and Ranzato 2017, arXiv:1706.08840, section 2; Chaudhry et al. 2018,
arXiv:1801.10112, section 4.2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Matrix = Sequence[Sequence[float | int]] | np.ndarray


class Forgetting(NamedTuple):
    """Figures of one matrix, in the unit of its entries; NaN where there is nothing to take.

    Attributes:
        average: over all tasks after the last one.
        backward_transfer: mean over the earlier tasks of last minus own; below 0 where later tasks
            did harm.
        forward_transfer: mean over the later tasks of the figure before training on the task minus
            that of a fresh model; NaN without the latter.
        forgetting: mean over the earlier tasks of the best figure before the last task minus the
            last; 0 or less where nothing is forgotten.
        learning: mean figure on each task just after it was trained.
    """

    average: float
    backward_transfer: float
    forward_transfer: float
    forgetting: float
    learning: float


def figures(matrix: Matrix, fresh: Sequence[float | int] | np.ndarray | None = None) -> Forgetting:
    """Return what a matrix comes to.

    Args:
        matrix: (tasks, tasks), the entries on and below the diagonal finite; those just above it
            are what forward transfer reads.
        fresh: (tasks,) the figures of a model that has seen no task.

    Raises:
        ValueError: the matrix is not square, or a figure on or below its diagonal is missing;
            `fresh` has another length.

    >>> found = figures([[0.8, 0.5], [0.6, 1.0]], fresh=[0.5, 0.25])
    >>> [round(value, 6) for value in found]
    [0.8, -0.2, 0.25, 0.2, 0.9]
    """
    table = checked(matrix)
    own, last = np.diagonal(table), table[-1]
    before = np.append(np.nan, np.diagonal(table, 1))
    baseline = np.full(len(table), np.nan) if fresh is None else np.asarray(fresh, np.float64)
    if baseline.shape != own.shape:
        raise ValueError(
            f"there are {len(own)} tasks and figures of a fresh model of shape {baseline.shape}; "
            "give one for each task, in their order"
        )
    return Forgetting(
        average=float(last.mean()),
        backward_transfer=_mean((last - own)[:-1]),
        forward_transfer=_mean((before - baseline)[1:]),
        forgetting=_mean(forgotten(table)),
        learning=float(own.mean()),
    )


def averages(matrix: Matrix) -> np.ndarray:
    """Return the mean figure over the tasks so far after each task, (tasks,).

    >>> averages([[0.8, 0.5], [0.5, 1.0]]).tolist()
    [0.8, 0.75]
    """
    table = checked(matrix)
    return np.asarray([table[i, : i + 1].mean() for i in range(len(table))])


def forgotten(matrix: Matrix) -> np.ndarray:
    """Return, for each task but the last, its best figure before the last task minus the last.

    The best is taken over the rows from the task's own on: before it, the task was not trained.

    >>> forgotten([[0.5, 0.9, 0], [0.75, 0.5, 0], [0.25, 0.5, 1.0]]).tolist()
    [0.5, 0.0]
    """
    table = checked(matrix)
    tasks = range(len(table) - 1)
    return np.asarray([table[j:-1, j].max() - table[-1, j] for j in tasks], np.float64)


def checked(matrix: Matrix) -> np.ndarray:
    """Return a copy of a matrix as float64.

    Raises:
        ValueError: as `figures`.
    """
    table = np.array(matrix, np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not len(table):
        raise ValueError(
            f"the matrix has shape {table.shape}; wanted is one row and one column for each task; "
            "give the figure on task j after task i as matrix[i][j]"
        )
    missing = [(int(i), int(j)) for i, j in np.argwhere(~np.isfinite(table)) if j <= i]
    if missing:
        raise ValueError(
            f"the matrix lacks the figures at (after task, on task) {missing[:6]}; it has "
            f"{len(table)} tasks; score each task after its own training and after each later one"
        )
    return table


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
