"""A plan is a list of phases: which labels move, at which rates, for how long."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jtl import near
from jtl.train import schedules, spans
from jtl.train.schedules import Rate


class Plateau(NamedTuple):
    """End the phase, and the series that it belongs to, when the metric no longer rises.

    Attributes:
        patience: evaluations without a new best that end the phase.
        min_delta: a rise smaller than this is none.
    """

    patience: int = 1
    min_delta: float = 0.0


class EarlyStop(NamedTuple):
    """End the phase when the metric no longer rises; later phases run whatever came out.

    Attributes:
        patience: evaluations without a new best that end the phase.
        min_delta: a rise smaller than this is none.
    """

    patience: int = 1
    min_delta: float = 0.0


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training in which the same labels move.

    Attributes:
        name: unique in its plan.
        rates: label -> rate; a label that is absent is held. Schedules count steps from the start
            of the phase and span its longest length.
        epochs: longest length in epochs, a fraction too; or give `steps`, or `examples`.
        steps: longest length in steps.
        until: None runs the full length. Otherwise the metric is watched after each epoch, and the
            best weights of the phase, those at its start included, are restored at its end.
        series: under `Plateau`, once a phase of a series ended without raising the metric, the
            later phases of that series are skipped.
        examples: longest length in examples seen.
    """

    name: str
    rates: Mapping[str, Rate]
    epochs: float | int | None = None
    steps: int | None = None
    until: Plateau | EarlyStop | None = None
    series: str = ""
    examples: int | None = None

    @property
    def live(self) -> frozenset[str]:
        """The labels that move."""
        return frozenset(self.rates)


Plan = Sequence[Phase]


def length(phase: Phase, steps_per_epoch: int, examples_per_epoch: int | None = None) -> int:
    """Return the longest length of a phase in steps, 1 at least.

    Args:
        phase: its length in epochs, steps or examples.
        steps_per_epoch: of the training data.
        examples_per_epoch: of the training data; needed where the phase counts examples.

    >>> length(Phase("all", {"head": 0.1}, epochs=2.5), 10)
    25
    >>> length(Phase("all", {"head": 0.1}, examples=960), 10, 320)
    30

    Raises:
        ValueError: the phase counts examples and `examples_per_epoch` is not given.
    """
    ((unit, number),) = _lengths(phase).items()
    return max(
        1,
        round(
            spans.to_steps(
                number,
                unit,
                f"the length of phase {phase.name!r}",
                steps_per_epoch=steps_per_epoch,
                examples_per_epoch=examples_per_epoch,
            )
        ),
    )


def ever_live(plan: Plan) -> frozenset[str]:
    """Return the labels that move in some phase.

    >>> sorted(ever_live([Phase("a", {"head": 1.0}), Phase("b", {"top": 1.0})]))
    ['head', 'top']
    """
    return frozenset().union(*(phase.live for phase in plan))


def check_plan(plan: Plan, labels: Iterable[str]) -> None:
    """Refuse a plan that cannot run on a tree with these labels.

    Raises:
        ValueError: an empty plan, two phases of one name, a phase that moves nothing or names an
            unknown label, a rate that is not above 0 or a curve that its kind does not know, no
            length or two, a series without `Plateau`.
    """
    known = sorted(set(labels))
    if not plan:
        raise ValueError(
            "the plan has no phases; the run would train nothing; give it one at least"
        )
    names = [phase.name for phase in plan]
    if len(set(names)) < len(names):
        raise ValueError(f"two phases bear one name; the plan has {names}; rename one of them")
    for phase in plan:
        _check_labels(phase, known)
        _check_length(phase)


def check_spans(plan: Plan, steps_per_epoch: int, examples_per_epoch: int | None = None) -> None:
    """Refuse a plan with a warm-up that does not fit its phase, before the first phase runs.

    Args:
        plan: the phases.
        steps_per_epoch: of the training data.
        examples_per_epoch: of the training data; needed where something counts examples.

    >>> curve = schedules.Curve("constant", 0.1, "5 steps")
    >>> check_spans([Phase("a", {"head": curve}, epochs=2)], steps_per_epoch=3)

    Raises:
        ValueError: the phase, the label, and what does not fit.
    """
    epoch = {"steps_per_epoch": steps_per_epoch, "examples_per_epoch": examples_per_epoch}
    for phase in plan:
        total = length(phase, **epoch)
        for label, rate in phase.rates.items():
            try:
                schedules.resolve(rate, total, **epoch)
            except ValueError as error:
                raise ValueError(f"phase {phase.name!r}, rate of {label!r}: {error}") from None


def _check_labels(phase: Phase, known: list[str]) -> None:
    if not phase.rates:
        raise ValueError(
            f"phase {phase.name!r} has no rates and would move nothing; labels: {known}"
        )
    unknown = sorted(phase.live - set(known))
    if unknown:
        raise ValueError(
            f"phase {phase.name!r} names {unknown}; the tree has {known}"
            f"{near.nearest(unknown[0], known)}"
        )
    for label, rate in phase.rates.items():
        schedules.check(rate)
        if not isinstance(rate, schedules.Curve) and callable(rate):
            continue
        if not (math.isfinite(schedules.peak(rate)) and schedules.peak(rate) > 0):
            raise ValueError(
                f"phase {phase.name!r} gives {label!r} the rate {rate}; a rate is above 0; "
                "leave the label out to hold it"
            )


def _lengths(phase: Phase) -> dict[str, float | int]:
    given = {"epochs": phase.epochs, "steps": phase.steps, "examples": phase.examples}
    return {unit: number for unit, number in given.items() if number is not None}


def _check_length(phase: Phase) -> None:
    given = _lengths(phase)
    if len(given) != 1:
        raise ValueError(
            f"phase {phase.name!r} has the lengths {given}; give one of epochs, steps and examples"
        )
    if not all(value > 0 for value in given.values()):
        raise ValueError(f"phase {phase.name!r} has the length {given}; a length is above 0")
    if phase.until is not None and phase.until.patience < 1:
        raise ValueError(
            f"phase {phase.name!r} has patience {phase.until.patience}; take 1 or more"
        )
    if phase.series and not isinstance(phase.until, Plateau):
        raise ValueError(
            f"phase {phase.name!r} is in the series {phase.series!r} with until={phase.until}; "
            "a series ends by Plateau(...)"
        )
