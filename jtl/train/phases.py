"""Builders of plans: plain lists of phases, to be edited freely before a run.

Every builder takes `groups`, the labels of the backbone in order of depth (stem to top), and
`heads`, the labels of the heads.
"""

from collections.abc import Mapping, Sequence

from jtl.train import schedules
from jtl.train.plan import EarlyStop, Phase, Plan, Plateau, check_plan, ever_live, length
from jtl.train.schedules import Rate

__all__ = [
    "EarlyStop",
    "Phase",
    "Plan",
    "Plateau",
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
]


def discriminative(groups: Sequence[str], rate: Rate, decay: float | int) -> dict[str, Rate]:
    """Return rates that fall from the top: `rate * decay^d` for the group d below the last one.

    >>> discriminative(["stem", "block_0", "block_1"], 8.0, 0.5)
    {'stem': 2.0, 'block_0': 4.0, 'block_1': 8.0}

    Reference: Howard and Ruder 2018, arXiv:1801.06146, section 3.2 (decay 1/2.6 there).
    """
    depth = len(groups) - 1
    return {label: schedules.scale(rate, decay ** (depth - i)) for i, label in enumerate(groups)}


def feature_extraction(
    groups: Sequence[str],
    heads: Sequence[str],
    *,
    head_rate: float | int = 1e-3,
    epochs: float | int = 10,
    schedule: str = "constant",
    warmup: float | int | None = None,
    patience: int | None = None,
) -> list[Phase]:
    """Return one phase that trains the heads on the held backbone.

    >>> [phase.live for phase in feature_extraction(["stem", "block_0"], ["head"])]
    [frozenset({'head'})]
    """
    del groups
    rates = _flat(heads, schedules.curve(schedule, head_rate, warmup=warmup))
    return [Phase("head", rates, epochs, until=_early(patience))]


def last_groups(
    groups: Sequence[str],
    heads: Sequence[str],
    *,
    n: int = 2,
    rate: float | int = 5e-5,
    head_rate: float | int = 1e-3,
    decay: float | int = 1.0,
    epochs: float | int = 3,
    schedule: str = "warmup_linear",
    warmup: float | int | None = None,
    patience: int | None = None,
) -> list[Phase]:
    """Return one phase that trains the heads and the last `n` groups below them.

    Args:
        groups: labels from stem to top.
        heads: labels of the heads.
        n: number of groups.
        rate: peak rate of the last group.
        head_rate: peak rate of the heads.
        decay: factor on the rate from each group to the one below it.
        epochs: longest length.
        schedule: a name in `schedules.KINDS`.
        warmup: fraction of the phase; None takes the schedule's own.
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
    make = _maker(schedule, warmup)
    rates = discriminative(groups[-n:], make(rate), decay) | _flat(heads, make(head_rate))
    return [Phase(f"last_{n}", rates, epochs, until=_early(patience))]


def full(
    groups: Sequence[str],
    heads: Sequence[str],
    *,
    rate: float | int = 5e-5,
    head_rate: float | int = 1e-3,
    decay: float | int = 1.0,
    epochs: float | int = 3,
    schedule: str = "warmup_linear",
    warmup: float | int | None = None,
    patience: int | None = None,
) -> list[Phase]:
    """Return one phase that trains everything; arguments as in `last_groups`.

    >>> full(["stem", "block_0"], ["head"], decay=0.5, schedule="constant")[0].rates
    {'stem': 2.5e-05, 'block_0': 5e-05, 'head': 0.001}
    """
    make = _maker(schedule, warmup)
    rates = discriminative(groups, make(rate), decay) | _flat(heads, make(head_rate))
    return [Phase("all", rates, epochs, until=_early(patience))]


def linear_probe_then_finetune(
    groups: Sequence[str],
    heads: Sequence[str],
    *,
    rate: float | int = 5e-5,
    head_rate: float | int = 1e-3,
    decay: float | int = 1.0,
    head_epochs: float | int = 5,
    epochs: float | int = 3,
    schedule: str = "warmup_linear",
    warmup: float | int | None = None,
    patience: int | None = None,
) -> list[Phase]:
    """Return two phases: the heads on the held backbone, then everything at `rate`, heads too.

    >>> [phase.name for phase in linear_probe_then_finetune(["stem"], ["head"])]
    ['head', 'all']

    Reference: Kumar et al. 2022, arXiv:2202.10054.
    """
    options = {"schedule": schedule, "warmup": warmup, "patience": patience}
    return [
        *feature_extraction(groups, heads, head_rate=head_rate, epochs=head_epochs, **options),
        *full(groups, heads, rate=rate, head_rate=rate, decay=decay, epochs=epochs, **options),
    ]


def gradual_unfreeze(
    groups: Sequence[str],
    heads: Sequence[str],
    *,
    rate: float | int = 5e-5,
    head_rate: float | int = 1e-3,
    decay: float | int = 1 / 2.6,
    per_phase: int = 1,
    head_epochs: float | int = 1,
    epochs: float | int = 1,
    schedule: str = "slanted_triangular",
    warmup: float | int | None = None,
) -> list[Phase]:
    """Return the heads alone, then `per_phase` more groups opened from the top in each phase.

    Args:
        groups: labels from stem to top.
        heads: labels of the heads; they train in every phase.
        rate: peak rate of the last group.
        head_rate: peak rate of the heads.
        decay: factor on the rate from each group to the one below it.
        per_phase: groups that each phase opens.
        head_epochs: length of the first phase.
        epochs: length of each later phase.
        schedule: a name in `schedules.KINDS`.
        warmup: fraction of each phase; None takes the schedule's own.

    >>> [sorted(phase.live) for phase in gradual_unfreeze(["stem", "block_0"], ["head"])]
    [['head'], ['block_0', 'head'], ['block_0', 'head', 'stem']]

    Reference: Howard and Ruder 2018, arXiv:1801.06146, section 3.3.
    """
    make = _maker(schedule, warmup)
    body, top = discriminative(groups, make(rate), decay), _flat(heads, make(head_rate))
    opened = _opened(groups, body, top, per_phase)
    return [Phase("head", top, head_epochs), *(Phase(name, r, epochs) for name, r in opened)]


def progressive(
    groups: Sequence[str],
    heads: Sequence[str],
    *,
    head_rate: float | int = 1e-3,
    rate: float | int = 5e-5,
    final_rate: float | int = 1e-5,
    decay: float | int = 0.9,
    per_phase: int = 1,
    head_epochs: float | int = 3,
    epochs: float | int = 1,
    final_epochs: float | int = 2,
    patience: int = 1,
    min_delta: float | int = 0.0,
    schedule: str = "warmup_linear",
    warmup: float | int | None = None,
) -> list[Phase]:
    """Return heads, then groups opened from the top while the metric rises, then everything slowly.

    The lowest group, the stem, moves in the last phase alone. The best weights are restored at the
    end of every phase. The opening phases are one series: the first that does not raise the metric
    ends it.

    Args:
        groups: labels from stem to top.
        heads: labels of the heads; they train in every phase.
        head_rate: peak rate of the heads while groups are opened, and before.
        rate: peak rate of the last group while groups are opened.
        final_rate: peak rate of the last group and of the heads in the last phase.
        decay: factor on the rate from each group to the one below it.
        per_phase: groups that each phase opens.
        head_epochs: longest length of the first phase.
        epochs: longest length of each opening phase.
        final_epochs: longest length of the last phase.
        patience: epochs without a rise that end a phase early.
        min_delta: a rise of the metric smaller than this is none.
        schedule: a name in `schedules.KINDS`.
        warmup: fraction of each phase; None takes the schedule's own.

    >>> [phase.name for phase in progressive(["stem", "block_0", "block_1"], ["head"], per_phase=2)]
    ['head', 'open_block_0', 'all']
    """
    make = _maker(schedule, warmup)
    body, top = discriminative(groups, make(rate), decay), _flat(heads, make(head_rate))
    last = discriminative(groups, make(final_rate), decay) | _flat(heads, make(final_rate))
    early, plateau = EarlyStop(patience, min_delta), Plateau(patience, min_delta)
    return [
        Phase("head", top, head_epochs, until=early),
        *(
            Phase(name, rates, epochs, until=plateau, series="opening")
            for name, rates in _opened(groups[1:], body, top, per_phase)
        ),
        Phase("all", last, final_epochs, until=early),
    ]


def _flat(heads: Sequence[str], rate: Rate) -> dict[str, Rate]:
    return dict.fromkeys(heads, rate)


def _maker(schedule: str, warmup: float | None):
    return lambda peak: schedules.curve(schedule, peak, warmup=warmup)


def _early(patience: int | None) -> EarlyStop | None:
    return None if patience is None else EarlyStop(patience)


def _opened(
    groups: Sequence[str], body: Mapping[str, Rate], top: Mapping[str, Rate], per_phase: int
) -> list[tuple[str, dict[str, Rate]]]:
    """Return (name, rates) for each opening, named after the lowest group that it opens."""
    if per_phase < 1:
        raise ValueError(f"per_phase is {per_phase}; each phase opens 1 group at least")
    lowest = range(len(groups) - per_phase, -per_phase, -per_phase)
    opened = [groups[max(low, 0) :] for low in lowest]
    return [(f"open_{part[0]}", {g: body[g] for g in part} | dict(top)) for part in opened]
