"""Gradients of the terms over the live leaves, microbatches and devices: one forward pass each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jtl import masks, trees
from jtl.train.state import Apply, Batch, Context, Term, TrainState

Sums = dict[str, tuple[jax.Array, jax.Array]]


class Gradients(NamedTuple):
    """What one batch gives.

    Attributes:
        values: {term: S / W} of the whole batch.
        grads: for each group of terms the gradient of its sum; None in the place of held leaves.
        task: the gradient of the first group through `apply` alone, without what reaches the
            parameters through `Context.params`; None where it was not asked for.
        stats: as `apply` returned them.
    """

    values: dict[str, jax.Array]
    grads: tuple[Any, ...]
    task: Any
    stats: Any


def make_gradients(
    apply: Apply,
    terms: Mapping[str, Term],
    labels: PyTree[str],
    live: frozenset[str],
    *,
    groups: Sequence[Sequence[str]] | None = None,
    apart: bool = False,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch], Gradients]:
    """Return `gradients(state, batch) -> Gradients`, over the live leaves alone.

    Each group is a backward pass of its own over one forward pass.

    Args:
        apply: as in `make_step`.
        terms: as in `make_step`.
        labels: tree of labels of the parameters.
        live: labels whose leaves are differentiated.
        groups: names of terms whose gradients are summed; None is one group of all.
        apart: whether `task` is wanted. It takes no other pass: `apply` and `Context.params` get a
            copy of the leaves each, and the sum of the two gradients is the whole one.
        accumulate: number of microbatches that the batch is taken in.
        axis_name: axis of a `pmap` or `shard_map` around it; None for one program.

    Raises:
        ValueError: when traced: as `make_sums`, and rows that do not divide.
    """
    groups = (tuple(terms),) if groups is None else tuple(map(tuple, groups))
    chosen = masks.mask(labels, live)
    sums = make_sums(apply, terms, live)

    def total(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    def of_rows(state: TrainState, rows: Batch, stats: Any, key: jax.Array, weights: Any) -> Any:
        moving, held = masks.split(state.params, chosen)

        def objectives(*copies: Any) -> Any:
            forward, shown = (masks.merge(copy, held) for copy in (copies[0], copies[-1]))
            found, moved = sums(forward, stats, rows, state, key, shown=shown)
            divisors = total(_weights(found)) if weights is None else weights
            values = {name: found[name][0] / _divisor(divisors[name]) for name in found}
            return tuple(sum(values[name] for name in group) for group in groups), (values, moved)

        copies = (moving, moving) if apart else (moving,)
        losses, pullback, (values, moved) = jax.vjp(objectives, *copies, has_aux=True)
        found = [pullback(_only(i, losses)) for i in range(len(groups))]
        grads = tuple(
            jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *each) for each in found
        )
        return values, (grads, found[0][0] if apart else None), moved

    def accumulated(state: TrainState, batch: Batch, key: jax.Array) -> Any:
        parts = (jnp.arange(accumulate), _microbatches(batch, accumulate))

        def weigh(part: Any) -> Any:
            # The weights need no forward pass, and XLA drops it: the FLOPs are tested.
            found, _ = sums(
                state.params, state.stats, part[1], state, jax.random.fold_in(key, part[0])
            )
            return _weights(found)

        weights = total(jax.tree.map(lambda w: jnp.sum(w, axis=0), jax.lax.map(weigh, parts)))

        def add(carry: Any, part: Any) -> Any:
            stats, so_far = carry
            values, found, stats = of_rows(
                state, part[1], stats, jax.random.fold_in(key, part[0]), weights
            )
            return (stats, jax.tree.map(lambda a, b: a + b, so_far, found)), values

        moving, _ = masks.split(state.params, chosen)
        zeros = jax.tree.map(
            lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), moving
        )
        begin = ((zeros,) * len(groups), zeros if apart else None)
        (stats, found), values = jax.lax.scan(add, (state.stats, begin), parts)
        like = ((moving,) * len(groups), moving if apart else None)
        found = jax.tree.map(lambda g, p: g.astype(p.dtype), found, like)
        return jax.tree.map(lambda v: jnp.sum(v, axis=0), values), found, stats

    def gradients(state: TrainState, batch: Batch) -> Gradients:
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        if accumulate == 1:
            values, found, stats = of_rows(state, batch, state.stats, key, None)
        else:
            values, found, stats = accumulated(state, batch, key)
        values, (grads, task) = total((values, found))
        return Gradients(values, grads, task, stats)

    return gradients


def make_sums(
    apply: Apply, terms: Mapping[str, Term], live: frozenset[str]
) -> Callable[..., tuple[Sums, Any]]:
    """Return `sums(params, stats, batch, state, key) -> ({term: (sum, weight)}, stats)`.

    Sums and weights are float32 scalars; `state` gives refs and step alone. With `shown=` the terms
    see these parameters, and `apply` the others.

    Raises:
        ValueError: when traced: a term gives no pair of scalars, or `apply` returns statistics of
            another structure.
    """

    def sums(
        params: Any, stats: Any, batch: Batch, state: TrainState, key: jax.Array, shown: Any = None
    ) -> tuple[Sums, Any]:
        apply_key, *keys = jax.random.split(key, 1 + len(terms))
        out, moved = apply(params, stats, batch, key=apply_key, live=live)
        trees.check_structure(stats, moved, "the statistics that apply returned")
        seen = params if shown is None else shown
        found = {
            name: _pair(name, term(Context(seen, out, batch, state.refs, state.step, own)))
            for (name, term), own in zip(terms.items(), keys, strict=True)
        }
        return found, moved

    return sums


def _only(chosen: int, losses: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(jnp.full_like(loss, i == chosen) for i, loss in enumerate(losses))


def _pair(name: str, value: Any) -> tuple[jax.Array, jax.Array]:
    pair = value if isinstance(value, tuple) else (value,)
    shapes = [jnp.shape(part) for part in pair]
    if shapes != [(), ()]:
        raise ValueError(
            f"term {name!r} gives values of shapes {shapes}; a term returns (sum, weight), two "
            "scalars; a mean over the batch is the sum over its rows and their number"
        )
    total, weight = (jnp.asarray(part, jnp.float32) for part in pair)
    return total, jax.lax.stop_gradient(weight)


def _weights(found: Sums) -> dict[str, jax.Array]:
    return {name: weight for name, (_, weight) in found.items()}


def _divisor(weight: jax.Array) -> jax.Array:
    """Return the weight, or 1 where a term has nothing to count: its sum is 0 then."""
    return jnp.where(weight > 0, weight, 1.0)


def _microbatches(batch: Batch, accumulate: int) -> dict[str, Any]:
    rows = {name: jnp.shape(value)[:1] for name, value in batch.items()}
    if len(set(rows.values())) != 1 or any(not n or n[0] % accumulate for n in rows.values()):
        raise ValueError(
            f"columns have { {name: n[0] if n else None for name, n in rows.items()} } rows, and "
            f"the batch is taken in {accumulate} parts; the number of rows must be the same in "
            f"all columns and a multiple of {accumulate}"
        )

    def parts(value: Any) -> jax.Array:
        value = jnp.asarray(value)
        return value.reshape(-1, accumulate, *value.shape[1:]).swapaxes(0, 1)

    return {name: parts(value) for name, value in batch.items()}
