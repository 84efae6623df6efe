"""The shapes of learning rates over a known number of steps; optax has the pieces."""

import math

import optax

from jtl.train import spans


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


def one_cycle(
    peak: float | int,
    steps: int,
    *,
    warmup: float | int = 0.3,
    start: float | int = 1 / 25,
    end: float | int = 4e-6,
) -> optax.Schedule:
    """Return half a cosine up from `start * peak` to `peak`, then half a cosine to `end * peak`.

    The rate alone: a momentum that moves the other way is the optimizer's own affair.

    >>> schedule = one_cycle(8.0, 10, warmup=0.2, start=0.25, end=0.5)
    >>> [round(float(schedule(step)), 5) for step in (0, 1, 2, 6, 10)]
    [2.0, 5.0, 8.0, 6.0, 4.0]

    Raises:
        ValueError: the warm-up is no fraction below 1; `start` is not above 0.

    Reference: Smith and Topin 2017, arXiv:1708.07120; start 1/25, end 1e-4 of the start and warm-up
    0.3 as `optax.cosine_onecycle_schedule`.
    """
    if not start > 0:
        raise ValueError(f"one_cycle starts at {start} of its peak; take a fraction above 0")
    # optax takes int(fraction * steps): from the middle of a step no rounding loses one.
    rise = (_warmup_steps(steps, warmup) + 0.5) / steps
    return optax.cosine_onecycle_schedule(
        steps, peak, rise, 1 / start, start / end if end else math.inf
    )


def flat_cosine(
    peak: float | int,
    steps: int,
    *,
    warmup: float | int = 0.0,
    flat: float | int = 0.75,
    end: float | int = 1e-5,
) -> optax.Schedule:
    """Return a linear warm-up from 0, `peak` until `flat` of the phase, half a cosine to the end.

    >>> schedule = flat_cosine(4.0, 8, warmup=0.25, flat=0.5, end=0.5)
    >>> [float(schedule(step)) for step in (0, 1, 2, 4, 6, 8)]
    [0.0, 2.0, 4.0, 4.0, 3.0, 2.0]

    Raises:
        ValueError: the warm-up is no fraction below 1, or longer than `flat`.

    Reference: fastai, `fit_flat_cos` (flat 0.75, end 1e-5), docs.fast.ai/callback.schedule.
    """
    rise, turn = _warmup_steps(steps, warmup), _warmup_steps(steps, flat, "flat")
    if turn < rise:
        raise ValueError(
            f"flat_cosine warms up for {rise} steps and falls from step {turn} on; take a shorter "
            "warmup, or a later flat="
        )
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, rise),
            optax.constant_schedule(peak),
            optax.cosine_decay_schedule(peak, steps - turn, alpha=end),
        ],
        [rise, turn],
    )


def _warmup_steps(steps: int, warmup: float | int, what: str = "warmup") -> int:
    return spans.in_steps(float(warmup), steps, what)
