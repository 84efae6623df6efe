"""The line from start to tuned weights: its plots, its table, its page, its words on the console.

The dict that comes in is the `result.json` of `recipes.interpolate`, which writes down its keys.
"""

import json
import pathlib
from collections.abc import Mapping
from html import escape
from typing import Any

from jtl.report import drawing, elements, forgotten, readable, record, tables
from jtl.report.drawing import MAIN, SOFT
from jtl.report.jsonfile import replace
from jtl.report.screen import draw, make_console, say

_SHADES = ("#c2410c", "#a16207", "#7c3aed", "#0f766e")
_ENDS = {"before": "start", "after": "chosen", "tuned": "tuned"}


def table(result: Mapping[str, Any]) -> tables.Table:
    """Return the validation figures of target and sources at every alpha.

    >>> rows = [{"alpha": 0.5, "target": {"r2": 0.25}, "retain": {}}]
    >>> table({"metric": "r2", "retain": {}, "curve": rows}).rows
    (('0.5', '0.250'),)
    """
    lines = _metrics(result)
    headers = ("alpha", *(f"{name}, {readable.words(metric)}" for name, metric in lines.items()))
    rows = tuple(
        (
            f"{row['alpha']:g}",
            *(readable.figure(metric, _at(row, name, metric)) for name, metric in lines.items()),
        )
        for row in result["curve"]
    )
    return tables.Table(headers, rows)


def ends(result: Mapping[str, Any]) -> tables.Table:
    """Return the test figures of start, chosen and tuned weights, each scored once."""
    lines = _metrics(result)
    columns = {"target": {key: row["test"] for key, row in result["target"].items()}}
    for name, row in result["retain"].items():
        columns[name] = {key: row[key]["test"] for key in _ENDS}
    alphas = {"before": 0.0, "after": result["chosen"], "tuned": 1.0}
    rows = tuple(
        (
            f"{words}, alpha {alphas[key]:g}",
            *(readable.figure(metric, columns[name][key]) for name, metric in lines.items()),
        )
        for key, words in _ENDS.items()
    )
    headers = ("weights", *(f"{name}, {readable.words(metric)}" for name, metric in lines.items()))
    return tables.Table(headers, rows)


def sentences(result: Mapping[str, Any]) -> list[str]:
    """Return what was chosen and by which rule, and what it does to the target and the sources."""
    metric = result["metric"]
    after, tuned = (result["target"][key]["test"] for key in ("after", "tuned"))
    said = [
        f"Chosen: alpha {result['chosen']:g}, {_rule(result)}; on the test split "
        f"{readable.figure(metric, after)} {readable.words(metric)}, the tuned weights "
        f"{readable.figure(metric, tuned)}."
    ]
    for name, row in result["retain"].items():
        lost = readable.difference(row["metric"], row["tuned_change"]["value"])
        said += forgotten.sentences({"retain": {name: row}})
        said.append(f"The tuned weights changed {name} by {lost}.")
    return said


def step(row: Mapping[str, Any], lines: Mapping[str, str], *, out: Any = None) -> None:
    """Print the figures at one alpha.

    Args:
        row: of `curve`.
        lines: {"target" or source: metric}.
        out: a `rich` console; None writes to standard output.
    """
    found = ", ".join(
        f"{name} {readable.figure(metric, _at(row, name, metric))}"
        for name, metric in lines.items()
    )
    again = ", statistics recomputed" if row["recomputed"] else ""
    say(make_console() if out is None else out, f"alpha {row['alpha']:g}: {found}{again}")


def show(folder: pathlib.Path, result: Mapping[str, Any], *, out: Any = None) -> None:
    """Print both tables, the words, and where the page is.

    Args:
        folder: of the run.
        result: as in its `result.json`.
        out: a `rich` console; None writes to standard output.
    """
    out = make_console() if out is None else out
    say(out, "validation", style="bold")
    draw(out, table(result), strong=(f"{result['chosen']:g}",))
    say(out, "test", style="bold")
    found = ends(result)
    draw(out, found, strong=(found.rows[1][0],))
    for line in sentences(result):
        say(out, line, style="bold")
    say(out, f"all of it: {folder / record.REPORT}")


def plot(result: Mapping[str, Any]) -> str:
    """Return the validation figures of target and sources by alpha, the chosen one marked.

    Figures in percent share one panel, a perplexity or a loss has its own.
    """
    lines = _metrics(result)
    panels = list(dict.fromkeys(_panel(metric) for metric in lines.values()))
    alphas = [row["alpha"] for row in result["curve"]]
    size = {"height": drawing.HEIGHT + 1.7 * (len(panels) - 1) + 0.2, "panels": len(panels)}
    with drawing.canvas(**size) as (figure, axes):
        own = dict(zip(panels, axes if len(panels) > 1 else [axes], strict=True))
        for panel, part in own.items():
            part.axvline(result["chosen"], color=SOFT, linestyle="--", linewidth=1)
            part.set_ylabel(panel)
        for number, (name, metric) in enumerate(lines.items()):
            heights = [_height(metric, _at(row, name, metric)) for row in result["curve"]]
            color = _SHADES[(number - 1) % len(_SHADES)] if number else MAIN
            label = drawing.safe(f"{name} (source)" if number else name)
            own[_panel(metric)].plot(
                alphas, heights, color=color, marker="o", markersize=4, label=label
            )
        own[panels[-1]].set_xlabel("alpha: 0 the start, 1 the tuned weights")
        figure.legend(loc="outside lower center", ncols=min(len(lines), 3), handlelength=1.2)
        return drawing.svg(figure, "target and sources by alpha")


def exchange(result: Mapping[str, Any], name: str) -> str:
    """Return a source's validation figure against the target's, one point for each alpha."""
    target, source = result["metric"], result["retain"][name]["metric"]
    points = [
        (_height(target, _at(row, "target", target)), _height(source, _at(row, name, source)))
        for row in result["curve"]
    ]
    with drawing.canvas() as (figure, axes):
        axes.plot(*zip(*points, strict=True), color=MAIN, marker="o", markersize=4)
        for row, point in zip(result["curve"], points, strict=True):
            if row["alpha"] in (0.0, result["chosen"], 1.0):
                axes.annotate(
                    f"{row['alpha']:g}", point, xytext=(5, 4), textcoords="offset points",
                    color=SOFT, fontsize=9.5,
                )  # fmt: skip
        axes.set(
            xlabel=f"target: {drawing.unit(target)}",
            ylabel=drawing.safe(f"{name}: {drawing.unit(source)}"),
        )
        return drawing.svg(figure, "source against target")


def page(result: Mapping[str, Any]) -> str:
    """Return the page: curves, tables, settings; it opens without network."""
    title = "Weights between start and tuned model"
    facts = [result["source"], readable.plural(len(result["curve"]), "alpha")]
    said = "<br>".join(escape(line) for line in sentences(result))
    pictures = [
        elements.figure("Validation by alpha", "dashed: the chosen alpha", plot(result)),
        *(
            elements.figure(f"{name} against target", "validation; numbers: alpha", drawn)
            for name, drawn in ((n, exchange(result, n)) for n in result["retain"])
        ),
    ]
    found = elements.table(table(result), strong=f"{result['chosen']:g}", look="wide fit")
    tests = ends(result)
    last = elements.table(tests, strong=tests.rows[1][0], look="wide fit")
    parts = [
        f"<h1>{escape(title)}</h1>\n<p class='soft'>{escape(' · '.join(filter(None, facts)))}</p>",
        f"<p class='verdict'>{said}</p>",
        elements.section("The line", elements.pair(*pictures)),
        elements.section("Validation split", found),
        elements.section("Test split", last),
        f"<details><summary>Config</summary>\n<pre>"
        f"{escape(json.dumps(result['config'], indent=2, ensure_ascii=False))}</pre>\n</details>",
    ]
    return elements.document(title, parts)


def write(folder: pathlib.Path, result: Mapping[str, Any]) -> pathlib.Path:
    """Write `report.html` into the folder of the run, and return its path."""
    path = folder / record.REPORT
    replace(path, page(result))
    return path


def _metrics(result: Mapping[str, Any]) -> dict[str, str]:
    return {
        "target": result["metric"],
        **{name: row["metric"] for name, row in result["retain"].items()},
    }


def _at(row: Mapping[str, Any], name: str, metric: str) -> Any:
    return (row["target"] if name == "target" else row["retain"][name])[metric]


def _height(metric: str, value: float | int | None) -> float | int:
    (height,) = drawing.gaps([value])
    return 100 * height if metric in readable.PERCENT else height


def _panel(metric: str) -> str:
    return "%" if metric in readable.PERCENT else readable.words(metric)


def _rule(result: Mapping[str, Any]) -> str:
    if result["rule"] == "best":
        return "the best on the target's validation split"
    within = readable.difference(result["metric"], result["tolerance"]).lstrip("+")
    return f"the smallest within {within} of the tuned weights on the target's validation split"
