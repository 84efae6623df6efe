"""A job: one task to train, and how."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jtl.models.model import Model
from jtl.recipes.datasets import Datasets
from jtl.recipes.tasks import Task
from jtl.train.plan import Phase


class Job(NamedTuple):
    """One task to train.

    Attributes:
        model: the start, with the task's head attached.
        head: name of the task's head.
        task: loss and figures.
        datasets: "train" and "validation".
        plan: the phases.
        seed: of order and dropout.
    """

    model: Model
    head: str
    task: Task
    datasets: Datasets
    plan: Sequence[Phase]
    seed: int


class Settings(NamedTuple):
    """How to train; see `fine_tune` for each."""

    optimizer: Any
    batch_size: int = 32
    clip: float | None = 1.0
    accumulate: int = 1
    parallel: str = "jit"
    save_every: int | None = None
    columns_mib: int = 2048
    columns_disk_mib: int = 8192
    columns_folder: str | None = None
    ema: float | None = None
    shares_every: int | None = 50
