"""What happened to every weight on loading: four lists, and the check that refuses surprises."""

import re
from collections.abc import Iterable
from typing import NamedTuple


class LoadReport(NamedTuple):
    """The four lists of a load.

    Attributes:
        loaded: leaves of ours that took their value from the checkpoint.
        fresh: leaves of ours that the checkpoint does not have; they keep their initial value.
        unexpected: names in the checkpoint that no leaf of ours reads.
        wrong_shape: "leaf: checkpoint float32 (..) model float32 (..)"; such a load never passes.
    """

    loaded: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[str, ...] = ()


def counts(report: LoadReport) -> dict[str, int]:
    """Return the length of each list.

    >>> counts(LoadReport(loaded=("a/kernel",), fresh=("b/kernel", "b/bias")))
    {'loaded': 1, 'fresh': 2, 'unexpected': 0, 'wrong_shape': 0}
    """
    return {name: len(names) for name, names in report._asdict().items()}


def text(report: LoadReport, *, limit: int = 6) -> str:
    """Return the counts in one line, and below it up to `limit` names of each list but the first.

    >>> print(text(LoadReport(loaded=("a/kernel",), fresh=("b/bias",))))
    1 loaded, 1 fresh, 0 unexpected, 0 of wrong shape
      fresh: b/bias
    """
    sizes = counts(report)
    lines = [
        f"{sizes['loaded']} loaded, {sizes['fresh']} fresh, {sizes['unexpected']} unexpected, "
        f"{sizes['wrong_shape']} of wrong shape"
    ]
    for name in ("fresh", "unexpected", "wrong_shape"):
        names = getattr(report, name)
        if names:
            lines.append(f"  {name.replace('_', ' ')}: {_some(names, limit)}")
    return "\n".join(lines)


def check(
    report: LoadReport,
    *,
    allow_fresh: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    source: str = "the checkpoint",
) -> None:
    """Refuse a load with weights missing, left over or of another shape.

    Args:
        report: of `fill`.
        allow_fresh: regexes; a fresh leaf that one of them fits as a whole is excused.
        allow_unexpected: the same for names that are only in the checkpoint.
        source: how to name the checkpoint in the error.

    Raises:
        ValueError: anything is not excused. A wrong shape never is.

    >>> check(LoadReport(fresh=("pooler/bias",)), allow_fresh=["pooler/.*"])
    """
    fresh = _unexcused(report.fresh, allow_fresh)
    unexpected = _unexcused(report.unexpected, allow_unexpected)
    if not (fresh or unexpected or report.wrong_shape):
        return
    if not report.loaded:
        raise ValueError(
            f"{source} fits no leaf of this model: it is of another architecture, or its names "
            f"bear a prefix that no alias takes off; it has {_some(report.unexpected, 4)}; the "
            f"model has {_some(report.fresh, 4)}; give the checkpoint of this model"
        )
    found = []
    hints = []
    if fresh:
        found.append(f"{len(fresh)} weights of the model are missing ({_some(fresh, 6)})")
        hints.append("excuse missing weights with allow_fresh=(regex, ...)")
    if unexpected:
        found.append(f"{len(unexpected)} are left over ({_some(unexpected, 6)})")
        hints.append("excuse left-over ones with allow_unexpected=(regex, ...)")
    if report.wrong_shape:
        some = _some(report.wrong_shape, 6)
        found.append(f"{len(report.wrong_shape)} have another shape ({some})")
        hints.append("give the config.json that belongs to these weights")
    raise ValueError(
        f"{source} does not fit the model: {'; '.join(found)}; "
        f"{len(report.loaded)} weights do fit; {', '.join(hints)}"
    )


def _unexcused(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    excuses = [re.compile(pattern) for pattern in patterns]
    return [name for name in names if not any(excuse.fullmatch(name) for excuse in excuses)]


def _some(names: Iterable[str], limit: int) -> str:
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
