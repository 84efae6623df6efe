"""The training loop: batches in, states and metrics out."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jtl.train.state import Batch, Metrics, Step, TrainState


def fit(
    state: TrainState,
    batches: Iterable[Batch],
    step: Step,
    *,
    start: Any,
    before: Callable[[TrainState, Batch], Metrics | None] | None = None,
) -> Iterator[tuple[TrainState, Metrics, Metrics | None]]:
    """Yield the state, the metrics and what `before` gave for each batch; nothing waits.

    Args:
        state: its arrays are taken, as those of every state that is yielded, by the next step.
        batches: as many as there are steps to run.
        step: compiled, `(state, batch, start) -> (state, metrics)`.
        start: the step at which the phase began; schedules count from it.
        before: looks at the state and the batch of a step before it takes them; None looks never.
    """
    for batch in batches:
        seen = None if before is None else before(state, batch)
        state, metrics = step(state, batch, start)
        yield state, metrics, seen
