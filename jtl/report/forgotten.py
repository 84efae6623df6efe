"""What a run has cost the sources that it watched: table, words and plot.

The dicts that come in are those of `result.json`; `jtl.report.record` writes down their keys.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jtl.report import curves, drawing, elements, readable, tables
from jtl.report.drawing import MAIN

TARGET = "target"
_SHADES = ("#c2410c", "#a16207", "#7c3aed", "#0f766e")
_KEPT = "no clear change"


def table(result: Mapping[str, Any]) -> tables.Table:
    """Return the test figures of the target and of each source before and after, and the change.

    The target's "before" is the baseline that its gain is over, which changes nothing.

    >>> row = {"kind": "probe", "metric": "accuracy", "higher_is_better": True,
    ...     "before": {"test": 0.8}, "after": {"test": 0.75},
    ...     "change": {"value": -0.05, "interval": [-0.07, -0.03]}}
    >>> table({"metric": "accuracy", "retain": {"news": row}}).rows[0][:5]
    ('news', 'accuracy, probe', '80.0 %', '75.0 %', '-5.0 points')
    >>> table({"metric": "accuracy", "retain": {"news": row}}).rows[0][5:]
    ('-7.0 to -3.0', 'lost')
    """
    rows = [_target(result)] if result.get("gain") else []
    for name, row in result["retain"].items():
        metric = row["metric"]
        what = f"{readable.words(metric)}, {row['kind']}"
        first, last = (readable.figure(metric, row[when]["test"]) for when in ("before", "after"))
        rows.append((name, what, first, last, *_change(metric, row["change"]), verdict(row)))
    headers = ("test split", "figure", "before", "after", "change", "95 % interval", "verdict")
    return tables.Table(headers, tuple(rows), left=2)


def short(found: tables.Table) -> tables.Table:
    """Return the table without what each figure is of, for a narrow console.

    >>> short(tables.Table(("test split", "figure", "before"), (("a", "r2", "0.1"),), left=2)).rows
    (('a', '0.1'),)
    """
    rows = tuple((row[0], *row[2:]) for row in found.rows)
    return tables.Table((found.headers[0], *found.headers[2:]), rows)


def verdict(row: Mapping[str, Any]) -> str:
    """Return "lost", "gained" or "no clear change" of a source.

    >>> verdict({"higher_is_better": False, "change": {"interval": [0.2, 0.4]}})  # of a perplexity
    'lost'
    """
    low, high = row["change"]["interval"]
    if low <= 0 <= high:
        return _KEPT
    return "gained" if (low > 0) == row["higher_is_better"] else "lost"


def sentences(result: Mapping[str, Any]) -> list[str]:
    """Return, for each source, what it has lost, in words.

    >>> row = {"metric": "accuracy", "higher_is_better": True, "before": {"test": 0.8},
    ...     "after": {"test": 0.75}, "change": {"value": -0.05, "interval": [-0.07, -0.03]}}
    >>> sentences({"retain": {"news": row}})  # doctest: +NORMALIZE_WHITESPACE
    ['Forgotten: news went from 80.0 to 75.0 % accuracy, -5.0 points on its test split (95 %
    interval -7.0 to -3.0).']
    """
    return [_sentence(name, row) for name, row in result.get("retain", {}).items()]


def section(result: Mapping[str, Any], rows: Sequence[curves.Row]) -> str:
    """Return the part of the page that says what was forgotten, "" where nothing was watched."""
    if not result.get("retain"):
        return ""
    words = "validation; the lower the second curve falls, the more was forgotten"
    figure = ""
    if curves.stretches(rows):
        figure = elements.figure("Target against sources", words, plot(result, rows))
    note = "Sources never train anything and choose nothing; their test splits are scored twice."
    found = elements.table(table(result), strong=TARGET, look="wide fit")
    note = f"<p class='soft'>{note}</p>"
    return elements.section(
        "What was forgotten", elements.pair(figure, f"<div>{found}\n{note}</div>")
    )


def plot(result: Mapping[str, Any], rows: Sequence[curves.Row]) -> str:
    """Return the validation figures of the target and of each source by step.

    Figures in percent share one panel, a perplexity or a loss has its own.
    """
    lines = {TARGET: (result["metric"], curves.evaluations(rows, result["metric"]))}
    for name, row in result["retain"].items():
        lines[name] = (row["metric"], _line(name, row, rows))
    panels = list(dict.fromkeys(_panel(metric) for metric, _ in lines.values()))
    size = {"height": drawing.HEIGHT + 1.7 * (len(panels) - 1) + 0.2, "panels": len(panels)}
    with drawing.canvas(**size) as (figure, axes):
        axes = dict(zip(panels, axes if len(panels) > 1 else [axes], strict=True))
        for number, (panel, own) in enumerate(axes.items()):
            drawing.borders(own, curves.stretches(rows), named=number == 0)
            own.set(ylabel=panel, ylim=_limits(lines, panel))
        for number, (name, (metric, line)) in enumerate(lines.items()):
            color = MAIN if name == TARGET else _SHADES[(number - 1) % len(_SHADES)]
            scale = 100 if metric in readable.PERCENT else 1
            heights = [scale * value for value in drawing.gaps(line.values)]
            label = drawing.safe(name if name == TARGET else f"{name} (source)")
            axes[_panel(metric)].plot(
                line.steps, heights, color=color, marker="o", markersize=4, label=label
            )
        axes[panels[-1]].set_xlabel("step")
        figure.legend(loc="outside lower center", ncols=min(len(lines), 3), handlelength=1.2)
        return drawing.svg(figure, "target and sources by step")


def _line(name: str, row: Mapping[str, Any], rows: Sequence[curves.Row]) -> curves.Series:
    """Return the figures at the evaluations, and at the end those of the weights that were kept."""
    found = curves.series(rows, "evaluation", f"retain/{name}/{row['metric']}")
    last = row["after"].get("validation")
    if last is None or not found.steps or found.values[-1] == last:
        return found
    end = max(entry["step"] for entry in rows)
    return curves.Series((*found.steps, end), (*found.values, last))


def _limits(
    lines: Mapping[str, tuple[str, curves.Series]], panel: str
) -> tuple[float | int, float | int] | None:
    """Return limits that leave out the target's untrained start, beside which all looks flat."""
    values = [
        (100 if metric in readable.PERCENT else 1) * value
        for name, (metric, line) in lines.items()
        if _panel(metric) == panel
        for value in line.values[name == TARGET :]
        if value is not None
    ]
    if not values:
        return None
    margin = 0.08 * max(max(values) - min(values), 0.02 * abs(max(values)), 1e-6)
    return min(values) - margin, max(values) + margin


def _panel(metric: str) -> str:
    return "%" if metric in readable.PERCENT else readable.words(metric)


def _target(result: Mapping[str, Any]) -> tuple[str, ...]:
    metric, gain, after = result["metric"], result["gain"], result["target"]["test"]
    before = readable.figure(metric, result["baselines"][gain["over"]]["test"])
    low, high = gain["interval"]
    said = _KEPT if low <= 0 <= high else ("gained" if low > 0 else "lost")
    what = f"{readable.words(metric)}, over the {tables.baseline_name(gain['over'])}"
    return (TARGET, what, before, readable.figure(metric, after), *_change(metric, gain), said)


def _change(metric: str, change: Mapping[str, Any]) -> tuple[str, str]:
    ends = (readable.difference(metric, end, unit=False) for end in change["interval"])
    return readable.difference(metric, change["value"]), " to ".join(ends)


def _sentence(name: str, row: Mapping[str, Any]) -> str:
    metric = row["metric"]
    change, bounds = _change(metric, row["change"])
    first, last = (readable.figure(metric, row[when]["test"]) for when in ("before", "after"))
    moved = f"{first.removesuffix(' %')} to {last} {readable.words(metric)}"
    where = f"{change} on its test split (95 % interval {bounds})."
    word = {"lost": "Forgotten", "gained": "Better", _KEPT: "Kept"}[verdict(row)]
    return f"{word}: {name} went from {moved}, {where}"
