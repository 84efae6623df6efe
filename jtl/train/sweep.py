"""The learning-rate finder: train a copy at rates that rise step by step, and watch the loss.

    rates = sweep_rates(phase.rates, lowest=1e-7, highest=10.0, steps=100)
    step = make_compiled(make_step(apply, terms, tx, labels, rates))
    readings = list(sweep(state, batches, step, lowest=1e-7, highest=10.0, steps=100))
    conclude(readings, 100).suggestions

Reference: Smith 2017, arXiv:1506.01186, section 3.3; the exponential sweep and the rules as in
fastai 2, docs.fast.ai/callback.schedule (`lr_find`).
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtl.train import schedules
from jtl.train.fit import fit
from jtl.train.schedules import Rate
from jtl.train.state import Batch, Step, TrainState

Numbers = Sequence[float | int]
_LEAST, _TAIL = 3, 5


class Reading(NamedTuple):
    """A step of a sweep.

    Attributes:
        rate: of the fastest label.
        loss: before the step.
        smoothed: running mean of the losses so far.
    """

    rate: float
    loss: float
    smoothed: float


def fastest(rates: Mapping[str, Rate]) -> float:
    """Return the highest peak among the rates of a phase: the one that a sweep speaks of.

    >>> fastest({"head": 0.1, "top": schedules.Curve("one_cycle", 0.02)})
    0.1

    Raises:
        ValueError: a rate is a schedule, which does not say its peak.
    """
    peaks = {label: schedules.peak(rate) for label, rate in rates.items()}
    unknown = sorted(label for label, peak in peaks.items() if math.isnan(peak))
    if unknown or not peaks:
        raise ValueError(
            f"the rates of {unknown} are schedules without a known peak; a sweep keeps the "
            f"proportions of {sorted(peaks)}; give numbers or curves"
        )
    return float(max(peaks.values()))


def sweep_rates(
    rates: Mapping[str, Rate], *, lowest: float | int, highest: float | int, steps: int
) -> dict[str, optax.Schedule]:
    """Return schedules that rise by equal factors, all labels in the proportions of their peaks.

    >>> made = sweep_rates({"head": 1.0, "top": 0.5}, lowest=0.01, highest=1.0, steps=3)
    >>> [[round(float(made[name](step)), 6) for step in range(3)] for name in ("head", "top")]
    [[0.01, 0.1, 1.0], [0.005, 0.05, 0.5]]

    Args:
        rates: of the phase, {label: rate}.
        lowest: rate of the fastest label at the first step.
        highest: its rate at the last.
        steps: number of them.

    Raises:
        ValueError: rates without a known peak; no range; fewer than 2 steps.
    """
    if not 0 < lowest < highest or steps < 2:
        raise ValueError(
            f"the sweep goes from {lowest} to {highest} in {steps} steps; give two rates above 0, "
            "the lower one first, and at least 2 steps"
        )
    top = fastest(rates)
    return {
        label: optax.exponential_decay(
            lowest * schedules.peak(rate) / top, steps - 1, highest / lowest
        )
        for label, rate in rates.items()
    }


def sweep(
    state: TrainState,
    batches: Iterable[Batch],
    step: Step,
    *,
    lowest: float | int,
    highest: float | int,
    steps: int,
    smoothing: float = 0.98,
    limit: float | int = 4.0,
) -> Iterator[Reading]:
    """Yield a reading after each step on a copy of the state, until the loss runs away.

        mean_t = s mean_(t-1) + (1 - s) loss_t,    smoothed_t = mean_t / (1 - s^t)

    The state that is given keeps its arrays. The sweep ends after `steps`, at a step that is not
    finite, or where the smoothed loss exceeds `limit` times its lowest value.

    Args:
        state: at the start of the phase.
        batches: at least as many as there are steps.
        step: compiled, with the rates of `sweep_rates`: it counts them from the state's step.
        lowest: as for `sweep_rates`, like the next two.
        highest: rate at the last step.
        steps: number of them.
        smoothing: s, the share of the past in the running mean, in [0, 1).
        limit: multiple of the lowest smoothed loss.

    Raises:
        ValueError: the batches end before the sweep.
    """
    start = jnp.int32(int(state.step))
    copy = jax.tree.map(lambda x: jnp.array(x, copy=True), state)
    mean, best, number = 0.0, math.inf, 0
    for _, metrics, _ in fit(copy, itertools.islice(batches, steps), step, start=start):
        read = jax.device_get({name: metrics[name] for name in ("loss", "finite")})
        if not read["finite"]:
            return
        loss = float(read["loss"])
        rate = lowest * (highest / lowest) ** (number / (steps - 1))
        number += 1
        mean = smoothing * mean + (1 - smoothing) * loss
        smoothed = mean / (1 - smoothing**number)
        yield Reading(rate, loss, smoothed)
        best = min(best, smoothed)
        # Of a loss below 0, a log-density, 4 times the best is lower still.
        if smoothed > best + (limit - 1) * abs(best):
            return
    if number < steps:
        raise ValueError(
            f"the batches ended after {number} of {steps} steps; give batches without end"
        )


class Found(NamedTuple):
    """What a sweep comes to.

    Attributes:
        rates: of the fastest label, without the ends of the sweep.
        losses: smoothed, one for each rate.
        suggestions: {rule: rate of the fastest label}, by `RULES`.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestions: dict[str, float]


def conclude(readings: Sequence[Reading], steps: int) -> Found:
    """Return what the rules suggest on the readings of a sweep, without its ends.

    The first tenth of the planned steps has too few losses in its mean, and in the last five the
    loss runs away.

    Args:
        readings: of `sweep`.
        steps: that were planned.

    Raises:
        ValueError: fewer than 3 points are left.
    """
    kept = readings[steps // 10 : max(len(readings) - _TAIL, 0)]
    if len(kept) < _LEAST:
        last = f", at a rate of {readings[-1].rate:.1e}" if readings else ""
        raise ValueError(
            f"the sweep ended after {len(readings)} of {steps} steps{last}, and without its ends "
            f"{len(kept)} are left; take more steps, or a lower lowest rate"
        )
    rates, losses = zip(*((reading.rate, reading.smoothed) for reading in kept), strict=True)
    return Found(rates, losses, suggest(rates, losses))


def suggest(rates: Numbers, losses: Numbers) -> dict[str, float]:
    """Return the rate that each rule of `RULES` suggests.

    >>> suggest([1e-4, 1e-3, 1e-2, 1e-1], [4.0, 3.5, 1.0, 2.0])["steepest"]
    0.001

    Args:
        rates: rising.
        losses: one for each rate, smoothed.

    Raises:
        ValueError: fewer than 3 points, or not as many rates as losses.
    """
    if len(rates) != len(losses) or len(rates) < _LEAST:
        raise ValueError(
            f"there are {len(rates)} rates and {len(losses)} losses; give one loss for each rate, "
            f"and {_LEAST} at least"
        )
    points = np.asarray(rates, np.float64), np.asarray(losses, np.float64)
    return {name: float(rule(*points)) for name, rule in RULES.items()}


def minimum_tenth(rates: np.ndarray, losses: np.ndarray) -> float:
    """Return a tenth of the rate at the lowest loss.

    >>> minimum_tenth(np.array([1.0, 10.0, 100.0]), np.array([3.0, 1.0, 2.0]))
    1.0
    """
    return float(rates[np.argmin(losses)] / 10)


def steepest(rates: np.ndarray, losses: np.ndarray) -> float:
    """Return the rate at which the loss begins to fall fastest, by the logarithm of the rate.

    It looks left of the lowest loss, fastai at the whole curve; but once the loss has run away it
    jumps, and such a jump down is the steepest place of all.

    >>> steepest(np.array([1.0, 10.0, 100.0, 1000.0, 1e4]), np.array([3.0, 2.9, 1.0, 9.0, 2.0]))
    10.0
    """
    stop = max(int(np.argmin(losses)), 1) + 1
    return float(rates[np.argmin(np.diff(losses[:stop]) / np.diff(np.log(rates[:stop])))])


def valley(rates: np.ndarray, losses: np.ndarray) -> float:
    """Return the rate half-way through the longest valley.

    The valley is the longest strictly falling subsequence of the losses: of length n and ending at
    position e, counted from 0, it suggests position e - n + [n / 3] + [n / 6].

    >>> valley(10.0 ** np.arange(8), np.array([9.0, 9.5, 8.0, 7.0, 6.0, 5.0, 4.0, 10.0]))
    1000.0
    """
    longest = np.ones(len(losses), int)
    for i in range(1, len(losses)):
        above = longest[:i][losses[:i] > losses[i]]
        longest[i] = 1 + max(above, default=0)
    end = int(np.argmax(longest))
    size = int(longest[end])
    return float(rates[max(end - size + int(size / 3) + int(size / 6), 0)])


def slide(
    rates: np.ndarray, losses: np.ndarray, *, width: int = 15, threshold: float | int = 0.005
) -> float:
    """Return the rate at the left of the first calm interval from the right.

    An interval of `width` steps slides down from the highest rate while the slopes of the loss at
    its two ends differ by more than `threshold`; the rate is that of its left end before it stops.

    >>> slide(10.0 ** np.arange(6), np.array([5.0, 5.0, 5.0, 5.0, 2.0, 8.0]), width=2)
    10.0

    Reference: A. Chang, forums.fast.ai/t/44199.
    """
    slopes = np.gradient(losses)
    right = len(losses) - 1
    left = max(right - width, 0)
    found = rates[left]
    while left >= 0 and abs(slopes[right] - slopes[left]) > threshold:
        found = rates[left]
        right, left = right - 1, left - 1
    return float(found)


RULES: dict[str, Any] = {
    "minimum/10": minimum_tenth,
    "slide": slide,
    "steepest": steepest,
    "valley": valley,
}
