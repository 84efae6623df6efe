"""Steps of the phases that may come next, compiled in a thread while a phase runs."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

from jtl.train.compile import shapes_of
from jtl.train.feed import Ahead
from jtl.train.plan import Phase, Plateau
from jtl.train.progress import Progress
from jtl.train.shares import Shares

_LOG = logging.getLogger(__name__)


class Epoch(NamedTuple):
    """What lengths and warm-ups are measured by."""

    steps: int
    examples: int | None = None


Make = Callable[[Phase, Epoch], Any]
Measure = Callable[[frozenset[str]], Shares | None]
Coming = dict[str, "Future[Any]"]


def candidates(plan: Sequence[Phase], progress: Progress) -> list[Phase]:
    """Return the phases that may follow the one that runs, the likelier first.

    Under a plateau there are two: the next phase, and the first one after the series.

    >>> from jtl.train.phases import progressive
    >>> plan = progressive(["stem", "block_0", "block_1"], ["head"])
    >>> [phase.name for phase in candidates(plan, Progress(("head",), phase=1))]
    ['open_block_0', 'all']
    """
    running = plan[progress.phase]
    later = [
        p for p in plan[progress.phase + 1 :] if not p.series or p.series not in progress.ended
    ]
    found = later[:1]
    if running.series and isinstance(running.until, Plateau):
        found += [p for p in later if p.series != running.series][:1]
    return found if len(found) < 2 or found[0].name != found[1].name else found[:1]


def prepare(
    pool: Executor | None,
    ahead: Ahead | None,
    make: Make,
    phases: Sequence[Phase],
    state: Any,
    *,
    begun: Mapping[str, Any] | None = None,
    measure: Measure | None = None,
) -> Coming:
    """Have the steps of phases made and compiled in the background, and return what will be there.

    Args:
        pool: where; None prepares nothing.
        ahead: what is known of the phases; None prepares nothing.
        make: `(phase, epoch) -> compiled step`.
        phases: the likelier first.
        state: of the run; all phases have the same shapes.
        begun: what was asked for before: kept for these phases, dropped for others.
        measure: `live -> shares` of a phase, compiled with its step; None for none.
    """
    begun, names = begun or {}, [phase.name for phase in phases]
    for name, other in begun.items():
        if name not in names:
            other.cancel()
    if ahead is None or pool is None:
        return {}
    shapes, epoch = shapes_of(state), Epoch(ahead.steps_per_epoch, ahead.examples_per_epoch)

    def one(phase: Phase) -> Any:
        step = make(phase, epoch)
        shares = None if measure is None else measure(phase.live)
        for program in [step] if shares is None else [step, shares.call]:
            if hasattr(program, "prepare"):
                program.prepare(shapes, ahead.shapes(phase.live))
        return epoch, step

    fresh = [phase for phase in phases if phase.name not in begun]
    coming = {name: begun[name] for name in names if name in begun}
    coming |= {phase.name: pool.submit(one, phase) for phase in fresh}
    if ahead.warm is not None:
        for phase in phases:
            pool.submit(_quietly, ahead.warm, phase.live)
    return coming


def taken(coming: Mapping[str, Any], make: Make, phase: Phase, epoch: Epoch) -> tuple[Any, float]:
    """Return the step of a phase that begins, and the seconds that were spent waiting for it.

    A step that could not be prepared, or was for data of another size, is made anew, so that an
    error comes up here.
    """
    future = coming.get(phase.name)
    if future is None or future.cancel():
        return make(phase, epoch), 0.0
    began = time.perf_counter()
    try:
        made_for, step = future.result()
    except Exception as error:  # noqa: BLE001
        _LOG.info("the step of phase %r was not compiled ahead: %s", phase.name, error)
        made_for, step = None, None
    waited = time.perf_counter() - began
    return (step if made_for == epoch else make(phase, epoch)), waited


def _quietly(warm: Callable[[Any], None], live: frozenset[str]) -> None:
    try:
        warm(live)
    except Exception as error:  # noqa: BLE001
        _LOG.info("evaluation with %s live was not compiled ahead: %s", sorted(live), error)
