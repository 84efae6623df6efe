"""What a run is of, as plain data: `config.json` where there is no config file.

A folder goes on only with the run that it was made for, so all that makes another run is here. A
derived column is reused only for the very computation that it came from, so that is here too.
"""

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jtl.data import Dataset, Source, fingerprint, row_shapes
from jtl.data.store import FORMAT
from jtl.report import record


def called(function: Any) -> Any:
    """Return the name of a function, with the options that were bound to it.

    >>> called(functools.partial(int, base=2))
    {'kind': 'int', 'base': 2}
    """
    if isinstance(function, functools.partial):
        options = {name: _plain(value) for name, value in function.keywords.items()}
        return {**_named(function.func), **options}
    return _named(function)


def sources(data: Mapping[str, Any]) -> dict[str, str]:
    """Return name, number of examples and a checksum of the labels of each part."""
    return {part: f"{s.name}, {s.size} rows, labels {_sum(s)}" for part, s in data.items()}


def weights(params: Any) -> str:
    """Return a checksum of the shapes of a tree and of its smaller leaves."""
    digest = 0
    for leaf in jax.tree.leaves(params):
        digest = zlib.crc32(repr((leaf.shape, str(leaf.dtype))).encode(), digest)
        if leaf.size <= 4096:
            digest = zlib.crc32(np.asarray(leaf).tobytes(), digest)
    return f"{digest:08x}"


def computed(function: Callable[[Any], Any], batch: Any) -> tuple[str, Any]:
    """Return the fingerprint of what a function computes, and the shapes of its result.

    It is traced, not run. What counts is each operation with its dtypes, every array that it reads
    beside its argument (weights, statistics), the versions of jtl and jax, and the device; names
    and code that come to the same operations do not.

    Args:
        function: not jitted, for shorter traces.
        batch: arrays, or their `jax.ShapeDtypeStruct`.

    >>> shape = jax.ShapeDtypeStruct((2,), np.float32)
    >>> computed(lambda x: x + 1, shape)[0] == computed(lambda x: 1 + x, shape)[0]
    False
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(batch)
    setting = (
        *(FORMAT, record.versions(), jax.default_backend(), jax.devices()[0].device_kind),
        jax.config.values.get("jax_default_matmul_precision"),
    )
    return fingerprint(setting, str(closed.jaxpr), list(_constants(closed))), shapes


def column_keys(
    function: Callable[[Any], Any], dataset: Dataset, size: int, names: Sequence[str]
) -> dict[str, str]:
    """Return {name: fingerprint} of the columns that a function gives, as `data.derive` takes them.

    Args:
        function: `raw columns -> {name: (size, ...)}`; its columns depend on nothing else.
        dataset: encoded examples; where nobody knows what it reads, there are no fingerprints.
        size: rows of a batch while computing.
        names: of the columns.
    """
    if dataset.contents is None:
        return {}
    made = [computed(function, shapes)[0] for shapes in row_shapes(dataset, size)]
    return {name: fingerprint(dataset.contents, size, made, name) for name in names}


def _constants(closed: Any) -> Iterator[Any]:
    """Yield every array that a traced function holds, those of the functions in it too."""
    yield from closed.consts
    yield from _held(closed.jaxpr)


def _held(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield from (
            v.val for v in equation.invars if isinstance(v, core.Literal) and np.ndim(v.val)
        )
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if isinstance(value, core.ClosedJaxpr):
                yield from _constants(value)
            elif isinstance(value, core.Jaxpr):
                yield from _held(value)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)


def _named(function: Any) -> dict[str, Any]:
    return {"kind": getattr(function, "__name__", type(function).__name__)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping) and all(isinstance(part, Source) for part in value.values()):
        return sources(value)
    if callable(value):
        return called(value)
    return value if isinstance(value, str | int | float | bool | tuple | None) else str(value)


def _sum(source: Any) -> str:
    labels = np.ascontiguousarray(source.columns["label"])
    return f"{zlib.crc32(labels.tobytes()):08x}"
