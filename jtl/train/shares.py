"""What each term of the loss does to the live weights: the norm of its own gradient, and its share.

    share of a term = norm of its gradient / sum of the norms of all terms' gradients

Whether a penalty is weak, fair or all that is left of the task cannot be read off the losses: a
term of large value may pull nowhere. It is a program apart, run every so many steps on the state
and the batch of a step, and it changes neither.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jtl import trees
from jtl.train.compile import Compiled, CompiledSteps, measured
from jtl.train.gradients import make_gradients
from jtl.train.state import Apply, Batch, Metrics, Term, TrainState

EARLY = 8


class Shares(NamedTuple):
    """How the shares of a phase are taken.

    Attributes:
        call: `(state, batch, start) -> metrics`, compiled once for each shape of batch.
        every: steps from one to the next; the first step of the phase is one, and so is the one
            `EARLY` steps after it: at the first, a penalty on what has just opened is still zero,
            and the phase may be short.
    """

    call: Any
    every: int

    def due(self, since: int) -> bool:
        """Return whether the step is one of those, by the number of steps of the phase before it.

        >>> [since for since in range(7) if Shares(None, 3).due(since)]
        [0, 3, 6]
        >>> [since for since in range(101) if Shares(None, 50).due(since)]
        [0, 8, 50, 100]
        """
        return since % self.every == 0 or since == min(EARLY, self.every)


def make_shares(
    apply: Apply,
    terms: Mapping[str, Term],
    labels: PyTree[str],
    live: frozenset[str],
    *,
    reference: Sequence[str] = (),
    accumulate: int = 1,
) -> Any:
    """Return `shares(state, batch) -> metrics`: grad_norm/TERM, and share/TERM between 0 and 1.

    >>> from jtl.train.state import create
    >>> import optax
    >>> def apply(params, stats, batch, *, key, live):
    ...     return params["w"] * batch["x"], stats
    >>> terms = {
    ...     "fit": lambda c: (jnp.sum(c.out), 1.0),  # slope 3 in w
    ...     "pull": lambda c: (0.5 * c.params["w"] ** 2, 1.0),  # slope 1 where w is 1
    ... }
    >>> state = create({"w": 1.0}, {}, optax.sgd(1.0), key=jax.random.key(0))
    >>> shares = make_shares(apply, terms, {"w": "w"}, frozenset({"w"}))
    >>> {name: float(x) for name, x in shares(state, {"x": jnp.array([1.0, 2.0])}).items()}
    {'grad_norm/fit': 3.0, 'grad_norm/pull': 1.0, 'share/fit': 0.75, 'share/pull': 0.25}

    The gradients are those of the step that takes this state and batch, dropout too, before
    projection and clip. Where no term has a gradient, all shares are 0.

    Args:
        apply: as in `make_step`.
        terms: as in `make_step`.
        labels: tree of labels of the parameters.
        live: labels that move.
        reference: names of terms that others are projected on: they have a norm and no share.
        accumulate: number of microbatches that the batch is taken in, to need no more memory.
    """
    names = tuple(terms)
    groups = tuple((name,) for name in names)
    gradients = make_gradients(apply, terms, labels, live, groups=groups, accumulate=accumulate)

    def shares(state: TrainState, batch: Batch) -> Metrics:
        found = gradients(state, batch).grads
        norms = {name: trees.norm(tree) for name, tree in zip(names, found, strict=True)}
        own = {name: norm for name, norm in norms.items() if name not in reference}
        total = sum(own.values(), jnp.float32(0.0))
        divisor = jnp.where(total == 0, 1.0, total)
        return {
            **{f"grad_norm/{name}": norm for name, norm in norms.items()},
            **{f"share/{name}": norm / divisor for name, norm in own.items()},
        }

    return shares


def compiled(shares: Any) -> CompiledSteps:
    """Return `(state, batch, start) -> metrics`, which compiles itself once for each shape.

    Unlike a step it takes no buffers, and the state may lie in another way than the one that it was
    compiled for, as that of a step under `pmap` does.
    """
    return CompiledSteps(shares, _compile)


def _compile(shares: Any, state: Any, batch: Any, start: Any) -> Compiled:
    del start
    began = time.perf_counter()
    program = jax.jit(shares).lower(state, batch).compile()
    where = jax.tree.map(lambda x: getattr(x, "sharding", None), state)

    def placed(leaf: Any, there: Any) -> Any:
        apart = there is not None and leaf.committed and leaf.sharding != there
        return jax.device_put(leaf, there) if apart else leaf

    def call(state: Any, batch: Any, start: Any) -> Any:
        del start
        return program(jax.tree.map(placed, state, where), batch)

    return measured(program, time.perf_counter() - began)._replace(call=call)
