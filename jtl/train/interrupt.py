"""Ctrl-C between steps: a step that is cut in two has taken its state and returned none."""

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any


def between(items: Iterable[Any]) -> Iterator[Any]:
    """Yield the items; a Ctrl-C while one is made waits until the next is asked for, or for close.

    A second Ctrl-C is raised at once. Outside the main thread, which alone gets signals, and
    where Ctrl-C is ignored (under nohup), this does nothing.
    """
    pending: list[int] = []
    iterator = iter(items)
    while True:
        with _collected(pending):
            item = next(iterator, _END)
        try:
            if item is _END:
                return
            yield item
        finally:
            if pending:
                raise KeyboardInterrupt


_END = object()


@contextlib.contextmanager
def _collected(pending: list[int]) -> Iterator[None]:
    """Put a SIGINT on the list instead of raising it; restore the handler at once for a second."""
    before = signal.getsignal(signal.SIGINT)
    other = threading.current_thread() is not threading.main_thread()
    if other or before in (None, signal.SIG_IGN):
        yield
        return

    def note(number: int, frame: Any) -> None:
        del frame
        pending.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
