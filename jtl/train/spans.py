"""Lengths as a person writes them: a fraction of the phase, or steps, epochs or examples.

A span is a number below 1, or a text with a unit: 0.1, "100 steps", "0.5 epochs", "640 examples".
It stands in configs and on the command line; `in_steps` makes it steps once the data are known.
"""

import re
from typing import NamedTuple

Span = float | int | str

UNITS = ("steps", "epochs", "examples")
_TEXT = re.compile(r"\s*([0-9][0-9_.]*(?:[eE][+-]?[0-9]+)?)\s*(step|epoch|example)s?\s*")


class Length(NamedTuple):
    """A number and its unit, "fraction" or one of `UNITS`."""

    number: float
    unit: str


def parse(span: Span, what: str) -> Length:
    """Return number and unit of a span.

    Args:
        span: a fraction in [0, 1), or a number and a unit.
        what: what the span is of, for errors.

    >>> parse(0.25, "warmup"), parse("1_000 steps", "warmup")
    (Length(number=0.25, unit='fraction'), Length(number=1000.0, unit='steps'))

    Raises:
        ValueError: a number that is no fraction below 1, or a text without number and unit.
    """
    if not isinstance(span, str):
        if not 0.0 <= span < 1.0:
            raise ValueError(
                f"{what} is a fraction of the phase, and {span} is given; take one in [0, 1), "
                f"or give it a unit, '{span} steps'"
            )
        return Length(float(span), "fraction")
    found = _TEXT.fullmatch(span)
    try:
        return Length(float(found[1]), found[2] + "s") if found else _refuse(span, what)
    except ValueError:
        return _refuse(span, what)


def in_steps(
    span: Span,
    total: int,
    what: str,
    *,
    steps_per_epoch: int | None = None,
    examples_per_epoch: int | None = None,
) -> int:
    """Return a span inside a phase of `total` steps, in steps; it is shorter than the phase.

    Args:
        span: as for `parse`.
        total: steps of the phase.
        what: what the span is of, for errors.
        steps_per_epoch: needed for epochs and examples.
        examples_per_epoch: needed for examples.

    >>> in_steps("0.5 epochs", 30, "warmup", steps_per_epoch=10)
    5
    >>> in_steps("640 examples", 30, "warmup", steps_per_epoch=10, examples_per_epoch=320)
    20

    Raises:
        ValueError: as `parse`; the span is not below the phase; its unit cannot be converted here.
    """
    length = parse(span, what)
    if length.unit == "fraction":
        return min(round(length.number * total), total - 1)
    steps = round(
        to_steps(
            length.number,
            length.unit,
            f"{what} {span!r}",
            steps_per_epoch=steps_per_epoch,
            examples_per_epoch=examples_per_epoch,
        )
    )
    if steps >= total:
        raise ValueError(
            f"{what} is {span!r}, {steps} steps, and the phase has {total}; take less of it, or "
            "make the phase longer"
        )
    return steps


def to_steps(
    number: float | int,
    unit: str,
    what: str,
    *,
    steps_per_epoch: int | None = None,
    examples_per_epoch: int | None = None,
) -> float:
    """Return so many steps, epochs or examples in steps, not rounded.

    >>> to_steps(96, "examples", "length", steps_per_epoch=10, examples_per_epoch=320)
    3.0

    Raises:
        ValueError: the steps or examples of an epoch are needed and not given.
    """
    if unit == "steps":
        return float(number)
    known = {"epochs": steps_per_epoch, "examples": steps_per_epoch and examples_per_epoch}[unit]
    if steps_per_epoch is None or known is None:
        needed = "steps_per_epoch" if unit == "epochs" else "steps_per_epoch and examples_per_epoch"
        raise ValueError(
            f"{what} counts {unit}, and how many steps these are is not known here; give {needed}, "
            "or count steps"
        )
    epochs = number if unit == "epochs" else number / known
    return float(epochs * steps_per_epoch)


def _refuse(span: str, what: str) -> Length:
    raise ValueError(
        f"{what} is {span!r}; a span is a fraction in [0, 1), or a number and a unit of "
        f"{list(UNITS)}, such as '100 steps' or '0.5 epochs'; write it so"
    )
