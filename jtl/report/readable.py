"""How numbers read: figures, intervals, durations, counts, bytes, rates."""

import math
from collections.abc import Iterable, Sequence

NOTHING = "-"
PERCENT = ("accuracy", "calibration_error", "macro_f1")
_WORDS = {"macro_f1": "macro F1", "r2": "R2", "rmse": "root mean squared error"}


def words(metric: str) -> str:
    """Return what a figure is called in a text.

    >>> words("macro_f1"), words("calibration_error")
    ('macro F1', 'calibration error')
    """
    return _WORDS.get(metric, metric.replace("_", " "))


def figure(metric: str, value: float | int | None) -> str:
    """Return a metric's value: in percent where it is a share, else with three decimals.

    >>> figure("accuracy", 0.8214), figure("r2", 0.8214), figure("accuracy", None)
    ('82.1 %', '0.821', '-')
    """
    if value is None or math.isnan(value):
        return NOTHING
    return f"{100 * value:.1f} %" if metric in PERCENT else f"{value:.3f}"


def interval(metric: str, bounds: Sequence[float | int] | None) -> str:
    """Return an interval, the unit once.

    >>> interval("accuracy", (0.804, 0.8392)), interval("r2", (-0.1, 0.2))
    ('80.4 to 83.9 %', '-0.100 to 0.200')
    """
    if bounds is None:
        return NOTHING
    low, high = (figure(metric, bound) for bound in bounds)
    return f"{low.removesuffix(' %')} to {high}"


def difference(metric: str, value: float | int, *, unit: bool = True) -> str:
    """Return a signed difference of two figures, in points where the figures are percent.

    >>> difference("accuracy", 0.0312), difference("r2", -0.05, unit=False)
    ('+3.1 points', '-0.050')
    """
    if metric not in PERCENT:
        return f"{value:+.3f}"
    return f"{100 * value:+.1f}" + (" points" if unit else "")


def seconds(value: float | int | None) -> str:
    """Return a measured duration.

    >>> seconds(0.034), seconds(14.23), seconds(192)
    ('0.03 s', '14.2 s', '3 min 12 s')
    """
    if value is None:
        return NOTHING
    if value < 1:
        return f"{value:.2f} s"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def clock(value: float | int | None) -> str:
    """Return a remaining time as on a clock.

    >>> clock(14.2), clock(192), clock(7384), clock(None)
    ('0:14', '3:12', '2:03:04', '-:--')
    """
    if value is None:
        return "-:--"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(value: float | int | None) -> str:
    """Return a whole number with thousands apart.

    >>> count(22713216)
    '22,713,216'
    """
    return NOTHING if value is None else f"{value:,.0f}"


def magnitude(value: float | int | None, unit: str = "") -> str:
    """Return three digits and the power of a thousand.

    >>> magnitude(22713216), magnitude(4.1e10, "FLOP"), magnitude(590, "B"), magnitude(0, "B")
    ('22.7 M', '41.0 GFLOP', '590 B', '0 B')
    """
    if value is None or math.isnan(value):
        return NOTHING
    powers = ["", "k", "M", "G", "T", "P"]
    while abs(value) >= 999.5 and len(powers) > 1:
        value = value / 1000
        powers.pop(0)
    digits = f"{value:.1f}" if powers[0] and abs(value) < 99.95 else f"{value:.0f}"
    return f"{digits} {powers[0]}{unit}".strip()


def rate(value: float | int | None) -> str:
    """Return a learning rate; None is a rate that is not known before it runs.

    >>> rate(2e-05), rate(0.00081), rate(0.0), rate(None)
    ('2e-05', '8.1e-04', '0', 'schedule')
    """
    if value is None or math.isnan(value):
        return "schedule"
    if value == 0:
        return "0"
    return f"{value:.1e}".replace(".0e", "e")


def plural(number: float | int, word: str) -> str:
    """Return a number with its noun.

    >>> plural(1, "epoch"), plural(2.5, "epoch"), plural(1200, "step")
    ('1 epoch', '2.5 epochs', '1,200 steps')
    """
    return f"{number:,g} {word}{'' if number == 1 else 's'}"


def in_order(labels: Iterable[str], order: Sequence[str]) -> list[str]:
    """Return labels as they stand in `order`; others come last, by name and number.

    >>> in_order({"head", "block_10", "block_9"}, ["stem", "block_9", "block_10"])
    ['block_9', 'block_10', 'head']
    """
    place = {label: i for i, label in enumerate(order)}
    return sorted(labels, key=lambda label: (place.get(label, len(place)), _numbered(label)))


def spans(labels: Sequence[str]) -> str:
    """Return labels with runs of the same name and rising numbers written as one.

    >>> spans(["stem", "block_0", "block_1", "block_2", "head"])
    'stem, block_0..2, head'
    """
    runs: list[list[str]] = []
    for label in labels:
        if runs and _follows(runs[-1][-1], label):
            runs[-1].append(label)
        else:
            runs.append([label])
    written = [
        f"{run[0]}..{run[-1].rpartition('_')[2]}" if len(run) > 2 else ", ".join(run)
        for run in runs
    ]
    return ", ".join(written)


def _numbered(label: str) -> tuple[str, int]:
    stem, _, number = label.rpartition("_")
    return (stem, int(number)) if stem and number.isdigit() else (label, -1)


def _follows(first: str, second: str) -> bool:
    stem, _, number = first.rpartition("_")
    return bool(stem) and number.isdigit() and second == f"{stem}_{int(number) + 1}"
