"""The tables of a run as text, for the console and for the page.

The dicts that come in are those of `result.json`; `jtl.report.record` writes down their keys.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jtl.report import readable

HELD = "held"
BLIND = ("majority", "mean")  # baselines that read no input
_NAMES = {"majority": "majority class", "linear_probe": "linear probe", "mean": "mean of labels"}
_LISTS = {
    "loaded": "loaded",
    "fresh": "fresh",
    "unexpected": "unexpected",
    "wrong_shape": "of wrong shape",
}


class Table(NamedTuple):
    """A table of text.

    Attributes:
        headers: of the columns.
        rows: cells, as many in each row as there are headers.
        left: how many columns, from the first, are words and stand left; numbers stand right.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


def verdict(result: Mapping[str, Any]) -> Table:
    """Return baselines and target: validation, test, interval of the test figure, seconds.

    >>> score = {"validation": 0.5, "test": 0.52, "test_interval": [0.5, 0.54], "seconds": 0.1}
    >>> table = verdict({"metric": "accuracy", "baselines": {"majority": score}, "target": score})
    >>> table.rows[0]
    ('majority class', '50.0 %', '52.0 %', '50.0 to 54.0 %', '0.10 s')
    """
    metric = result["metric"]
    scores = {baseline_name(name): row for name, row in result["baselines"].items()}
    scores["fine-tuned"] = result["target"]
    rows = tuple(
        (
            name,
            readable.figure(metric, score.get("validation")),
            readable.figure(metric, score.get("test")),
            readable.interval(metric, score.get("test_interval")),
            readable.seconds(score.get("seconds")),
        )
        for name, score in scores.items()
    )
    words = readable.words(metric)
    return Table((words, "validation", "test", "95 % interval", "time"), rows)


def sentence(result: Mapping[str, Any]) -> str:
    """Return the verdict in words: is the fine-tuned model better than the baseline?

    >>> gain = {"over": "linear_probe", "value": 0.031, "interval": [0.012, 0.05]}
    >>> sentence({"metric": "accuracy", "gain": gain})
    'Better than the linear probe by 3.1 points on the test split (95 % interval +1.2 to +5.0).'
    """
    metric, gain = result["metric"], result.get("gain")
    if gain is None:
        score = result["target"]
        bounds = readable.interval(metric, score["test_interval"])
        figure = readable.figure(metric, score["test"])
        return f"{figure} {readable.words(metric)} on the test split (95 % interval {bounds})."
    low, high = gain["interval"]
    name = baseline_name(gain["over"])
    size = readable.difference(metric, abs(gain["value"])).lstrip("+")
    bounds = " to ".join(readable.difference(metric, end, unit=False) for end in (low, high))
    where = f"on the test split (95 % interval {bounds})"
    if low > 0:
        return f"Better than the {name} by {size} {where}."
    if high < 0:
        return f"Worse than the {name} by {size} {where}: the transfer hurts; use the {name}."
    sign = readable.difference(metric, gain["value"])
    return f"No difference from the {name} can be told: {sign} {where}."


def groups(
    rows: Sequence[Mapping[str, Any]], phases: Sequence[str], headers: Sequence[str] | None = None
) -> Table:
    """Return label, leaves, parameters and the peak rate in each phase, or `held`.

    Args:
        rows: `groups` of result.json.
        phases: names of the phases in order.
        headers: what stands over the phases; None is their names.

    >>> row = {"label": "stem", "leaves": 5, "parameters": 1200, "rates": {"all": 1e-5}}
    >>> groups([row], ["head", "all"]).rows
    (('stem', '5', '1,200', 'held', '1e-05'),)
    """
    body = tuple((*_size(row), *_rates(row["rates"], phases)) for row in rows)
    over = tuple(phases if headers is None else headers)
    return Table(("group", "leaves", "parameters", *over), body)


def openings(rows: Sequence[Mapping[str, Any]], phases: Sequence[str]) -> Table:
    """Return `groups` in two columns for all phases: the first that moves it, and its rates.

    >>> row = {"label": "stem", "leaves": 5, "parameters": 1200, "rates": {"b": 1e-5, "c": 2e-5}}
    >>> openings([row], ["a", "b", "c"]).rows
    (('stem', '5', '1,200', 'b', '1e-05 to 2e-05'),)
    """
    body = tuple((*_size(row), *_opening(row["rates"], phases)) for row in rows)
    return Table(("group", "leaves", "parameters", "moves from", "rates"), body)


def phases(rows: Sequence[Mapping[str, Any]], metric: str, *, order: Sequence[str] = ()) -> Table:
    """Return what each phase did and what it cost.

    Args:
        rows: `phases` of result.json.
        metric: name of the figure before and after.
        order: labels from stem to heads.

    >>> row = {"name": "head", "live": ["head"], "epochs": 1, "steps": 63, "metric_before": 0.5,
    ...     "metric_after": 0.8, "seconds": 2.0, "compile_seconds": 1.0, "flops_per_step": 2e9,
    ...     "optimizer_bytes": 3000}
    >>> phases([row], "accuracy").rows[0][:5]
    ('head', 'head', '1', '63', '50.0 %')
    """
    headers = (
        *("phase", "live", "epochs", "steps", "before", "after", "time", "compiling", "stall"),
        *("compute a step", "optimizer", "held"),
    )
    return Table(headers, tuple(_phase(row, metric, order) for row in rows), left=2)


def matrix(result: Mapping[str, Any], way: str) -> Table:
    """Return the figure on each task (columns) after each task (rows) of a continual run.

    >>> runs = {"plain": {"matrix": [[0.9, 0.5], [0.6, 0.8]]}}
    >>> matrix({"tasks": ["a", "b"], "metric": "accuracy", "runs": runs}, "plain").rows[1]
    ('after b', '60.0 %', '80.0 %')
    """
    names, rows = result["tasks"], result["runs"][way]["matrix"]
    body = tuple(
        (f"after {name}", *(readable.figure(result["metric"], value) for value in row))
        for name, row in zip(names, rows, strict=True)
    )
    return Table(("", *names), body)


def loaded(counts: Mapping[str, int]) -> str:
    """Return the counts of a load in one line.

    >>> loaded({"loaded": 101, "fresh": 2, "unexpected": 0, "wrong_shape": 0})
    '101 loaded, 2 fresh, 0 unexpected, 0 of wrong shape'
    """
    return ", ".join(f"{counts[name]} {words}" for name, words in _LISTS.items())


def load(
    counts: Mapping[str, int], names: Mapping[str, Sequence[str]], *, limit: int = 12
) -> Table:
    """Return the four lists of a load: how many names, and the first of those not loaded.

    >>> counts = {"loaded": 1, "fresh": 1, "unexpected": 0, "wrong_shape": 0}
    >>> load(counts, {"fresh": ["pooler/bias"]}).rows[1]
    ('fresh', '1', 'pooler/bias')
    """
    rows = []
    for name, words in _LISTS.items():
        found = () if name == "loaded" else names.get(name, ())
        more = f" and {len(found) - limit} more" if len(found) > limit else ""
        rows.append((words, str(counts[name]), ", ".join(found[:limit]) + more))
    return Table(("weights", "number", "names"), tuple(rows))


def baseline_name(name: str) -> str:
    """Return what a baseline is called in a table.

    >>> baseline_name("majority"), baseline_name("old_model")
    ('majority class', 'old model')
    """
    return _NAMES.get(name, name.replace("_", " "))


def _size(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["label"], readable.count(row["leaves"]), readable.count(row["parameters"])


def _rates(rates: Mapping[str, float | int | None], phases: Sequence[str]) -> list[str]:
    return [readable.rate(rates[phase]) if phase in rates else HELD for phase in phases]


def _opening(rates: Mapping[str, float | int | None], phases: Sequence[str]) -> tuple[str, str]:
    moving = [phase for phase in phases if phase in rates]
    if not moving:
        return HELD, ""
    known = sorted({rate for rate in rates.values() if rate is not None})
    ends = [readable.rate(rate) for rate in known[:1] + known[1:][-1:]]
    return moving[0], " to ".join(ends) or readable.rate(None)


def _phase(row: Mapping[str, Any], metric: str, order: Sequence[str]) -> tuple[str, ...]:
    live = readable.spans(readable.in_order(row["live"], order))
    if row.get("skipped"):
        before = readable.figure(metric, row["metric_before"])
        return (row["name"], live, "skipped", "", before, "", "", "", "", "", "", "")
    held = {True: "same bits", False: "CHANGED", None: readable.NOTHING}
    return (
        row["name"],
        live,
        f"{row['epochs']:.3g}",
        readable.count(row["steps"]),
        readable.figure(metric, row["metric_before"]),
        readable.figure(metric, row["metric_after"]),
        readable.seconds(row["seconds"]),
        readable.seconds(row["compile_seconds"]),
        readable.seconds(row.get("stall_seconds")),
        readable.magnitude(row["flops_per_step"], "FLOP"),
        readable.magnitude(row["optimizer_bytes"], "B"),
        held[row.get("held_bit_equal")],
    )
