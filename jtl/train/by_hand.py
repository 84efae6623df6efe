"""Any list of phases, written in a config: patterns over labels, lengths, and how a phase ends.

plan=dict(kind="phases", phases=(
    dict(name="head", rates={"head": 1e-3}, epochs=2, until=dict(kind="early_stop")),
    dict(name="top", rates={"head": 1e-3, "block_*": (1e-5, 1e-4)}, steps=500),
))
"""

import fnmatch
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from jtl import near
from jtl.train import rates, schedules
from jtl.train.plan import EarlyStop, Phase, Plateau
from jtl.train.schedules import Rate

UNTIL = {"early_stop": EarlyStop, "plateau": Plateau}


def by_hand(
    groups: Sequence[str], heads: Sequence[str], *, phases: Sequence[Mapping[str, Any] | Phase]
) -> list[Phase]:
    """Return the phases that a config spells out.

    A phase is a dict of the fields of `Phase`. `rates` maps labels, or patterns with `*` and `?`,
    to a number, a pair (lowest, highest) over what the pattern matches from stem to top, or a dict
    {"kind", "peak", "decay", and the options of `schedules.curve`} with `peak` a number or a pair.
    A label's own name goes before patterns. `until` is {"kind": "early_stop" or "plateau",
    "patience", "min_delta"}.

    Args:
        groups: labels of the backbone from stem to top.
        heads: labels of the heads.
        phases: in order; those that are a `Phase` already stay as they are.

    >>> given = {"b_*": {"peak": 4.0, "decay": 0.5}, "head": 8.0}
    >>> phase = {"name": "a", "rates": given, "steps": 9}
    >>> by_hand(["stem", "b_0", "b_1"], ["head"], phases=[phase])[0].rates
    {'b_0': 2.0, 'b_1': 4.0, 'head': 8.0}

    Raises:
        ValueError: a field, kind or pattern that is not known, or two patterns for one label.
    """
    labels = (*groups, *heads)
    return [_phase(phase, labels) for phase in phases]


def match(patterns: Sequence[str], labels: Sequence[str], where: str) -> dict[str, list[str]]:
    """Return {pattern: labels that it names}, the labels in their order.

    >>> match(["b_*", "b_1"], ["stem", "b_0", "b_1", "b_2"], "a")
    {'b_*': ['b_0', 'b_2'], 'b_1': ['b_1']}

    Args:
        patterns: labels, which go before patterns, or patterns with `*`, `?` and `[...]`.
        labels: in order of depth.
        where: what the patterns are of, for errors.

    Raises:
        ValueError: a pattern without a label, or two patterns for one label.
    """
    found: dict[str, list[str]] = {pattern: [] for pattern in patterns}
    for label in labels:
        fits = [p for p in patterns if fnmatch.fnmatchcase(label, p)]
        fits = [label] if label in fits else fits
        if len(fits) > 1:
            raise ValueError(
                f"{where} gives {label!r} two rates, by {fits}; name the label itself, or narrow "
                "one of the patterns"
            )
        for pattern in fits:
            found[pattern].append(label)
    for pattern, matched in found.items():
        if not matched:
            raise ValueError(
                f"{where} has a rate for {pattern!r}, which names no label that is left; there are "
                f"{near.listed(labels)}{near.nearest(pattern, labels)}"
            )
    return found


def _phase(fields: Mapping[str, Any] | Phase, labels: Sequence[str]) -> Phase:
    if isinstance(fields, Phase):
        return fields
    if not isinstance(fields, Mapping) or "name" not in fields or "rates" not in fields:
        raise ValueError(f"a phase is a dict with name and rates; {fields!r} is none; give both")
    what = f"phase {fields['name']!r}"
    _check_fields(what, Phase, fields)
    given = fields["rates"]
    found = match(list(given), labels, what)
    made: dict[str, Rate] = {}
    for pattern, matched in found.items():
        made |= _rates(matched, given[pattern], f"{what}, rate of {pattern!r}")
    in_order = {label: made[label] for label in labels if label in made}
    return Phase(**{**fields, "rates": in_order, "until": _until(fields.get("until"), what)})


def _rates(labels: Sequence[str], given: Any, what: str) -> dict[str, Rate]:
    if isinstance(given, schedules.Curve) or callable(given):
        return dict.fromkeys(labels, given)
    if not isinstance(given, Mapping):
        return rates.peaks(labels, given, None)
    if "peak" not in given:
        raise ValueError(f"{what} has the fields {sorted(given)} and no peak; give peak= too")
    options = {name: value for name, value in given.items() if name not in ("peak", "decay")}
    peaks = rates.peaks(labels, given["peak"], given.get("decay"))
    return rates.curved(peaks, {"kind": "constant", **options}, None)


def _until(given: Any, what: str) -> Plateau | EarlyStop | None:
    if given is None or isinstance(given, tuple(UNTIL.values())):
        return given
    kind = given.get("kind") if isinstance(given, Mapping) else None
    if kind not in UNTIL:
        raise ValueError(
            f"{what} has until={given!r}; write {{'kind': NAME, 'patience': 1}} with a name of "
            f"{sorted(UNTIL)}"
        )
    options = {name: value for name, value in given.items() if name != "kind"}
    _check_fields(f"{what}, until of kind {kind!r}", UNTIL[kind], options)
    return UNTIL[kind](**options)


def _check_fields(what: str, made: Any, fields: Mapping[str, Any]) -> None:
    known = list(inspect.signature(made).parameters)
    for name in fields:
        if name not in known:
            raise ValueError(
                f"{what} has no field {name!r}; it has {known}{near.nearest(name, known)}"
            )
