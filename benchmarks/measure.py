"""How the benchmarks measure: repeats in turn, the least of each; cells in processes of their own.

Rows go to standard output, one JSON object a line; what happens meanwhile goes to standard error.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

_BEGAN = time.perf_counter()


def _nothing() -> None:
    return None


class Timed(NamedTuple):
    """Something to time.

    Attributes:
        call: what is timed; it returns when its work is done.
        flops: of a call; NaN where nobody counts them.
        prepare: what comes before it and is not timed.
    """

    call: Callable[[], Any]
    flops: float = math.nan
    prepare: Callable[[], Any] = _nothing


def least(calls: Mapping[str, Timed], repeats: int) -> dict[str, float]:
    """Return the least seconds of each, all of them taken in turn in every repeat.

    One call of each goes before, uncounted: it compiles and touches its memory.
    """
    best = dict.fromkeys(calls, math.inf)
    for repeat in range(repeats + 1):
        say(f"repeat {repeat} of {repeats}" if repeat else f"first calls of {', '.join(calls)}")
        for name, timed in calls.items():
            timed.prepare()
            began = time.perf_counter()
            timed.call()
            if repeat:
                best[name] = min(best[name], time.perf_counter() - began)
    return best


def jax_matmul(size: int, dtype: str) -> Timed:
    """Return a product of two square matrices, the ceiling of what this machine computes."""
    import jax
    import jax.numpy as jnp

    left = jnp.asarray(np.random.default_rng(0).standard_normal((size, size)), dtype)
    product = jax.jit(jnp.matmul).lower(left, left).compile()
    return Timed(lambda: jax.block_until_ready(product(left, left)), 2.0 * size**3)


def threads() -> int:
    """Return how many cores this process may use: as many as each side has threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(line: str) -> None:
    """Tell the person who waits, with the seconds since the start."""
    print(f"[{time.perf_counter() - _BEGAN:6.1f} s] {line}", file=sys.stderr, flush=True)


def emit(row: Mapping[str, Any], file: str | None = None) -> None:
    """Print a result, and add it to a file if there is one."""
    line = json.dumps(clean(row))
    print(line, flush=True)
    if file:
        with pathlib.Path(file).open("a") as out:
            out.write(line + "\n")


def clean(value: Any, digits: int = 4) -> Any:
    """Return plain data with numbers of few digits; NaN and infinity become None.

    >>> clean({"a": 1.23456789, "b": float("nan"), "c": [1e-7, 3]})
    {'a': 1.235, 'b': None, 'c': [1e-07, 3]}
    """
    if isinstance(value, Mapping):
        return {name: clean(one, digits) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [clean(one, digits) for one in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def spawn(module: str, cell: Mapping[str, Any], **environment: str) -> Iterator[dict[str, Any]]:
    """Yield the rows that `python -m MODULE --cell JSON` prints, as they come.

    Raises:
        RuntimeError: the process failed; the rows it had printed came before.
    """
    command = [sys.executable, "-m", module, "--cell", json.dumps(cell)]
    given = {**os.environ, **environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=given) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"{module} {json.dumps(cell)} ended with {process.returncode}")


def why(error: BaseException) -> str:
    r"""Return an error in one line.

    >>> why(ValueError("too long\nby far"))
    'ValueError: too long'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
