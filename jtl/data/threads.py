"""Work done ahead by Grain's threads, in order: for decoding, never for rows that lie in memory."""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

THREADS = 16


def ahead(
    make: Callable[[int], Any], start: int, stop: int | None, *, prefetch: int
) -> Iterator[Any]:
    """Yield `make(start)`, `make(start + 1)`, ... while threads make those that follow.

    Args:
        make: called from several threads at once.
        start: the first number.
        stop: one after the last; None goes on without end.
        prefetch: at least so many are made ahead, and one for each thread.

    >>> list(ahead(lambda i: i * i, 2, 5, prefetch=2))
    [4, 9, 16]
    """
    import grain

    allowed = getattr(os, "sched_getaffinity", None)  # fewer than the machine has, in containers
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    threads = min(cores, THREADS)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
    numbers = grain.MapDataset.range(start, sys.maxsize if stop is None else stop)
    return iter(numbers.map(make).to_iter_dataset(options))
