"""Which rows of a mixed batch a term is taken over."""

from typing import Any

import jax.numpy as jnp

from jtl.train.state import Context, Term


def own_rows(term: Term, k: int) -> Term:
    """Return the term over the rows of stream `k` alone, 0 being the task's own rows.

    It sees the batch with a "mask" that is true for these rows only. It is a property of each row,
    so it holds in microbatches and on devices, wherever the rows fall: a part without any of them
    adds a sum and a weight of 0. Where the batch has no column "stream" nothing is changed.

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
        mask = jnp.asarray(c.batch["mask"], bool) & (c.batch["stream"] == k)
        return term(c._replace(batch={**c.batch, "mask": mask}))

    return over_own
