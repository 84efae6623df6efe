"""One training step: differentiate the live leaves alone, and leave everything else as it is."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jtl import masks, trees
from jtl.train import average
from jtl.train.state import Apply, Batch, Context, Metrics, Step, Term, TrainState

Rate = float | Callable[[Any], Any]
Sums = dict[str, tuple[jax.Array, jax.Array]]


def make_step(
    apply: Apply,
    terms: Mapping[str, Term],
    tx: optax.GradientTransformation,
    labels: PyTree[str],
    rates: Mapping[str, Rate],
    *,
    clip: float | None = None,
    accumulate: int = 1,
    ema: float | None = None,
    axis_name: str | None = None,
) -> Step:
    """Return `step(state, batch, start) -> (state, metrics)` of one phase.

        loss = sum over terms of S / W

    with the sums S and the weights W added up over microbatches and devices before the division, so
    that padding and unequal counts weigh right. Where the loss, a gradient, a rate or a
    statistic is not finite, `metrics["finite"]` and `state.finite` are False, and nothing else in
    the state changes, in this step and in those after it: the batch of step `state.step` is the one
    that failed. `state._replace(finite=jnp.bool_(True))` goes on.

    >>> from jtl.train.state import create
    >>> def apply(params, stats, batch, *, key, live):
    ...     return params["w"] * batch["x"], stats
    >>> def half_square(c):
    ...     return jnp.sum(c.out**2) / 2, jnp.float32(c.out.size)
    >>> tx = optax.sgd(1.0)
    >>> step = make_step(apply, {"fit": half_square}, tx, {"w": "w"}, {"w": 0.5})
    >>> state = create({"w": 2.0}, {}, tx, key=jax.random.key(0))
    >>> state, metrics = step(state, {"x": jnp.array([1.0, -1.0])}, 0)
    >>> float(metrics["loss"]), float(state.params["w"])  # slope 2, so 2 - 0.5 * 2
    (2.0, 1.0)

    Metrics: loss, loss/TERM, grad_norm (before the clip, live leaves only), rate/LABEL, finite, and
    examples (real rows).

    Args:
        apply: `(params, stats, batch, *, key, live) -> (out, stats)`.
        terms: {name: `Context -> (sum, weight)`}. A weight may depend on the batch alone; it is
            a constant to the gradient.
        tx: transform over the whole tree, at unit rate; held leaves come to it with zero gradients,
            and what it would do to them is dropped.
        labels: tree of labels of the parameters.
        rates: {live label: rate}; a schedule is called with the steps since `start`. Labels that
            are absent are held.
        clip: greatest norm of the gradient over all live leaves; None for no clip.
        accumulate: number of microbatches that the batch is taken in. Microbatch m has the rows m,
            m + accumulate, ..., so that a sharded batch stays where it is.
        ema: decay of the moving average in `state.ema` (`train.average`); None leaves it alone.
        axis_name: axis of a `pmap` or `shard_map` around the step; None for one program.

    Raises:
        ValueError: no terms, no rates, a rate for a label that no leaf bears, a bad `clip`,
            `accumulate` or `ema`; when traced: rows that do not divide, statistics of another
            structure.
    """
    _check(terms, labels, rates, clip, accumulate, ema)
    live = frozenset(rates)
    chosen = masks.mask(labels, live)
    live_labels, _ = masks.split(labels, chosen)
    sums = make_sums(apply, terms, live)

    def total(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    def gradients(
        state: TrainState, rows: Batch, stats: Any, key: jax.Array, weights: Any
    ) -> tuple[Any, Any, Any]:
        moving, held = masks.split(state.params, chosen)

        def objective(moving: Any) -> Any:
            found, moved = sums(masks.merge(moving, held), stats, rows, state, key)
            divisors = total(_weights(found)) if weights is None else weights
            values = {name: found[name][0] / _divisor(divisors[name]) for name in found}
            return sum(values.values()), (values, moved)

        (_, (values, moved)), grads = jax.value_and_grad(objective, has_aux=True)(moving)
        return values, grads, moved

    def accumulated(state: TrainState, batch: Batch, key: jax.Array) -> tuple[Any, Any, Any]:
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
            values, grads, stats = gradients(
                state, part[1], stats, jax.random.fold_in(key, part[0]), weights
            )
            return (stats, jax.tree.map(lambda a, b: a + b, so_far, grads)), values

        moving, _ = masks.split(state.params, chosen)
        zeros = jax.tree.map(
            lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), moving
        )
        (stats, grads), values = jax.lax.scan(add, (state.stats, zeros), parts)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, moving)
        return jax.tree.map(lambda v: jnp.sum(v, axis=0), values), grads, stats

    def step(state: TrainState, batch: Batch, start: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        if accumulate == 1:
            values, grads, stats = gradients(state, batch, state.stats, key, None)
        else:
            values, grads, stats = accumulated(state, batch, key)
        values, grads = total(values), total(grads)
        loss, norm = sum(values.values()), trees.norm(grads)
        if clip is not None:
            factor = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-16))
            grads = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
        moving, held = masks.split(state.params, chosen)
        filled = masks.merge(grads, jax.tree.map(jnp.zeros_like, held))
        updates, opt_state = tx.update(filled, state.opt_state, state.params)
        now = {label: _rate(rate, state.step - start) for label, rate in rates.items()}
        moved = jax.tree.map(
            lambda p, u, label: (p + now[label] * u).astype(p.dtype),
            moving,
            masks.split(updates, chosen)[0],
            live_labels,
        )
        mean = _averaged(state, moved, moving, stats, ema, state.step - start)
        # Not the new leaves: to look at them before they are chosen is one more pass over them.
        finite = state.finite & jnp.isfinite(loss) & jnp.isfinite(norm) & trees.all_finite(now)
        finite &= _still_finite(stats, state.stats)
        old = (moving, state.stats, state.opt_state, state.ema)
        kept = _choose(finite, (moved, stats, opt_state, mean), old)
        metrics = {
            "loss": loss,
            **{f"loss/{name}": value for name, value in values.items()},
            "grad_norm": norm,
            **{f"rate/{label}": rate for label, rate in now.items()},
            "finite": finite,
            "examples": total(_examples(batch)),
        }
        state = state._replace(
            step=state.step + finite.astype(state.step.dtype),
            params=masks.merge(kept[0], held),
            stats=kept[1],
            opt_state=kept[2],
            finite=finite,
            ema=kept[3],
        )
        return state, metrics

    return step


def make_sums(
    apply: Apply, terms: Mapping[str, Term], live: frozenset[str]
) -> Callable[[Any, Any, Batch, TrainState, jax.Array], tuple[Sums, Any]]:
    """Return `sums(params, stats, batch, state, key) -> ({term: (sum, weight)}, stats)`.

    Sums and weights are float32 scalars; `state` gives refs and step alone.

    Raises:
        ValueError: when traced: a term gives no pair of scalars, or `apply` returns statistics of
            another structure.
    """

    def sums(
        params: Any, stats: Any, batch: Batch, state: TrainState, key: jax.Array
    ) -> tuple[Sums, Any]:
        apply_key, *keys = jax.random.split(key, 1 + len(terms))
        out, moved = apply(params, stats, batch, key=apply_key, live=live)
        trees.check_structure(stats, moved, "the statistics that apply returned")
        found = {
            name: _pair(name, term(Context(params, out, batch, state.refs, state.step, own)))
            for (name, term), own in zip(terms.items(), keys, strict=True)
        }
        return found, moved

    return sums


def _check(
    terms: Mapping[str, Term],
    labels: PyTree[str],
    rates: Mapping[str, Rate],
    clip: float | None,
    accumulate: int,
    ema: float | None,
) -> None:
    if not terms or not rates:
        raise ValueError(
            f"a step needs a term and a live label; terms are {sorted(terms)}, rates are for "
            f"{sorted(rates)}; give at least one of each"
        )
    known = set(jax.tree.leaves(labels))
    unknown = sorted(set(rates) - known)
    if unknown:
        raise ValueError(
            f"rates name {unknown}, which no leaf bears; the tree has {sorted(known)}; "
            "take labels of the tree"
        )
    if accumulate < 1 or (clip is not None and not clip > 0):
        raise ValueError(
            f"accumulate is {accumulate} and clip {clip}; accumulate counts microbatches from 1 "
            "up, and clip is a norm above 0 or None"
        )
    if ema is not None and not 0.0 <= ema < 1.0:
        raise ValueError(
            f"ema is {ema}; it is the decay of an average: give one in [0, 1), or None"
        )


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


def _rate(rate: Rate, since: Any) -> jax.Array:
    return jnp.asarray(rate(since) if callable(rate) else rate, jnp.float32)


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


def _examples(batch: Batch) -> jax.Array:
    if "mask" in batch:
        return jnp.sum(jnp.asarray(batch["mask"]), dtype=jnp.float32)
    return jnp.float32(jnp.shape(next(iter(batch.values())))[0])


def _averaged(
    state: TrainState, moved: Any, moving: Any, stats: Any, ema: float | None, since: Any
) -> Any:
    if ema is None:
        return state.ema
    if not state.ema:
        raise ValueError(
            f"ema is {ema} and the state keeps no average; create it with `averaged=` the mask of "
            "what moves, or give ema=None"
        )
    new, old = {"params": moved, "stats": stats}, {"params": moving, "stats": state.stats}
    return average.moved(state.ema, new, old, ema, since)


def _still_finite(new: Any, old: Any) -> jax.Array:
    """Return whether nothing became NaN or infinite; a running maximum may start at -inf."""
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    numbers = [(a, b) for a, b in pairs if jnp.issubdtype(a.dtype, jnp.inexact)]
    return trees.all_finite([jnp.where(jnp.isfinite(b), a, 0) for a, b in numbers])


def _choose(finite: jax.Array, new: Any, old: Any) -> Any:
    """Return new or old; what was passed through unchanged costs no copy."""
    return jax.tree.map(lambda a, b: b if a is b else jnp.where(finite, a, b), new, old)
