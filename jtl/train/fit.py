"""The training loop: batches in, states and metrics out."""

from collections.abc import Iterable, Iterator
from typing import Any

from jtl.train.state import Batch, Metrics, Step, TrainState


def fit(
    state: TrainState, batches: Iterable[Batch], step: Step, *, start: Any
) -> Iterator[tuple[TrainState, Metrics]]:
    """Yield the state and the metrics after each batch; nothing waits for the device.

    Args:
        state: its arrays are taken, as those of every state that is yielded, by the next step.
        batches: as many as there are steps to run.
        step: compiled, `(state, batch, start) -> (state, metrics)`.
        start: the step at which the phase began; schedules count from it.
    """
    for batch in batches:
        state, metrics = step(state, batch, start)
        yield state, metrics
