"""Memory of a process that trains on a CPU: what one step frees, the next one takes again."""

import ctypes
import os
import sys

_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8  # parameters of glibc's mallopt


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the process, and return whether it does.

    A step on a CPU takes its temporary memory anew each time. glibc gives blocks of that size back
    to the system when they are freed, and the system clears every page of the next one, on one
    core: `python -m benchmarks.freezing` shows what that costs. It holds for the whole process,
    whose memory then stays at its peak. `JTL_KEEP_MEMORY=0` in the environment leaves things as
    they are, as do systems without glibc.
    """
    if os.environ.get("JTL_KEEP_MEMORY", "1") == "0" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
