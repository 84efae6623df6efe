"""The tables that the benchmarks end with."""

from collections.abc import Mapping, Sequence
from typing import Any

from jtl.report.screen import draw, make_console, say
from jtl.report.tables import Table


def show(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> None:
    """Print a table of text under a title; `left` columns from the first are words."""
    out = make_console()
    if not out.is_terminal:
        out.width = max(out.width, 140)
    say(out, "")
    say(out, title, style="bold")
    draw(out, Table(tuple(headers), tuple(tuple(row) for row in rows), left=left))


def figure(value: float | None, unit: str = "") -> str:
    """Return a figure with three digits.

    >>> figure(1.0312), figure(0.00123), figure(0), figure(None), figure(5.21, "x")
    ('1.03', '0.0012', '0', '', '5.21x')
    """
    if value is None:
        return ""
    if not value:
        return f"0{unit}"
    digits = f"{value:.2g}" if abs(value) < 0.01 else f"{value:.3g}"
    return f"{digits}{unit}"


def aimed(row: Mapping[str, Any]) -> str:
    """Return the aim of a row and whether its figure meets it.

    >>> aimed({"aim": 1.05, "met": True}), aimed({"aim": 2.6, "met": False, "better": "higher"})
    ('≤ 1.05', '≥ 2.6, missed')
    >>> aimed({"aim": None})
    ''
    """
    if row.get("aim") is None:
        return ""
    sign = "≥" if row.get("better") == "higher" else "≤"
    return f"{sign} {figure(row['aim'])}" + ("" if row["met"] else ", missed")


def judged(value: float | None, aim: float | None, *, better: str = "lower") -> dict[str, Any]:
    """Return the fields of a row that say what was aimed at.

    >>> judged(1.04, 1.05)
    {'aim': 1.05, 'better': 'lower', 'met': True}
    """
    if value is None or aim is None:
        return {"aim": aim, "better": better, "met": None}
    return {
        "aim": aim,
        "better": better,
        "met": value <= aim if better == "lower" else value >= aim,
    }
