"""What a learning-rate sweep found: its plot, its table, its page and its words on the console.

The dict that comes in is the `result.json` of `recipes.find_rate`, which writes down its keys.
"""

import json
import pathlib
from collections.abc import Mapping
from html import escape
from typing import Any

from jtl.report import drawing, elements, readable, record, tables
from jtl.report.drawing import MAIN, WARM
from jtl.report.jsonfile import replace
from jtl.report.screen import draw, make_console, say

_USUAL = "valley"
_FALL = 0.02


def table(result: Mapping[str, Any]) -> tables.Table:
    """Return what each rule suggests: rate of the fastest labels, and factor on the plan's rates.

    >>> found = {"fastest": ["head"], "suggestions": {"valley": 3e-3}, "scales": {"valley": 1.5}}
    >>> table(found).headers, table(found).rows
    (('rule', 'rate of head', 'times the plan'), (('valley', '3e-03', '1.5'),))
    """
    rows = tuple(
        (rule, readable.rate(rate), f"{result['scales'][rule]:.3g}")
        for rule, rate in result["suggestions"].items()
    )
    label = readable.spans(result["fastest"])
    return tables.Table(("rule", f"rate of {label}", "times the plan"), rows)


def sentence(result: Mapping[str, Any]) -> str:
    """Return how far the loss fell and what the usual rule says, in words.

    >>> found = {"phase": "top", "fastest": ["head"], "rates": [1e-3, 1e-2], "losses": [0.8, 0.6],
    ...     "suggestions": {"valley": 3e-3}, "scales": {"valley": 1.5}}
    >>> sentence(found)  # doctest: +NORMALIZE_WHITESPACE
    "the smoothed loss falls from 0.800 to 0.600 at 1e-02; valley: 3e-03 for head, 1.5 times the
    plan's rates of phase 'top'"
    """
    rates, losses = result["rates"], result["losses"]
    first, least = losses[0], min(losses)
    if first - least < _FALL * abs(first):
        return (
            f"the smoothed loss hardly falls, from {first:.3f} to {least:.3f}: no rule can tell; "
            "sweep more steps, or to a higher rate"
        )
    return (
        f"the smoothed loss falls from {first:.3f} to {least:.3f} at "
        f"{readable.rate(rates[losses.index(least)])}; {_USUAL}: "
        f"{readable.rate(result['suggestions'][_USUAL])} for {readable.spans(result['fastest'])}, "
        f"{result['scales'][_USUAL]:.2g} times the plan's rates of phase {result['phase']!r}"
    )


def show(folder: pathlib.Path, result: Mapping[str, Any], *, out: Any = None) -> None:
    """Print the table, the words, and where the page is.

    Args:
        folder: of the sweep.
        result: as in its `result.json`.
        out: a `rich` console; None writes to standard output.
    """
    out = make_console() if out is None else out
    draw(out, table(result), strong=(_USUAL,))
    say(out, sentence(result), style="bold")
    say(out, f"the curve: {folder / record.REPORT}")


def plot(result: Mapping[str, Any]) -> str:
    """Return the loss by rate as SVG, each suggestion a line; what ran away is cut off above."""
    readings, losses = result["readings"], result["losses"]
    rates = [row["rate"] for row in readings]
    with drawing.canvas() as (figure, axes):
        raw = drawing.gaps([row["loss"] for row in readings])
        axes.plot(rates, raw, color=MAIN, alpha=0.3, linewidth=0.8)
        axes.plot(rates, [row["smoothed"] for row in readings], color=MAIN, linewidth=1.8)
        for i, (rule, rate) in enumerate(sorted(result["suggestions"].items(), key=_by_rate)):
            axes.axvline(rate, color=WARM, linestyle="--", linewidth=1)
            axes.annotate(
                rule, (rate, 1.0 - 0.07 * i), xycoords=("data", "axes fraction"),
                xytext=(3, -3), textcoords="offset points", color=WARM, fontsize=9, va="top",
            )  # fmt: skip
        least, first = min(losses), max(losses[0], readings[0]["smoothed"])
        height = max(first - least, 1e-3 * abs(first), 1e-6)
        axes.set_xscale("log")
        words = f"rate of {readable.spans(result['fastest'])}"
        limits = (least - 0.3 * height, first + 0.6 * height)
        axes.set(xlabel=words, ylabel="training loss", ylim=limits)
        return drawing.svg(figure, "training loss by learning rate")


def page(result: Mapping[str, Any]) -> str:
    """Return the page of a sweep: curve, table, settings; it opens without network."""
    title = f"Learning rates of phase {result['phase']}"
    facts = [readable.plural(len(result["readings"]), "step"), f"seed {result['seed']}"]
    if result["source"]:
        facts.append(result["source"])
    caption = "thin: each step; thick: running mean; dashed: what each rule suggests"
    peaks = tables.Table(
        ("label", "rate in the plan"),
        tuple((label, readable.rate(peak)) for label, peak in result["peaks"].items()),
    )
    found = elements.table(table(result), strong=_USUAL)
    parts = [
        f"<h1>{escape(title)}</h1>\n<p class='soft'>{escape(' · '.join(facts))}</p>",
        f"<p class='verdict'>{escape(sentence(result))}</p>",
        elements.pair(elements.figure("Training loss by rate", caption, plot(result)), found),
        elements.section("Rates that are scaled together", elements.table(peaks)),
        f"<details><summary>Config</summary>\n<pre>"
        f"{escape(json.dumps(result['config'], indent=2, ensure_ascii=False))}</pre>\n</details>",
    ]
    return elements.document(title, parts)


def write(folder: pathlib.Path, result: Mapping[str, Any]) -> pathlib.Path:
    """Write `report.html` of a sweep into its folder, and return its path."""
    path = folder / record.REPORT
    replace(path, page(result))
    return path


def _by_rate(item: tuple[str, float]) -> float:
    return item[1]
