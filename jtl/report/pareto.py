"""What several strengths of a penalty came to: the front, its table, its page and its words.

The dict that comes in is the `result.json` of `recipes.pareto`, which writes down its keys.
"""

import json
import pathlib
from collections.abc import Mapping
from html import escape
from typing import Any

from jtl.report import drawing, elements, readable, record, tables
from jtl.report.drawing import MAIN, SOFT, WARM
from jtl.report.jsonfile import replace
from jtl.report.screen import draw, make_console, say

_TAKEN = "taken"


def table(result: Mapping[str, Any]) -> tables.Table:
    """Return strength, figures on both splits, and whether a run is on the front or taken.

    >>> point = {"strength": 10.0, "front": True, "target": {"validation": 0.8, "test": 0.79},
    ...     "retained": {"validation": 0.7, "test": 0.71}}
    >>> found = {"metric": "accuracy", "source": "news", "source_metric": "accuracy",
    ...     "points": [point], "taken": 10.0}
    >>> table(found).rows
    (('10', '80.0 %', '70.0 %', '79.0 %', '71.0 %', 'taken'),)
    """
    rows = tuple(
        (
            f"{point['strength']:g}",
            *(
                readable.figure(metric, point[which][split])
                for split in ("validation", "test")
                for which, metric in _metrics(result).items()
            ),
            _place(point, result),
        )
        for point in result["points"]
    )
    name = result["source"]
    splits = (f"{who}, {split}" for split in ("validation", "test") for who in ("target", name))
    return tables.Table(("strength", *splits, "front"), rows)


def sentence(result: Mapping[str, Any]) -> str:
    """Return which strength is taken, by which rule, and its test figures in words.

    >>> point = {"strength": 10.0, "target": {"test": 0.79}, "retained": {"test": 0.71}}
    >>> sentence({"points": [point], "taken": 10.0, "rule": "the best", "metric": "accuracy",
    ...     "source": "news", "source_metric": "r2", "start": {"test": 0.8}})
    'Strength 10 is taken (the best). On the test splits: target 79.0 %, news 0.710 (0.800 before).'
    """
    (point,) = (p for p in result["points"] if p["strength"] == result["taken"])
    target = readable.figure(result["metric"], point["target"]["test"])
    kept, before = (
        readable.figure(result["source_metric"], found["test"])
        for found in (point["retained"], result["start"])
    )
    return (
        f"Strength {result['taken']:g} is taken ({result['rule']}). On the test splits: target "
        f"{target}, {result['source']} {kept} ({before} before)."
    )


def show(folder: pathlib.Path, result: Mapping[str, Any], *, out: Any = None) -> None:
    """Print the table, the words, the warnings of the runs, and where the page is.

    Args:
        folder: of the runs.
        result: as in its `result.json`.
        out: a `rich` console; None writes to standard output.
    """
    out = make_console() if out is None else out
    draw(out, table(result), strong=(f"{result['taken']:g}",))
    say(out, sentence(result), style="bold")
    for point in result["points"]:
        for words in point["warnings"]:
            say(out, f"WARNING: strength {point['strength']:g}: {words}", style="bold red")
    say(out, f"the front: {folder / record.REPORT}")


def plot(result: Mapping[str, Any], split: str) -> str:
    """Return the runs as points, the target's figure up, the source's to the right.

    Args:
        result: of the runs.
        split: "validation" or "test".
    """
    scales = {which: 100 if m in readable.PERCENT else 1 for which, m in _metrics(result).items()}
    with drawing.canvas() as (figure, axes):
        places = {
            point["strength"]: (
                scales["retained"] * point["retained"][split],
                scales["target"] * point["target"][split],
            )
            for point in result["points"]
        }
        best = [places[p["strength"]] for p in result["points"] if p["front"]]
        axes.plot(*zip(*sorted(best), strict=True), color=MAIN, linewidth=1, linestyle="--")
        for point in result["points"]:
            place = places[point["strength"]]
            taken = point["strength"] == result["taken"]
            color = WARM if taken else (MAIN if point["front"] else SOFT)
            axes.plot(*place, color=color, marker="o", markersize=9 if taken else 6)
            axes.annotate(
                f"{point['strength']:g}", place, xytext=(6, 5), textcoords="offset points",
                color=color, fontsize=9.5,
            )  # fmt: skip
        start = scales["retained"] * result["start"][split]
        axes.axvline(start, color=SOFT, linestyle=":", linewidth=1)
        if not result["source_higher_is_better"]:
            axes.invert_xaxis()
        words = {
            "xlabel": f"{drawing.safe(result['source'])}: {drawing.unit(result['source_metric'])}",
            "ylabel": f"target: {drawing.unit(result['metric'])}",
        }
        axes.margins(0.15)
        axes.set(**words)
        return drawing.svg(figure, f"target against source on the {split} split")


def page(result: Mapping[str, Any]) -> str:
    """Return the page of the runs: both fronts, the table, settings; it opens without network."""
    title = f"Target against {result['source']}"
    facts = [readable.plural(len(result["points"]), "run"), f"seed {result['seed']}"]
    look = "numbers: strength; orange: taken; dashed: the front; dotted: the source before training"
    chosen = elements.figure(
        "Validation: what the choice is made by", look, plot(result, "validation")
    )
    told = elements.figure("Test: read after the choice", look, plot(result, "test"))
    config = escape(json.dumps(result["config"], indent=2, ensure_ascii=False))
    links = ", ".join(
        f"<a href='{escape(p['folder'])}/{record.REPORT}'>{p['strength']:g}</a>"
        for p in result["points"]
    )
    parts = [
        f"<h1>{escape(title)}</h1>\n<p class='soft'>{escape(' · '.join(facts))}</p>",
        f"<p class='verdict'>{escape(sentence(result))}</p>",
        *(
            f"<p class='verdict bad'>Warning: strength {p['strength']:g}: {escape(words)}</p>"
            for p in result["points"]
            for words in p["warnings"]
        ),
        elements.pair(chosen, told),
        elements.section("Runs", elements.table(table(result), strong=f"{result['taken']:g}")),
        f"<p class='soft'>Pages of the runs: {links}</p>",
        f"<details><summary>Config</summary>\n<pre>{config}</pre>\n</details>",
    ]
    return elements.document(title, parts)


def write(folder: pathlib.Path, result: Mapping[str, Any]) -> pathlib.Path:
    """Write `report.html` into the folder of the runs, and return its path."""
    path = folder / record.REPORT
    replace(path, page(result))
    return path


def _metrics(result: Mapping[str, Any]) -> dict[str, str]:
    return {"target": result["metric"], "retained": result["source_metric"]}


def _place(point: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if point["strength"] == result["taken"]:
        return _TAKEN
    return "on it" if point["front"] else "beaten"
