"""Which rows of a mixed batch a term is taken over."""

from typing import Any

import jax
import jax.numpy as jnp

from jtl.train.state import Context, Term


def own_rows(term: Term, k: int) -> Term:
    """Return the term over the rows of stream `k` alone, 0 being the task's own rows.

    It sees the batch with a "mask" that is true for these rows only, with labels that are 0 in all
    others. It is a property of each row, so it holds in microbatches and on devices, wherever the
    rows fall: a part without any of them adds a sum and a weight of 0. Where the batch has no
    column "stream" nothing is changed.

    >>> rows = lambda c: (jnp.sum(c.batch["mask"]), 1.0)
    >>> batch = {"mask": jnp.array([True, True, False]), "stream": jnp.array([0, 1, 1])}
    >>> c = Context({}, {}, batch, {}, jnp.int32(0), None)
    >>> int(own_rows(rows, 0)(c)[0]), int(own_rows(rows, 1)(c)[0])
    (1, 1)

    Args:
        term: reads `batch["mask"]`.
        k: number of the stream: 1 is that of the first part that has one.
    """

    def over_own(c: Context) -> tuple[Any, Any]:
        if "stream" not in c.batch:
            return term(c)
        batch = dict(c.batch)
        if f"label/{k}" in batch:  # the stream's labels are of another kind than the task's
            batch["label"] = batch[f"label/{k}"]
        return term(only_rows(c._replace(batch=batch), batch["stream"] == k))

    return over_own


def only_rows(c: Context, mine: jax.Array) -> Context:
    """Return what a term sees where only some rows are real; the labels of others are 0."""
    batch = {**c.batch, "mask": jnp.asarray(c.batch["mask"], bool) & mine}
    if "label" in batch:
        label = jnp.asarray(batch["label"])
        rows = mine.reshape(-1, *(1,) * (label.ndim - 1))
        batch["label"] = jnp.where(rows, label, jnp.zeros_like(label))
    return c._replace(batch=batch)
