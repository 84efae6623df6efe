"""Rates over a phase: a float, an optax schedule of steps, or a `Curve` in fractions of the length.

A curve knows no number of steps, so it stands in configs; `resolve` turns it into an optax schedule
once the length of its phase is known. Steps count from the start of the phase.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import optax


class Curve(NamedTuple):
    """A schedule described by fractions of its phase; None takes the default of its kind.

    Attributes:
        kind: a name in `KINDS`.
        peak: the highest rate.
        warmup: fraction of the phase in which the rate rises to the peak.
        end: rate at the end of the phase (and at the start of a slanted triangle), as a fraction of
            the peak.
    """

    kind: str
    peak: float
    warmup: float | None = None
    end: float | None = None


Rate = float | int | Curve | Callable


def constant(
    peak: float | int, steps: int, *, warmup: float | int = 0.0, end: float | int = 1.0
) -> optax.Schedule:
    """Return a linear warm-up from 0, then `peak`; `end` must stay 1.

    >>> schedule = constant(4.0, 8, warmup=0.5)
    >>> [float(schedule(step)) for step in (0, 2, 4, 8)]
    [0.0, 2.0, 4.0, 4.0]

    Raises:
        ValueError: the warm-up is no fraction below 1, or `end` is not 1.
    """
    if end != 1.0:
        raise ValueError(
            f"a constant rate ends at its peak, and end={end} is given; "
            "leave it 1.0, or take 'warmup_linear', which falls"
        )
    rise = _warmup_steps(steps, warmup)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, rise), optax.constant_schedule(peak)], [rise]
    )


def warmup_linear(
    peak: float | int, steps: int, *, warmup: float | int = 0.1, end: float | int = 0.0
) -> optax.Schedule:
    """Return a linear warm-up from 0 to `peak`, then a straight fall to `end * peak`.

    >>> schedule = warmup_linear(4.0, 10, warmup=0.2)
    >>> [float(schedule(step)) for step in (0, 1, 2, 6, 10)]
    [0.0, 2.0, 4.0, 2.0, 0.0]

    Raises:
        ValueError: the warm-up is no fraction below 1.
    """
    rise = _warmup_steps(steps, warmup)
    fall = optax.linear_schedule(peak, end * peak, steps - rise)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rise), fall], [rise])


def warmup_cosine(
    peak: float | int, steps: int, *, warmup: float | int = 0.1, end: float | int = 0.0
) -> optax.Schedule:
    """Return a linear warm-up from 0 to `peak`, then half a cosine down to `end * peak`.

    >>> schedule = warmup_cosine(4.0, 10, warmup=0.2)
    >>> [round(float(schedule(step)), 6) for step in (0, 1, 2, 6, 10)]
    [0.0, 2.0, 4.0, 2.0, 0.0]

    Raises:
        ValueError: the warm-up is no fraction below 1.

    Reference: Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
    """
    rise = _warmup_steps(steps, warmup)
    fall = optax.cosine_decay_schedule(peak, steps - rise, alpha=end)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rise), fall], [rise])


def slanted_triangular(
    peak: float | int, steps: int, *, warmup: float | int = 0.1, end: float | int = 1 / 32
) -> optax.Schedule:
    """Return a steep straight rise from `end * peak` to `peak` and a long fall back.

    >>> schedule = slanted_triangular(32.0, 10, warmup=0.2)
    >>> [float(schedule(step)) for step in (0, 1, 2, 6, 10)]
    [1.0, 16.5, 32.0, 16.5, 1.0]

    Raises:
        ValueError: the warm-up is no fraction below 1.

    Reference: Howard and Ruder 2018, arXiv:1801.06146, equation 3.
    """
    rise = _warmup_steps(steps, warmup)
    return optax.join_schedules(
        [
            optax.linear_schedule(end * peak, peak, rise),
            optax.linear_schedule(peak, end * peak, steps - rise),
        ],
        [rise],
    )


KINDS: dict[str, Callable[..., optax.Schedule]] = {
    "constant": constant,
    "slanted_triangular": slanted_triangular,
    "warmup_cosine": warmup_cosine,
    "warmup_linear": warmup_linear,
}


def curve(
    kind: str,
    peak: float | int,
    *,
    warmup: float | int | None = None,
    end: float | int | None = None,
) -> Rate:
    """Return the rate that a config names: a float where it is constant without warm-up.

    >>> curve("constant", 0.5)
    0.5
    >>> curve("warmup_linear", 0.5, warmup=0.2)
    Curve(kind='warmup_linear', peak=0.5, warmup=0.2, end=None)

    Raises:
        ValueError: the kind is not known.
    """
    _kind(kind)
    if kind == "constant" and not warmup and end in (None, 1.0):
        return peak
    return Curve(kind, peak, warmup, end)


def resolve(rate: Rate, steps: int) -> Rate:
    """Return a float, or a schedule: a curve becomes an optax schedule over `steps` steps.

    >>> float(resolve(Curve("warmup_linear", 4.0, warmup=0.2), 10)(1))
    2.0

    Raises:
        ValueError: the curve names no known schedule, or its warm-up is no fraction below 1.
    """
    if not isinstance(rate, Curve):
        return rate if callable(rate) else float(rate)
    options = {"warmup": rate.warmup, "end": rate.end}
    options = {name: value for name, value in options.items() if value is not None}
    return _kind(rate.kind)(rate.peak, steps, **options)


def peak(rate: Rate) -> float | int:
    """Return the highest rate: NaN for an optax schedule, which does not say.

    >>> peak(0.1), peak(Curve("warmup_cosine", 0.2))
    (0.1, 0.2)
    """
    if isinstance(rate, Curve):
        return rate.peak
    return math.nan if callable(rate) else rate


def scale(rate: Rate, factor: float | int) -> Rate:
    """Return the rate times `factor`.

    >>> scale(0.5, 0.1), scale(Curve("constant", 2.0, 0.1, 1.0), 0.5).peak
    (0.05, 1.0)
    """
    if isinstance(rate, Curve):
        return rate._replace(peak=rate.peak * factor)
    if callable(rate):
        return lambda step: rate(step) * factor
    return rate * factor


def _kind(kind: str) -> Callable[..., optax.Schedule]:
    if kind not in KINDS:
        raise ValueError(
            f"there is no schedule {kind!r}; there are {sorted(KINDS)}; name one, or give a float "
            "or an optax schedule"
        )
    return KINDS[kind]


def _warmup_steps(steps: int, warmup: float | int) -> int:
    if not 0.0 <= warmup < 1.0:
        raise ValueError(
            f"warmup is a fraction of the phase, and {warmup} is given; take one in [0, 1)"
        )
    return round(steps * warmup)
