"""What a run prints before and after it goes: what was loaded, which groups move, the verdict."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jtl.report import forgotten, readable, tables
from jtl.report.progress import progress
from jtl.report.screen import draw, fits, make_console, say

__all__ = ["finished", "groups", "loaded", "make_console", "matrices", "progress", "verdict"]


def loaded(source: str, report: Any, *, out: Any = None, limit: int = 6) -> None:
    """Print what came from the checkpoint and what did not.

    Args:
        source: name of the checkpoint.
        report: the four lists of names, as a dict or as the `LoadReport` of `jtl.weights`; None
            where the weights are random.
        out: a `rich` console; None writes to standard output.
        limit: names shown of each list.
    """
    out = make_console() if out is None else out
    if report is None:
        say(out, f"{source}: random weights, no checkpoint")
        return
    lists: Mapping[str, Sequence[str]] = report if isinstance(report, Mapping) else report._asdict()
    counts = {name: len(names) for name, names in lists.items()}
    say(out, f"{source}: weights {tables.loaded(counts)}")
    for name in ("fresh", "unexpected", "wrong_shape"):
        names = lists[name]
        if names:
            more = f" and {len(names) - limit} more" if len(names) > limit else ""
            say(out, f"  {name.replace('_', ' ')}: {', '.join(names[:limit])}{more}")


def groups(rows: Sequence[Mapping[str, Any]], phases: Sequence[str], *, out: Any = None) -> None:
    """Print label, leaves, parameters and the rate in each phase of every group.

    Phases get numbers for names, or two columns in all, where the console is too narrow.

    Args:
        rows: `groups` of result.json.
        phases: names of the phases in order.
        out: a `rich` console; None writes to standard output.
    """
    out = make_console() if out is None else out
    numbers = [str(i) for i in range(1, len(phases) + 1)]
    named, numbered = tables.groups(rows, phases), tables.groups(rows, phases, numbers)
    if fits(out, named):
        draw(out, named, dim=(tables.HELD,))
    elif fits(out, numbered):
        draw(out, numbered, dim=(tables.HELD,))
        legend = ", ".join(f"{i} {name}" for i, name in zip(numbers, phases, strict=True))
        say(out, f"phases: {legend}")
    else:
        draw(out, tables.openings(rows, phases), dim=(tables.HELD,))


def verdict(result: Mapping[str, Any], *, out: Any = None) -> None:
    """Print baselines and target on both splits, and what that says in words.

    Where sources were watched, what they lost; and the warnings of the run, last.
    """
    out = make_console() if out is None else out
    draw(out, tables.verdict(result), strong=("fine-tuned",))
    say(out, tables.sentence(result), style="bold")
    if result.get("retain"):
        found = forgotten.table(result)
        draw(out, found if fits(out, found) else forgotten.short(found), strong=(forgotten.TARGET,))
        for words in forgotten.sentences(result):
            say(out, words, style="bold")
    for words in result.get("warnings", ()):
        say(out, f"WARNING: {words}", style="bold red")


def finished(folder: str | pathlib.Path, result: Mapping[str, Any], *, out: Any = None) -> None:
    """Print the verdict of a run that ended, and where its folder is."""
    out = make_console() if out is None else out
    verdict(result, out=out)
    took = f" after {readable.seconds(result['seconds'])}" if "seconds" in result else ""
    say(out, f"run ended{took}; all of it: {pathlib.Path(folder) / 'report.html'}")


def matrices(result: Mapping[str, Any], *, out: Any = None) -> None:
    """Print, for each way of a continual run, the test figure on every task after every task.

    Args:
        result: of `recipes.continual`.
        out: a `rich` console; None writes to standard output.
    """
    out = make_console() if out is None else out
    for way, figures in result["runs"].items():
        title = f"{way}: {readable.words(result['metric'])} on the test splits"
        say(out, title, style="bold")
        draw(out, tables.matrix(result, way))
        transfer = readable.difference(result["metric"], figures["backward_transfer"])
        average = readable.figure(result["metric"], figures["average"])
        say(out, f"average {average}, backward transfer {transfer}")
