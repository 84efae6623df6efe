"""Memory of a process that trains on a CPU: what one step frees, the next one takes again."""

import ctypes
import os
import sys

_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8  # parameters of glibc's mallopt


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory where `JTL_KEEP_MEMORY=1` asks for it; return whether.

    A step on a CPU takes its temporary memory anew each time. glibc gives blocks of that size back
    to the system when they are freed, and the system clears every page of the next one, on one
    core: `python -m benchmarks.freezing --no-keep-memory` shows the step with that. It holds for
    the whole process, whose memory then stays at its peak until `give_back_memory`; so a library
    does not do it unasked, and the command `python -m jtl` asks for it. Systems without glibc are
    left as they are.
    """
    if not _asked():
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1))
    return _call("mallopt", *settings)


def give_back_memory() -> bool:
    """Give the freed memory that is kept back to the system once; return whether that was done.

    The programs of each phase take blocks of other sizes, which leave gaps; between two phases
    the gaps are given back, else a run's memory could grow to the sum of its phases' peaks.
    """
    return _asked() and _call("malloc_trim", (0,))


def _asked() -> bool:
    return os.environ.get("JTL_KEEP_MEMORY", "0") == "1" and sys.platform.startswith("linux")


def _call(name: str, *calls: tuple[int, ...]) -> bool:
    """Call a function of the C library with each of these; False where it has none."""
    function = getattr(ctypes.CDLL(None), name, None)
    return function is not None and all(function(*given) == 1 for given in calls)
