"""How much each penalty of a run had to say: its value and its share of the gradient norm."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jtl.report import curves, drawing, elements, readable, tables

SMALL = 0.01


def found(rows: Sequence[curves.Row], names: Sequence[str]) -> dict[str, Any]:
    """Return `penalties` and `warnings` of result.json, {} for a run without penalties.

    A share is that of a penalty in the sum of the gradient norms of all terms. Where a phase opens
    what was held, a penalty on it is still zero, so the first probe of a phase is left out.

    >>> rows = [{"kind": "step", "step": 3, "phase": "a", "loss/ewc": 0.2}]
    >>> probes = [(1, 0.0), (2, 0.001), (3, 0.003)]
    >>> rows += [{"kind": "shares", "step": s, "phase": "a", "share/ewc": x} for s, x in probes]
    >>> found(rows, ["ewc"])["penalties"]
    {'ewc': {'value': 0.2, 'share': {'median': 0.002, 'greatest': 0.003, 'last': 0.003}}}
    >>> found(rows, ["ewc"])["warnings"]  # doctest: +NORMALIZE_WHITESPACE
    ["penalty 'ewc' never had more than 0.30 % of the gradient norm: it hardly holds anything back;
    raise its weight, or leave it out"]
    """
    if not names:
        return {}
    probes = _after_the_first([row for row in rows if row["kind"] == "shares"])
    penalties = {
        name: {
            "value": _last(curves.series(rows, "step", f"loss/{name}").values),
            "share": _share(curves.series(probes, "shares", f"share/{name}").values),
        }
        for name in names
    }
    return {"penalties": penalties, "warnings": _warnings(penalties)}


def table(result: Mapping[str, Any]) -> tables.Table:
    """Return the value of each penalty at the end, and its share of the gradient norm.

    >>> row = {"value": 0.2, "share": {"median": 0.02, "greatest": 0.1, "last": 0.1}}
    >>> table({"penalties": {"ewc": row}}).rows
    (('ewc', '0.2', '2.0 %', '10.0 %', '10.0 %'),)
    """
    headers = ("penalty", "value at the end", "share of the gradient, median", "greatest", "last")
    body = []
    for name, row in result["penalties"].items():
        share = row["share"] or {}
        shown = [percent(share.get(key)) for key in ("median", "greatest", "last")]
        value = readable.NOTHING if row["value"] is None else f"{row['value']:.3g}"
        body.append((name, value, *shown))
    return tables.Table(headers, tuple(body))


def section(result: Mapping[str, Any], rows: Sequence[curves.Row]) -> str:
    """Return the part of the page on penalties, "" for a run without."""
    if not result.get("penalties"):
        return ""
    lines = curves.named(rows, "share", kind="shares")
    figure = ""
    if lines and curves.stretches(rows):
        words = "share of the gradient norm, %"
        svg = drawing.many(rows, lines, words, percent=True)
        note = "of the sum of the norms of all terms; a penalty near 0 holds nothing back"
        figure = elements.figure("Share of each term in the gradient", note, svg)
    return elements.section("Penalties", elements.pair(figure, elements.table(table(result))))


def percent(share: float | int | None) -> str:
    """Return a share in percent, with two digits where it is small.

    >>> percent(0.123), percent(0.0031), percent(None)
    ('12.3 %', '0.31 %', '-')
    """
    if share is None:
        return readable.NOTHING
    return f"{100 * share:.2f} %" if share < SMALL else f"{100 * share:.1f} %"


def _after_the_first(probes: Sequence[curves.Row]) -> list[curves.Row]:
    phases = [row["phase"] for row in probes]
    return [row for i, row in enumerate(probes) if row["phase"] in phases[:i]]


def _share(values: Sequence[float | int | None]) -> dict[str, float] | None:
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    return {"median": statistics.median(known), "greatest": max(known), "last": known[-1]}


def _warnings(penalties: Mapping[str, Any]) -> list[str]:
    return [
        f"penalty {name!r} never had more than {percent(row['share']['greatest'])} of the "
        "gradient norm: it hardly holds anything back; raise its weight, or leave it out"
        for name, row in penalties.items()
        if row["share"] is not None and row["share"]["greatest"] < SMALL
    ]


def _last(values: Sequence[float | int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(known[-1]) if known else None
