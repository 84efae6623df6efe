"""The parts of `benchmarks.freezing` that only a whole run shows: later epochs, and the borders.

One run with a phase for the head, for the last block, for the last two and for everything; its
events are timed as they arrive. Data are random rows of a model's shape, in memory.
"""

import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.jtl_steps import CASES, live_labels
from benchmarks.measure import say
from benchmarks.shapes import Shape, columns
from jtl.data import Dataset, Source, batches
from jtl.models.model import Model
from jtl.recipes import optimizers, tasks, training
from jtl.train.plan import Phase

PHASES = ("head", "last_block", "last_two_blocks", "full")
EPOCHS = 3


class PhaseTime(NamedTuple):
    """What a phase of the run took.

    Attributes:
        epochs: seconds of each epoch, from one evaluation to the next.
        step: median seconds of a step.
        border: seconds from the end of the phase before to the first step, None in the first phase.
        stall: of these, without the columns that were computed for the phase.
        waited: of these, waiting for a compilation.
    """

    epochs: list[float]
    step: float
    border: float | None
    stall: float | None
    waited: float


def phase_times(
    model: Model, shape: Shape, rows: int, batch: int, names: Sequence[str] = PHASES
) -> dict[str, PhaseTime]:
    """Train on `rows` random rows by these phases, and return what each took."""
    data = {part: _dataset(shape, size) for part, size in (("train", rows), ("validation", batch))}
    source = Source({"label": data["train"].labels}, ("a", "b"), "random rows")
    task = tasks.classification(source, dropout=0.0)
    plan = [_phase(model, name) for name in names]
    job = training.Job(model, "head", task, data, plan, 0)
    # No files: a second run of the benchmark would find the columns of the first.
    settings = training.Settings(optimizers.adamw(), batch, columns_disk_mib=0)
    engine = training.make_engine(job, settings)
    return _times(engine.events)


def _phase(model: Model, name: str) -> Phase:
    rates = dict.fromkeys(live_labels(model, CASES[name]), 1e-5)
    return Phase(name, rates, steps=3) if name == "full" else Phase(name, rates, epochs=EPOCHS)


def forward_seconds(model: Model, shape: Shape, rows: int, batch: int, passes: int = 2) -> float:
    """Return the seconds of a forward pass over the same rows, the least of `passes`."""
    dataset = _dataset(shape, rows)
    run = jax.jit(lambda params, inputs: model.apply(params, model.stats, inputs)[0]["head"])

    def one() -> float:
        began = time.perf_counter()
        for given in batches(dataset, batch, shuffle=False, stop=rows // batch):
            out = run(model.params, {name: jnp.asarray(value) for name, value in given.items()})
        jax.block_until_ready(out)
        return time.perf_counter() - began

    one()
    return min(one() for _ in range(passes))


def _dataset(shape: Shape, rows: int) -> Dataset:
    labels = (np.arange(rows) % 2).astype(np.int32)
    length = 0 if shape.family == "vit" else shape.length
    bucket = np.zeros(rows, np.int32)
    return Dataset((columns(shape, rows),), bucket, labels, ("a", "b"), (length,), name="random")


def _times(events: Iterable[Any]) -> dict[str, PhaseTime]:
    """Return the times of each phase from the events of a run."""
    seen = [(event, time.perf_counter()) for event in _told(events)]
    phases = itertools.groupby(seen, key=lambda pair: pair[0].phase)
    return {name: _phase_time(list(own), not i) for i, (name, own) in enumerate(phases)}


def _told(events: Iterable[Any]) -> Iterable[Any]:
    for event in events:
        if event.kind == "phase_start":
            say(f"a run: phase {event.phase}, {event.metrics['steps']} steps")
        # Nothing of the event's state may be kept: the next step takes its arrays.
        yield event._replace(state=None)


def _phase_time(own: list[tuple[Any, float]], first: bool) -> PhaseTime:
    marks = [at for event, at in own if event.kind == "evaluation"]
    steps = [at for event, at in own if event.kind == "step"]
    row = next(event.metrics for event, _ in own if event.kind == "phase_end")
    border = (None, None) if first else (row["border_seconds"], row["stall_seconds"])
    return PhaseTime(
        [b - a for a, b in itertools.pairwise(marks)],
        statistics.median(b - a for a, b in itertools.pairwise(steps)),
        *border,
        row["compile_wait_seconds"],
    )
