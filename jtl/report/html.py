"""One page about a run: plots and tables in a single file that opens without network."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from jtl.report import curves, elements, forgotten, penalised, plots, readable, record, tables
from jtl.report.jsonfile import read, replace

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
    title = f"Fine-tuning of {_last(result.get('source', 'a model'))}"
    parts = [
        _head(result, title),
        elements.section(
            "Verdict",
            elements.pair(
                elements.table(tables.verdict(result), strong="fine-tuned", look="wide fit"),
                _scores(result),
            ),
        ),
        elements.section("Training", elements.pair(*_curves(result, rows))),
        forgotten.section(result, rows),
        penalised.section(result, rows),
        elements.section("Test split", elements.pair(*_pictures(result))),
        elements.section("Phases", _phases(result)),
        elements.section("Groups", _groups(result)),
        elements.section("Weights from the checkpoint", _load(result)),
        elements.section("Settings", _settings(result)),
    ]
    return elements.document(title, parts)


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
    lines = [
        f"<h1>{escape(title)}</h1>\n<p class='soft'>{escape(' · '.join(facts))}</p>",
        f"<p class='{look}'>{escape(tables.sentence(result))}{held}</p>",
    ]
    for row, words in zip(
        result.get("retain", {}).values(), forgotten.sentences(result), strict=True
    ):
        look = "verdict bad" if forgotten.verdict(row) == "lost" else "verdict"
        lines.append(f"<p class='{look}'>{escape(words)}</p>")
    warnings = result.get("warnings", ())
    lines += [f"<p class='verdict bad'>Warning: {escape(words)}</p>" for words in warnings]
    return "\n".join(lines)


def _scores(result: Mapping[str, Any]) -> str:
    words = readable.words(result["metric"])
    return elements.figure(
        f"Test {words}", "point and 95 % bootstrap interval", plots.scores(result)
    )


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
    return [elements.figure(title, words, svg) for title, words, svg in drawn if svg]


def _pictures(result: Mapping[str, Any]) -> list[str]:
    found = []
    if "confusion" in result:
        table = result["confusion"]
        svg = plots.confusion(table["classes"], table["counts"])
        found.append(
            elements.figure("Confusion matrix", "examples; colour: share of the true class", svg)
        )
    if "calibration" in result:
        sums = result["calibration"]
        svg = plots.reliability(sums["confidence"], sums["correct"], sums["count"])
        error = result.get("figures", {}).get("test", {}).get("calibration_error")
        words = "accuracy by confidence"
        if error is not None:
            words += f"; calibration error {readable.figure('calibration_error', error)}"
        found.append(elements.figure("Reliability", words, svg))
    if "figures" in result:
        found.append(elements.table(_figures(result["figures"])))
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
    return elements.table(table) + f"\n<p class='soft'>{escape(words)}</p>"


def _groups(result: Mapping[str, Any]) -> str:
    if "groups" not in result:
        return ""
    names = [phase["name"] for phase in result["phases"]]
    table = tables.groups if len(names) <= _PHASE_COLUMNS else tables.openings
    return elements.table(table(result["groups"], names))


def _load(result: Mapping[str, Any]) -> str:
    return elements.table(tables.load(result["loaded"], result.get("load_report", {})), names=2)


def _settings(result: Mapping[str, Any]) -> str:
    versions = tables.Table(("package", "version"), tuple(sorted(result["versions"].items())), 2)
    config = json.dumps(result["config"], indent=2, ensure_ascii=False)
    return (
        f"<details><summary>Config</summary>\n<pre>{escape(config)}</pre>\n</details>\n"
        f"<details><summary>Versions</summary>\n{elements.table(versions)}\n</details>"
    )


def _fact(name: str, value: Any) -> str:
    if isinstance(value, str):
        return _last(value) if value.startswith("/") else value
    return f"{name.replace('_', ' ')} {readable.count(value)}"


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
