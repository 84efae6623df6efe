"""Builders of plans: plain lists of phases, to be edited freely before a run.

Every builder takes `groups`, the labels of the backbone in order of depth (stem to top), and
`heads`, the labels of the heads. In all of them

    rate      of the last group, those below fall by `decay`; or a pair (lowest, highest) from the
              lowest group that moves to the last (`rates.spread_rates`), without a decay
    schedule  a name in `schedules.KINDS`, or a dict of it and its options, {"kind": "one_cycle",
              "start": 0.1}
    warmup    a fraction of each phase, or "100 steps", "0.5 epochs", "640 examples"; None takes the
              schedule's own
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jtl.train import rates
from jtl.train.by_hand import by_hand
from jtl.train.plan import EarlyStop, Phase, Plan, Plateau, check_plan, ever_live, length
from jtl.train.rates import Pair, discriminative, spread_rates
from jtl.train.schedules import Rate
from jtl.train.spans import Span

Schedule = str | Mapping[str, Any]

__all__ = [
    "EarlyStop",
    "Phase",
    "Plan",
    "Plateau",
    "by_hand",
    "check_plan",
    "discriminative",
    "ever_live",
    "feature_extraction",
    "full",
    "gradual_unfreeze",
    "last_groups",
    "length",
    "linear_probe_then_finetune",
    "progressive",
    "spread_rates",
]


def feature_extraction(
    groups: Sequence[str],
    heads: Sequence[str],
    *,
    head_rate: float | int = 1e-3,
    epochs: float | int = 10,
    schedule: Schedule = "constant",
    warmup: Span | None = None,
    patience: int | None = None,
) -> list[Phase]:
    """Return one phase that trains the heads on the held backbone.

    >>> [phase.live for phase in feature_extraction(["stem", "block_0"], ["head"])]
    [frozenset({'head'})]
    """
    del groups
    made = rates.curved(dict.fromkeys(heads, head_rate), schedule, warmup)
    return [Phase("head", made, epochs, until=_early(patience))]


def last_groups(
    groups: Sequence[str],
    heads: Sequence[str],
    *,
    n: int = 2,
    rate: float | int | Pair = 5e-5,
    head_rate: float | int = 1e-3,
    decay: float | int | None = None,
    epochs: float | int = 3,
    schedule: Schedule = "warmup_linear",
    warmup: Span | None = None,
    patience: int | None = None,
) -> list[Phase]:
    """Return one phase that trains the heads and the last `n` groups below them.

    Args:
        groups: labels from stem to top.
        heads: labels of the heads.
        n: number of groups.
        rate: peak rate of the last group, or a pair (lowest, highest).
        head_rate: peak rate of the heads.
        decay: factor on the rate from each group to the one below it; None is 1.
        epochs: longest length.
        schedule: a name in `schedules.KINDS`, or a dict of it and its options.
        warmup: fraction of the phase, or a span with a unit; None takes the schedule's own.
        patience: epochs without a rise that end the phase early; None runs the full length.

    Raises:
        ValueError: `n` is not between 1 and the number of groups.

    >>> last_groups(["stem", "block_0", "block_1"], ["head"], n=1)[0].live == {"block_1", "head"}
    True
    """
    if not 1 <= n <= len(groups):
        raise ValueError(
            f"last_groups opens n={n} groups; the backbone has {len(groups)}, {list(groups)}; "
            "take n in between, or `feature_extraction` for none"
        )
    peaks = rates.peaks(groups[-n:], rate, decay) | dict.fromkeys(heads, head_rate)
    made = rates.curved(peaks, schedule, warmup)
    return [Phase(f"last_{n}", made, epochs, until=_early(patience))]


def full(
    groups: Sequence[str],
    heads: Sequence[str],
    *,
    rate: float | int | Pair = 5e-5,
    head_rate: float | int = 1e-3,
    decay: float | int | None = None,
    epochs: float | int = 3,
    schedule: Schedule = "warmup_linear",
    warmup: Span | None = None,
    patience: int | None = None,
) -> list[Phase]:
    """Return one phase that trains everything; arguments as in `last_groups`.

    >>> full(["stem", "block_0"], ["head"], decay=0.5, schedule="constant")[0].rates
    {'stem': 2.5e-05, 'block_0': 5e-05, 'head': 0.001}
    """
    peaks = rates.peaks(groups, rate, decay) | dict.fromkeys(heads, head_rate)
    made = rates.curved(peaks, schedule, warmup)
    return [Phase("all", made, epochs, until=_early(patience))]


def linear_probe_then_finetune(
    groups: Sequence[str],
    heads: Sequence[str],
    *,
    rate: float | int | Pair = 5e-5,
    head_rate: float | int = 1e-3,
    decay: float | int | None = None,
    head_epochs: float | int = 5,
    epochs: float | int = 3,
    schedule: Schedule = "warmup_linear",
    warmup: Span | None = None,
    patience: int | None = None,
) -> list[Phase]:
    """Return two phases: the heads on the held backbone, then everything at `rate`, heads too.

    >>> [phase.name for phase in linear_probe_then_finetune(["stem"], ["head"])]
    ['head', 'all']

    Reference: Kumar et al. 2022, arXiv:2202.10054.
    """
    options: dict[str, Any] = {"schedule": schedule, "warmup": warmup, "patience": patience}
    top = rates.highest(rate)
    return [
        *feature_extraction(groups, heads, head_rate=head_rate, epochs=head_epochs, **options),
        *full(groups, heads, rate=rate, head_rate=top, decay=decay, epochs=epochs, **options),
    ]


def gradual_unfreeze(
    groups: Sequence[str],
    heads: Sequence[str],
    *,
    rate: float | int | Pair = 5e-5,
    head_rate: float | int = 1e-3,
    decay: float | int | None = None,
    per_phase: int = 1,
    head_epochs: float | int = 1,
    epochs: float | int = 1,
    schedule: Schedule = "slanted_triangular",
    warmup: Span | None = None,
    opening_warmup: Span | None = None,
) -> list[Phase]:
    """Return the heads alone, then `per_phase` more groups opened from the top in each phase.

    Args:
        groups: labels from stem to top.
        heads: labels of the heads; they train in every phase.
        rate: peak rate of the last group, or a pair (lowest, highest).
        head_rate: peak rate of the heads.
        decay: factor on the rate from each group to the one below it; None is 1/2.6.
        per_phase: groups that each phase opens.
        head_epochs: length of the first phase.
        epochs: length of each later phase.
        schedule: a name in `schedules.KINDS`, or a dict of it and its options.
        warmup: fraction of each phase, or a span with a unit; None takes the schedule's own.
        opening_warmup: warm-up of the labels that a phase opens, while those already live go on
            without one; None warms all of them up alike.

    >>> [sorted(phase.live) for phase in gradual_unfreeze(["stem", "block_0"], ["head"])]
    [['head'], ['block_0', 'head'], ['block_0', 'head', 'stem']]

    Reference: Howard and Ruder 2018, arXiv:1801.06146, section 3.3.
    """
    peaks = rates.peaks(groups, rate, decay, default=1 / 2.6)
    top = dict.fromkeys(heads, head_rate)
    opened = _opened(groups, peaks, top, per_phase)
    stretches = [top, *opened.values()]
    made = _warmed(stretches, [(), *stretches], schedule, warmup, opening_warmup)
    lengths = [head_epochs, *[epochs] * len(opened)]
    return [Phase(*parts) for parts in zip(("head", *opened), made, lengths, strict=True)]


def progressive(
    groups: Sequence[str],
    heads: Sequence[str],
    *,
    head_rate: float | int = 1e-3,
    rate: float | int | Pair = 5e-5,
    final_rate: float | int | Pair = 1e-5,
    decay: float | int | None = None,
    per_phase: int = 1,
    head_epochs: float | int = 3,
    epochs: float | int = 1,
    final_epochs: float | int = 2,
    patience: int = 1,
    min_delta: float | int = 0.0,
    schedule: Schedule = "warmup_linear",
    warmup: Span | None = None,
    opening_warmup: Span | None = None,
) -> list[Phase]:
    """Return heads, then groups opened from the top while the metric rises, then everything slowly.

    The lowest group, the stem, moves in the last phase alone. The best weights are restored at the
    end of every phase. The opening phases are one series: the first that does not raise the metric
    ends it.

    Args:
        groups: labels from stem to top.
        heads: labels of the heads; they train in every phase.
        head_rate: peak rate of the heads while groups are opened, and before.
        rate: peak rate of the last group while groups are opened, or a pair (lowest, highest).
        final_rate: peak rate of the last group and of the heads in the last phase, or a pair.
        decay: factor on the rate from each group to the one below it; None is 0.9.
        per_phase: groups that each phase opens.
        head_epochs: longest length of the first phase.
        epochs: longest length of each opening phase.
        final_epochs: longest length of the last phase.
        patience: epochs without a rise that end a phase early.
        min_delta: a rise of the metric smaller than this is none.
        schedule: a name in `schedules.KINDS`, or a dict of it and its options.
        warmup: fraction of each phase, or a span with a unit; None takes the schedule's own.
        opening_warmup: warm-up of the labels that a phase opens, while those already live go on
            without one; None warms all of them up alike. The last phase
            takes for open what no plateau can have skipped.

    >>> [phase.name for phase in progressive(["stem", "block_0", "block_1"], ["head"], per_phase=2)]
    ['head', 'open_block_0', 'all']
    """
    top = dict.fromkeys(heads, head_rate)
    opened = _opened(groups[1:], rates.peaks(groups, rate, decay, default=0.9), top, per_phase)
    last = rates.peaks(groups, final_rate, decay, default=0.9)
    last |= dict.fromkeys(heads, rates.highest(final_rate))
    stretches = [top, *opened.values(), last]
    sure = next(iter(opened.values()), top)  # a plateau may skip every opening but the first
    before = [(), *stretches[:-2], sure]
    made = _warmed(stretches, before, schedule, warmup, opening_warmup)
    early, plateau = EarlyStop(patience, min_delta), Plateau(patience, min_delta)
    return [
        Phase("head", made[0], head_epochs, until=early),
        *(
            Phase(name, moving, epochs, until=plateau, series="opening")
            for name, moving in zip(opened, made[1:-1], strict=True)
        ),
        Phase("all", made[-1], final_epochs, until=early),
    ]


def _early(patience: int | None) -> EarlyStop | None:
    return None if patience is None else EarlyStop(patience)


def _opened(
    groups: Sequence[str], peaks: Mapping[str, Any], top: Mapping[str, Any], per_phase: int
) -> dict[str, dict[str, Any]]:
    """Return {name: peaks} of each opening, named after the lowest group that it opens."""
    if per_phase < 1:
        raise ValueError(f"per_phase is {per_phase}; each phase opens 1 group at least")
    lowest = range(len(groups) - per_phase, -per_phase, -per_phase)
    opened = [groups[max(low, 0) :] for low in lowest]
    return {f"open_{part[0]}": {g: peaks[g] for g in part} | dict(top) for part in opened}


def _warmed(
    stretches: Sequence[Mapping[str, Any]],
    before: Sequence[Collection[str]],
    schedule: Schedule,
    warmup: Span | None,
    opening: Span | None,
) -> list[dict[str, Rate]]:
    """Return the schedules of each phase from its peaks and what was live before it."""
    return [
        rates.curved(peaks, schedule, warmup, opening=opening, before=known)
        for peaks, known in zip(stretches, before, strict=False)
    ]
