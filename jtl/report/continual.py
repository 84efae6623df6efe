"""What a run over several tasks shows: tables on the console, matrices and curves on a page."""

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from jtl.report import drawing, elements, readable, record
from jtl.report.jsonfile import replace
from jtl.report.screen import draw, fits, make_console, say
from jtl.report.tables import Table

FIGURES = {
    "average": "average",
    "learning": "own",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "forgetting": "forgetting",
}
_SIGNED = ("backward_transfer", "forward_transfer", "forgetting")
_COLORS = ("#2563eb", "#c2410c", "#047857", "#7c3aed", "#b45309", "#0e7490", "#be185d", "#4b5563")


def summary(result: Mapping[str, Any], part: str = "test") -> Table:
    """Return a row of figures for each way, with the deviation over seeds where there are several.

    Differences are in points where the figures are percent.

    >>> run = {"average": 0.7, "backward_transfer": -0.2, "forgetting": 0.2, "learning": 0.9}
    >>> run |= {"forward_transfer": None, "spread": {"average": 0.011}}
    >>> summary({"metric": "accuracy", "runs": {"plain": run}}).rows
    (('plain', '70.0 ± 1.1 %', '90.0 %', '-20.0', '-', '+20.0'),)

    Args:
        result: of `recipes.continual`.
        part: "test" or "validation".
    """
    metric = result["metric"]
    rows = []
    for way, entry in result["runs"].items():
        entry = entry if part == "test" else entry[part]
        spreads = entry.get("spread", {})
        cells = (_cell(metric, name, entry[name], spreads.get(name)) for name in FIGURES)
        rows.append((way, *cells))
    if "joint" in result:
        entry = result["joint"] if part == "test" else result["joint"][part]
        average = _cell(metric, "average", entry["average"], entry["spread"]["average"])
        rows.append(("all at once", average, *(readable.NOTHING,) * (len(FIGURES) - 1)))
    return Table(("", *FIGURES.values()), tuple(rows))


def matrix(result: Mapping[str, Any], way: str) -> Table:
    """Return the mean figure on each task (columns) after each task (rows).

    >>> runs = {"plain": {"matrix": [[0.9, None], [0.6, 0.8]]}}
    >>> matrix({"tasks": ["a", "b"], "metric": "accuracy", "runs": runs}, "plain").rows
    (('after a', '90.0 %', ''), ('after b', '60.0 %', '80.0 %'))
    """
    names = result["tasks"]
    rows = []
    for i, (name, row) in enumerate(zip(names, result["runs"][way]["matrix"], strict=True)):
        cells = [readable.figure(result["metric"], v) if j <= i else "" for j, v in enumerate(row)]
        rows.append((f"after {name}", *cells))
    return Table(("", *names), tuple(rows))


def matrices(result: Mapping[str, Any], *, out: Any = None) -> None:
    """Print the matrix of each way where there is room, and the summary of all.

    Args:
        result: of `recipes.continual`.
        out: a `rich` console; None writes to standard output.
    """
    out = make_console() if out is None else out
    words = readable.words(result["metric"])
    for way in result["runs"]:
        found = matrix(result, way)
        if fits(out, found):
            say(out, f"{way}: test {words}", style="bold")
            draw(out, found)
    seeds = len(result["seeds"])
    over = f", mean and standard deviation over {seeds} seeds" if seeds > 1 else ""
    say(out, f"test {words} of {readable.plural(len(result['tasks']), 'task')}{over}", style="bold")
    draw(out, summary(result))
    for words in result.get("warnings", ()):
        say(out, f"WARNING: {words}", style="bold red")


def shower(way: str, seed: int, tasks: Sequence[str]) -> Callable[[int, np.ndarray], None]:
    """Return what prints a line after each task: own figure, and the mean over those so far."""
    out = make_console()

    def show(number: int, row: np.ndarray) -> None:
        own, mean = row[number], row[: number + 1].mean()
        place = f"{way}, seed {seed}, task {number + 1} of {len(tasks)} ({tasks[number]})"
        say(out, f"{place}: {own:.3f}, mean of the tasks so far {mean:.3f}")

    return show


def say_joint(seed: int, average: float) -> None:
    """Print what learning all tasks at once came to."""
    say(make_console(), f"all at once, seed {seed}: mean of the tasks {average:.3f}")


def write_report(folder: str | pathlib.Path, result: Mapping[str, Any]) -> pathlib.Path:
    """Write `report.html` of a continual run into its folder, and return its path."""
    path = pathlib.Path(folder) / record.REPORT
    replace(path, page(result))
    return path


def page(result: Mapping[str, Any]) -> str:
    """Return the page of a continual run."""
    tasks, seeds = result["tasks"], result["seeds"]
    words = readable.words(result["metric"])
    title = f"{len(tasks)} tasks in order, {len(result['runs'])} ways"
    facts = [f"scenario {result['scenario']}", readable.plural(len(seeds), "seed")]
    facts += [readable.seconds(result["seconds"])] if "seconds" in result else []
    config = json.dumps(result["config"], indent=2, ensure_ascii=False)
    parts = [
        f"<h1>{escape(title)}</h1>\n<p class='soft'>{escape(' · '.join(facts))}</p>",
        *(
            f"<p class='verdict bad'>Warning: {escape(words)}</p>"
            for words in result.get("warnings", ())
        ),
        elements.section("Test splits", elements.table(summary(result)) + _legend(result)),
        elements.section(
            "By number of tasks learned",
            elements.figure(f"Mean test {words} of the tasks so far", _over(seeds), curves(result)),
        ),
        elements.section(
            f"Test {words} on each task after each",
            elements.pair(*(_heat(result, way) for way in result["runs"])),
        ),
        elements.section("Validation splits", elements.table(summary(result, "validation"))),
        elements.section(
            "Settings",
            f"<details><summary>Config</summary>\n<pre>{escape(config)}</pre>\n</details>",
        ),
    ]
    return elements.document(title, parts)


def curves(result: Mapping[str, Any]) -> str:
    """Return the mean figure over the tasks so far by their number, for all ways, as SVG."""
    scale = 100 if result["metric"] in readable.PERCENT else 1
    steps = np.arange(1, len(result["tasks"]) + 1)
    with drawing.canvas(height=drawing.HEIGHT + 0.25 * ((len(result["runs"]) + 3) // 4)) as (
        figure,
        axes,
    ):
        for number, (way, entry) in enumerate(result["runs"].items()):
            color, heights = _COLORS[number % len(_COLORS)], scale * np.asarray(entry["averages"])
            axes.plot(steps, heights, label=way, color=color, marker="o", markersize=4)
            if entry["spread"]["averages"] is not None:
                wide = scale * np.asarray(entry["spread"]["averages"])
                low, high = heights - wide, heights + wide
                axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        if "joint" in result:
            drawing.level(axes, "all at once", scale * result["joint"]["average"])
        unit = f"{readable.words(result['metric'])}{', %' if scale == 100 else ''}"
        axes.set(xlabel="tasks learned", ylabel=unit, xticks=steps)
        figure.legend(loc="outside lower center", ncols=min(len(result["runs"]), 4))
        return drawing.svg(figure, "mean figure by number of tasks learned")


def _heat(result: Mapping[str, Any], way: str) -> str:
    """Return a matrix as a table whose cells are the darker, the higher."""
    table = matrix(result, way)
    values = np.asarray(result["runs"][way]["matrix"], np.float64)
    shown = np.tril(np.ones_like(values, bool))
    low, high = float(values[shown].min()), float(values[shown].max())
    head = "".join(f"<th>{escape(name)}</th>" for name in table.headers)
    body = []
    for i, (name, *cells) in enumerate(table.rows):
        drawn = [f"<td class=left>{escape(name)}</td>"]
        for j, cell in enumerate(cells):
            share = (values[i, j] - low) / (high - low) if j <= i and high > low else 0.0
            look = f" style='background: rgba(37, 99, 235, {0.5 * share:.2f})'" if j <= i else ""
            drawn.append(f"<td{look}>{escape(cell)}</td>")
        body.append(f"<tr>{''.join(drawn)}</tr>")
    rows = "\n".join(body)
    whole = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>"
    words = "row: after learning; column: scored on"
    return elements.figure(way, words, f"<div class='wide'>{whole}</div>")


def _legend(result: Mapping[str, Any]) -> str:
    words = (
        "Average: over all tasks after the last. Own: just after each was learned. Backward "
        "transfer: last minus own, mean over the "
        "earlier tasks. Forward transfer: before training on a task minus a fresh model. "
        f"Forgetting: best before minus last. {_over(result['seeds']).capitalize()}."
    )
    return f"\n<p class='soft'>{escape(words)}</p>"


def _over(seeds: Sequence[int]) -> str:
    many = f"mean and standard deviation over {len(seeds)} seeds"
    return many if len(seeds) > 1 else "one seed"


def _cell(metric: str, name: str, value: float | None, spread: float | None) -> str:
    if value is None or math.isnan(value):
        return readable.NOTHING
    signed = name in _SIGNED
    text = (
        readable.difference(metric, value, unit=False) if signed else readable.figure(metric, value)
    )
    if spread is None:
        return text
    scale, digits = (100, 1) if metric in readable.PERCENT else (1, 3)
    number, _, unit = text.partition(" ")
    return f"{number} ± {scale * spread:.{digits}f} {unit}".strip()
