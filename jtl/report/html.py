"""One page about a run: plots and tables in a single file that opens without network."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from jtl.report import curves, plots, readable, record, tables
from jtl.report.jsonfile import read, replace

_FORBID_NETWORK = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_PHASE_COLUMNS = 8


def write_report(folder: str | pathlib.Path) -> pathlib.Path:
    """Write `report.html` into a run folder from its records, and return its path.

    Raises:
        ValueError: the folder has no `result.json`, or one that lacks keys.
    """
    folder = pathlib.Path(folder)
    if not (folder / record.RESULT).is_file():
        raise ValueError(
            f"{str(folder)!r} has no {record.RESULT}; the run has not ended or this is no run "
            "folder; give the folder of a run that ended"
        )
    result = read(folder / record.RESULT)
    path = folder / record.REPORT
    replace(path, page(result, record.read_rows(folder)))
    return path


def page(result: Mapping[str, Any], rows: Sequence[curves.Row]) -> str:
    """Return the page of a run.

    Args:
        result: as in `result.json`.
        rows: of `metrics.jsonl`.

    Raises:
        ValueError: the result lacks keys.
    """
    record.check_result(result)
    style = pathlib.Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    title = f"Fine-tuning of {_last(result.get('source', 'a model'))}"
    parts = [
        _head(result, title),
        _section(
            "Verdict",
            _pair(
                _table(tables.verdict(result), strong="fine-tuned", look="wide fit"),
                _scores(result),
            ),
        ),
        _section("Training", _pair(*_curves(result, rows))),
        _section("Test split", _pair(*_pictures(result))),
        _section("Phases", _phases(result)),
        _section("Groups", _groups(result)),
        _section("Weights from the checkpoint", _load(result)),
        _section("Settings", _settings(result)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_FORBID_NETWORK}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _head(result: Mapping[str, Any], title: str) -> str:
    facts = [_fact(name, value) for name, value in result.get("data", {}).items()]
    facts.append(f"seed {result['seed']}")
    facts += [result["source"]] if "/" in result.get("source", "") else []
    if "seconds" in result:
        facts.append(readable.seconds(result["seconds"]))
    gain = result.get("gain")
    bad = gain is not None and gain["interval"][0] <= 0
    held = "" if result["held_bit_equal"] else "<br>Held leaves changed: do not trust this run."
    look = "verdict bad" if bad or held else "verdict"
    return (
        f"<h1>{escape(title)}</h1>\n<p class='soft'>{escape(' · '.join(facts))}</p>\n"
        f"<p class='{look}'>{escape(tables.sentence(result))}{held}</p>"
    )


def _scores(result: Mapping[str, Any]) -> str:
    words = readable.words(result["metric"])
    return _figure(f"Test {words}", "point and 95 % bootstrap interval", plots.scores(result))


def _curves(result: Mapping[str, Any], rows: Sequence[curves.Row]) -> list[str]:
    if not curves.stretches(rows):
        return []
    metric = result["metric"]
    levels = {name: row["validation"] for name, row in result["baselines"].items()}
    order = [row["label"] for row in result.get("groups", ())]
    words = readable.words(metric)
    drawn = (
        (
            f"Validation {words}",
            "names above: phases; a drop or rise at their border: the best weights restored",
            plots.metric(rows, metric, levels),
        ),
        ("Training loss", "thin: each step; thick: smoothed", plots.loss(rows)),
        ("Learning rate by group", "a held group has no line", plots.rates(rows, order)),
        ("Terms of the loss", "smoothed", plots.terms(rows)),
    )
    return [_figure(title, words, svg) for title, words, svg in drawn if svg]


def _pictures(result: Mapping[str, Any]) -> list[str]:
    found = []
    if "confusion" in result:
        table = result["confusion"]
        svg = plots.confusion(table["classes"], table["counts"])
        found.append(_figure("Confusion matrix", "examples; colour: share of the true class", svg))
    if "calibration" in result:
        sums = result["calibration"]
        svg = plots.reliability(sums["confidence"], sums["correct"], sums["count"])
        error = result.get("figures", {}).get("test", {}).get("calibration_error")
        words = "accuracy by confidence"
        if error is not None:
            words += f"; calibration error {readable.figure('calibration_error', error)}"
        found.append(_figure("Reliability", words, svg))
    if "figures" in result:
        found.append(_table(_figures(result["figures"])))
    return found


def _figures(figures: Mapping[str, Mapping[str, Any]]) -> tables.Table:
    names = dict.fromkeys(name for part in figures.values() for name in part)
    rows = tuple(
        (
            readable.words(name),
            *(readable.figure(name, part.get(name)) for part in figures.values()),
        )
        for name in names
    )
    return tables.Table(("fine-tuned", *figures), rows)


def _phases(result: Mapping[str, Any]) -> str:
    order = [row["label"] for row in result.get("groups", ())]
    table = tables.phases(result["phases"], result["metric"], order=order)
    held = "Every held leaf and statistic kept its bits in every phase."
    held = held if result["held_bit_equal"] else "Held leaves changed."
    shared = "Optimizer: the state of all groups that ever move, kept through all phases."
    stall = "Stall: the wait between the last step before a phase and its first."
    words = (
        f"Before and after: validation {readable.words(result['metric'])}. {stall} {shared} {held}"
    )
    return _table(table) + f"\n<p class='soft'>{escape(words)}</p>"


def _groups(result: Mapping[str, Any]) -> str:
    if "groups" not in result:
        return ""
    names = [phase["name"] for phase in result["phases"]]
    table = tables.groups if len(names) <= _PHASE_COLUMNS else tables.openings
    return _table(table(result["groups"], names))


def _load(result: Mapping[str, Any]) -> str:
    return _table(tables.load(result["loaded"], result.get("load_report", {})), names=2)


def _settings(result: Mapping[str, Any]) -> str:
    versions = tables.Table(("package", "version"), tuple(sorted(result["versions"].items())), 2)
    config = json.dumps(result["config"], indent=2, ensure_ascii=False)
    return (
        f"<details><summary>Config</summary>\n<pre>{escape(config)}</pre>\n</details>\n"
        f"<details><summary>Versions</summary>\n{_table(versions)}\n</details>"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def _pair(*parts: str) -> str:
    found = [part for part in parts if part]
    return "<div class='pair'>\n" + "\n".join(found) + "\n</div>" if found else ""


def _figure(title: str, words: str, svg: str) -> str:
    caption = f"{escape(title)}<small>{escape(words)}</small>"
    return f"<figure>\n<figcaption>{caption}</figcaption>\n{svg}\n</figure>"


def _table(table: tables.Table, *, strong: str = "", names: int = -1, look: str = "wide") -> str:
    """Return a table; the row of first cell `strong` stands out, the column `names` may break."""
    sides = ["class=left" if i < table.left else "" for i in range(len(table.headers))]
    if names >= 0:
        sides[names] = "class='left names'"
    head = _cells("th", sides, table.headers)
    body = [
        f"<tr{' class=strong' if row[0] == strong else ''}>{_cells('td', sides, row)}</tr>"
        for row in table.rows
    ]
    return (
        f"<div class='{look}'><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def _cells(kind: str, sides: Sequence[str], cells: Sequence[str]) -> str:
    looks = [
        "class=held" if cell == tables.HELD else side
        for side, cell in zip(sides, cells, strict=True)
    ]
    bound = [re.sub(r"(?<=\d) (?=%|s\b)", "&nbsp;", escape(cell)) for cell in cells]
    return "".join(
        f"<{kind} {look}>{cell}</{kind}>" for look, cell in zip(looks, bound, strict=True)
    )


def _fact(name: str, value: Any) -> str:
    if isinstance(value, str):
        return _last(value) if value.startswith("/") else value
    return f"{name.replace('_', ' ')} {readable.count(value)}"


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
