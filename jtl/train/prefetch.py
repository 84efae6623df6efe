"""Batches on the device before they are needed: the next is on its way while a step runs."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax


def prefetched(
    batches: Iterable[Any], put: Callable[[Any], Any] = jax.device_put, *, ahead: int = 1
) -> Iterator[Any]:
    """Yield the batches as `put` places them, `ahead` of them placed before they are asked for.

    >>> taken = []
    >>> batches = prefetched(range(4), lambda i: taken.append(i) or i, ahead=2)
    >>> next(batches), taken
    (0, [0, 1, 2])

    Args:
        batches: of the host.
        put: starts the transfer of one batch and does not wait for its end.
        ahead: number of batches that wait on the device beside the one in use.
    """
    waiting: collections.deque[Any] = collections.deque()
    for batch in batches:
        waiting.append(put(batch))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
