"""Memory of a process that trains on a CPU: what one step frees, the next one takes again."""

import ctypes
import os
import sys

_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8  # parameters of glibc's mallopt


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory where `JTL_KEEP_MEMORY=1` asks for it; return whether.

    A step on a CPU takes its temporary memory anew each time. glibc gives blocks of that size back
    to the system when they are freed, and the system clears every page of the next one, on one
    core: `python -m benchmarks.freezing --keep-memory` shows the step without that. It holds for
    the whole process, whose memory then stays at its peak and may grow beyond it, as blocks of
    other sizes leave gaps; so it is not done unasked. Systems without glibc are left as they are.
    """
    if os.environ.get("JTL_KEEP_MEMORY", "0") != "1" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
