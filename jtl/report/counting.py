"""How far a long count is, in a line now and then: for columns, before there are steps to show."""

import time
from collections.abc import Callable
from typing import Any

from jtl.report import readable
from jtl.report.screen import make_console, say


def counting(
    what: str,
    *,
    out: Any = None,
    every: float | int = 10.0,
    now: Callable[[], float] = time.monotonic,
) -> Callable[[int, int], None]:
    """Return `show(done, total)`, which prints a line at most every so many seconds.

    Args:
        what: is counted.
        out: a `rich` console; None writes to standard output.
        every: seconds between lines, and before the first.
        now: the clock, in seconds.
    """
    began: list[float] = []

    def show(done: int, total: int) -> None:
        moment = now()
        began[:] = began or [moment, moment]
        if done >= total:
            began.clear()
        elif moment - began[1] >= every:
            began[1] = moment
            left = (moment - began[0]) * (total - done) / max(done, 1)
            line = f"  {what}: {readable.count(done)} of {readable.count(total)}"
            say(make_console() if out is None else out, f"{line}, {readable.clock(left)} left")

    return show
