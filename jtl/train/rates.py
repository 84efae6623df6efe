"""Rates over the depth of a model: which group moves how fast."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jtl.train import schedules
from jtl.train.schedules import Rate
from jtl.train.spans import Span

Pair = tuple[float | int | None, float | int]
"""(lowest, highest) rate of a stack of groups; see `spread_rates`."""


def discriminative(groups: Sequence[str], rate: Rate, decay: float | int) -> dict[str, Rate]:
    """Return rates that fall from the top: `rate * decay^d` for the group d below the last one.

    >>> discriminative(["stem", "block_0", "block_1"], 8.0, 0.5)
    {'stem': 2.0, 'block_0': 4.0, 'block_1': 8.0}

    Reference: Howard and Ruder 2018, arXiv:1801.06146, section 3.2 (decay 1/2.6 there).
    """
    depth = len(groups) - 1
    return {label: schedules.scale(rate, decay ** (depth - i)) for i, label in enumerate(groups)}


def spread_rates(
    groups: Sequence[str], lowest: float | int | None, highest: float | int
) -> dict[str, Rate]:
    """Return rates from `lowest` at the first group to `highest` at the last, by equal factors.

    >>> spread_rates(["stem", "block_0", "top"], 1.0, 4.0)
    {'stem': 1.0, 'block_0': 2.0, 'top': 4.0}
    >>> spread_rates(["stem", "block_0", "top"], None, 4.0)
    {'stem': 0.4, 'block_0': 0.4, 'top': 4.0}

    Args:
        groups: labels from stem to top; a single one has the highest rate.
        lowest: rate of the first group; None gives every group but the last a tenth of `highest`.
        highest: rate of the last group.

    Raises:
        ValueError: a rate is not above 0, or the lowest is above the highest.

    Reference: fastai 2, `slice(lowest, highest)` and `slice(highest)` of `Learner.fit`, whose last
    group is the head; here heads have a rate of their own.
    """
    if not 0 < (highest if lowest is None else lowest) <= highest:
        raise ValueError(
            f"the rates spread from {lowest} to {highest}; give a pair (lowest, highest) of rates "
            "above 0, the lower one first"
        )
    if lowest is None:
        return {**dict.fromkeys(groups[:-1], highest / 10), **dict.fromkeys(groups[-1:], highest)}
    return discriminative(groups, highest, (lowest / highest) ** (1 / max(len(groups) - 1, 1)))


def peaks(
    groups: Sequence[str],
    rate: float | int | Sequence[Any],
    decay: float | int | None,
    *,
    default: float | int = 1.0,
) -> dict[str, Any]:
    """Return the peak of each group: `discriminative` of a number, `spread_rates` of a pair.

    Args:
        groups: labels from stem to top.
        rate: of the last group; or (lowest, highest).
        decay: factor from each group to the one below it; None for a pair.
        default: the decay of a number where `decay` is None.

    >>> peaks(["stem", "top"], 4.0, 0.5), peaks(["stem", "top"], (1.0, 4.0), None)
    ({'stem': 2.0, 'top': 4.0}, {'stem': 1.0, 'top': 4.0})

    Raises:
        ValueError: a pair together with a decay, or no pair of rates.
    """
    if isinstance(rate, int | float):
        return discriminative(groups, rate, default if decay is None else decay)
    if len(rate) != 2 or decay is not None:
        raise ValueError(
            f"the rate is {tuple(rate)} and the decay {decay}; give one rate and a decay, or a "
            "pair (lowest, highest), which says itself how the rates fall"
        )
    return spread_rates(groups, *rate)


def highest(rate: float | int | Sequence[Any]) -> float | int:
    """Return a rate, or the second of a pair.

    >>> highest(0.5), highest((0.1, 0.5))
    (0.5, 0.5)
    """
    return rate if isinstance(rate, int | float) else rate[-1]


def curved(
    peaks: Mapping[str, float | int],
    schedule: str | Mapping[str, Any],
    warmup: Span | None,
    *,
    opening: Span | None = None,
    before: Collection[str] = (),
) -> dict[str, Rate]:
    """Return a schedule for each label.

    Args:
        peaks: highest rate of each label.
        schedule: as for `schedules.curve`.
        warmup: of all labels; None takes the schedule's own.
        opening: warm-up of the labels that `before` lacks; those in it then have none. None makes
            no difference between them.
        before: labels that were live in the phase before.

    >>> made = curved({"top": 1.0, "head": 2.0}, "warmup_linear", 0.1, opening=0.5, before={"head"})
    >>> made["top"].warmup, made["head"].warmup
    (0.5, 0.0)
    """
    own = opening is not None and len(before) > 0
    warmups = {name: (0.0 if name in before else opening) if own else warmup for name in peaks}
    return {n: schedules.curve(schedule, peak, warmup=warmups[n]) for n, peak in peaks.items()}
