"""Run a model over data in evaluation mode: predictions in order, and sums of metrics."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl import masks
from jtl.train.state import Apply, Batch

Evaluate = Callable[[Any, Any, Iterable[Batch]], Any]


@dataclasses.dataclass(frozen=True)
class Predict:
    """A forward pass over data; `make_predict` says what it gives.

    Attributes:
        heads: keys of the model's `out`.
        forward: jitted, `(params, stats, batch) -> ({head: values}, stats)`.
    """

    heads: tuple[str, ...]
    forward: Any

    def __call__(self, params: Any, stats: Any, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
        """Return {head: values (n, ...)}, rows in the order of their index."""
        found: list[dict[str, np.ndarray]] = []
        index: list[np.ndarray] = []
        for batch, value in _each(self.forward, params, stats, batches):
            real = np.asarray(batch["mask"])
            index.append(np.asarray(batch["index"])[real])
            found.append({name: np.asarray(rows)[real] for name, rows in value.items()})
        order = _order(np.concatenate(index))
        return {name: np.concatenate([part[name] for part in found])[order] for name in self.heads}

    def warm(self, params: Any, stats: Any, batches: Iterable[Batch]) -> None:
        """Compile for every shape of batch that is coming; arguments are shapes."""
        for batch in batches:
            self.forward.lower(params, stats, dict(batch)).compile()


def make_predict(
    apply: Apply, *, heads: Sequence[str], jit: Callable[..., Any] = jax.jit
) -> Predict:
    """Return `predict(params, stats, batches) -> {head: values (n, ...)}`.

    Rows come in the order of `batch["index"]`, in float32; padding rows (mask False) are left out.
    Each shape of batch is compiled once, however often it is called.

    >>> predict = make_predict(lambda params, stats, batch, **_: (batch, stats), heads=("x",))
    >>> batch = {"x": np.ones(3), "mask": np.array([1, 1, 0], bool), "index": np.array([1, 0, -1])}
    >>> predict({}, {}, [batch])["x"].tolist()
    [1.0, 1.0]

    Args:
        apply: the forward pass; it runs with nothing live and no key.
        heads: keys of `out`.
        jit: how `(params, stats, batch) -> values` is compiled; over several devices,
            `parallel.split_forward` of their spread.

    Raises:
        ValueError: when called: no batches, a head that `out` lacks, two rows of one index, or
            statistics that an evaluation moved.
    """

    def values(out: Any, batch: Batch) -> Any:
        del batch
        missing = sorted(set(heads) - set(out))
        if missing:
            raise ValueError(
                f"heads {missing} are asked for; the model gives {sorted(out)}; name some of these"
            )
        return {name: out[name].astype(jnp.float32) for name in heads}

    return Predict(tuple(heads), jit(_forward(apply, values)))


def make_evaluate(apply: Apply, sums: Callable[[Any, Any], Any]) -> Evaluate:
    """Return `evaluate(params, stats, batches) -> total`, the sums added up over the batches.

    >>> forward = lambda params, stats, batch, **_: (batch, stats)
    >>> evaluate = make_evaluate(forward, lambda out, batch: {"total": out["x"].sum()})
    >>> float(evaluate({}, {}, [{"x": np.ones(3)}, {"x": np.ones(2)}])["total"])
    5.0

    Args:
        apply: the forward pass; it runs with nothing live and no key.
        sums: `(out, batch) -> tree of sums` that add up over batches, such as
            `losses.metrics.accuracy_sums`; it must leave padding rows out.

    Raises:
        ValueError: when called: no batches, or statistics that an evaluation moved.
    """
    forward = jax.jit(_forward(apply, sums))

    def evaluate(params: Any, stats: Any, batches: Iterable[Batch]) -> Any:
        total = None
        for _, value in _each(forward, params, stats, batches):
            part = jax.tree.map(lambda x: np.asarray(x, np.float64), value)
            total = part if total is None else jax.tree.map(np.add, total, part)
        return total

    return evaluate


def _forward(apply: Apply, take: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def forward(params: Any, stats: Any, batch: Batch) -> Any:
        out, moved = apply(params, stats, batch, key=None, live=frozenset())
        return take(out, batch), moved

    return forward


def _each(forward: Callable[..., Any], params: Any, stats: Any, batches: Iterable[Batch]) -> Any:
    """Yield (batch, value), one batch behind the device; the first shows that nothing moved."""
    waiting = None
    for number, batch in enumerate(batches):
        value, moved = forward(params, stats, dict(batch))
        if number == 0:
            masks.assert_held(stats, moved)
        if waiting is not None:
            yield waiting
        waiting = (batch, value)
    if waiting is None:
        raise ValueError(
            "there are no batches to evaluate; the data is empty or the iterator spent"
        )
    yield waiting


def _order(index: np.ndarray) -> np.ndarray:
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(twice):
        raise ValueError(
            f"{len(twice)} rows of {len(index)} come twice, first {twice[:6].tolist()}; give the "
            "batches of one epoch, each row once"
        )
    return order
