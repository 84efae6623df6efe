"""Rates over a phase: a float, an optax schedule of steps, or a `Curve` in fractions of the length.

A curve knows no number of steps, so it stands in configs; `resolve` turns it into an optax schedule
once the length of its phase is known. Steps count from the start of the phase.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from jtl import near
from jtl.train import spans
from jtl.train.curves import (
    constant,
    flat_cosine,
    one_cycle,
    slanted_triangular,
    warmup_cosine,
    warmup_linear,
)
from jtl.train.spans import Span


class Curve(NamedTuple):
    """A schedule described by fractions of its phase; None takes the default of its kind.

    Attributes:
        kind: a name in `KINDS`.
        peak: the highest rate.
        warmup: how long the rate rises to the peak: a fraction of the phase, or a text with a unit,
            "100 steps", "0.5 epochs", "640 examples".
        end: rate at the end of the phase (and at the start of a slanted triangle), as a fraction of
            the peak.
        start: rate at the start of a `one_cycle`, as a fraction of the peak.
        flat: where the fall of a `flat_cosine` begins, as `warmup`.
    """

    kind: str
    peak: float
    warmup: Span | None = None
    end: float | None = None
    start: float | None = None
    flat: Span | None = None


Rate = float | int | Curve | Callable

KINDS: dict[str, Callable[..., optax.Schedule]] = {
    "constant": constant,
    "flat_cosine": flat_cosine,
    "one_cycle": one_cycle,
    "slanted_triangular": slanted_triangular,
    "warmup_cosine": warmup_cosine,
    "warmup_linear": warmup_linear,
}


def curve(
    kind: str | Mapping[str, Any],
    peak: float | int,
    *,
    warmup: Span | None = None,
    end: float | int | None = None,
    start: float | int | None = None,
    flat: Span | None = None,
) -> Rate:
    """Return the rate that a config names: a float where it is constant without warm-up.

    Args:
        kind: a name in `KINDS`, or a dict of the kind and its options; those given beside it win.
        peak: the highest rate.
        warmup: as in `Curve`, like the other options.
        end: rate at the end, as a fraction of the peak.
        start: rate at the start of a `one_cycle`, as a fraction of the peak.
        flat: where the fall of a `flat_cosine` begins.

    >>> curve("constant", 0.5)
    0.5
    >>> curve({"kind": "flat_cosine", "flat": 0.5}, 4.0, warmup="10 steps") == Curve(
    ...     "flat_cosine", 4.0, warmup="10 steps", flat=0.5
    ... )
    True

    Raises:
        ValueError: the kind is not known or has no such option; a span that cannot be read.
    """
    given = {"warmup": warmup, "end": end, "start": start, "flat": flat}
    name, options = _shape(kind)
    options |= {name: value for name, value in given.items() if value is not None}
    _check_options(name, options)
    if name == "constant" and not options.get("warmup") and options.get("end", 1.0) == 1.0:
        return peak
    return Curve(name, peak, **options)


def resolve(
    rate: Rate,
    steps: int,
    *,
    steps_per_epoch: int | None = None,
    examples_per_epoch: int | None = None,
) -> Rate:
    """Return a float, or a schedule: a curve becomes an optax schedule over `steps` steps.

    Args:
        rate: a float, a curve, or a schedule, which stays as it is.
        steps: of the phase.
        steps_per_epoch: needed where the curve counts epochs or examples.
        examples_per_epoch: needed where it counts examples.

    >>> float(resolve(Curve("warmup_linear", 4.0, warmup=0.2), 10)(1))
    2.0
    >>> float(resolve(Curve("warmup_linear", 4.0, warmup="0.5 epochs"), 10, steps_per_epoch=4)(1))
    2.0

    Raises:
        ValueError: the curve names no known schedule or option; a span that does not fit.
    """
    if not isinstance(rate, Curve):
        return rate if callable(rate) else float(rate)
    options = _options(rate)
    _check_options(rate.kind, options)
    per_epoch = {"steps_per_epoch": steps_per_epoch, "examples_per_epoch": examples_per_epoch}
    for name in _SPANS & options.keys():
        options[name] = spans.in_steps(options[name], steps, name, **per_epoch) / steps
    return _kind(rate.kind)(rate.peak, steps, **options)


def check(rate: Rate) -> None:
    """Refuse a curve that no phase can resolve.

    >>> check(Curve("one_cycle", 0.1, start=0.1))

    Raises:
        ValueError: its kind is not known or has no such option; a span that cannot be read.
    """
    if isinstance(rate, Curve):
        _check_options(rate.kind, _options(rate))


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


def _shape(kind: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(kind, str):
        return kind, {}
    if "kind" not in kind:
        raise ValueError(
            f"a schedule has the fields {sorted(kind)} and no kind; add kind= one of "
            f"{sorted(KINDS)}"
        )
    return kind["kind"], {name: value for name, value in kind.items() if name != "kind"}


_SPANS = frozenset({"warmup", "flat"})


def _options(curve: Curve) -> dict[str, Any]:
    fields = curve._asdict().items()
    return {
        name: value for name, value in fields if name not in ("kind", "peak") and value is not None
    }


def _check_options(kind: str, options: Mapping[str, Any]) -> None:
    known = [
        n for n, p in inspect.signature(_kind(kind)).parameters.items() if p.kind is p.KEYWORD_ONLY
    ]
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"schedule {kind!r} has no option {name!r}; it has {sorted(known)}"
                f"{near.nearest(name, known)}"
            )
        if name in _SPANS:
            spans.parse(value, name)
