"""One training step: differentiate the live leaves alone, and leave everything else as it is."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jtl import masks, trees
from jtl.train import average, watched
from jtl.train.gradients import make_gradients
from jtl.train.state import Apply, Batch, Metrics, Step, Term, TrainState

Rate = float | Callable[[Any], Any]
Project = tuple[Sequence[str], Callable[[Any, Any], Any]]


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
    watch: optax.GradientTransformation | None = None,
    ever_live: Collection[str] | None = None,
    project: Project | None = None,
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
        watch: transform that sees what was done and changes nothing:
            `watch.update(applied, state.watch, params, task_grads=grads)`, trees with None where a
            leaf never moves. `applied` is new minus old parameters in float32; `task_grads` is the
            gradient, before projection and clip, through `apply` alone: that of the task and of
            penalties on outputs, without what penalties on weights have through `Context.params`.
        ever_live: labels that move in some phase of the run, which `watch` covers; it sees zeros
            for those held now. None is the live ones.
        project: (names of reference terms, `(grads, reference_grads) -> grads`). What these terms
            give is in no part of `loss` and its gradient: the gradient of the others is projected
            against theirs, before the clip.
        axis_name: axis of a `pmap` or `shard_map` around the step; None for one program.

    Raises:
        ValueError: no terms, no rates, a rate for a label that no leaf bears, a bad `clip`,
            `accumulate`, `ema`, `ever_live` or `project`; when traced: rows that do not divide,
            statistics of another structure, a state without what `ema` or `watch` need.
    """
    _check(terms, labels, rates, clip, accumulate, ema)
    live = frozenset(rates)
    chosen = masks.mask(labels, live)
    live_labels, _ = masks.split(labels, chosen)
    groups = _groups(terms, project)
    gradients = make_gradients(
        *(apply, terms, labels, live),
        groups=groups,
        apart=watch is not None,
        accumulate=accumulate,
        axis_name=axis_name,
    )
    see = watched.make_watching(watch, labels, live, ever_live)

    def step(state: TrainState, batch: Batch, start: Any) -> tuple[TrainState, Metrics]:
        found = gradients(state, batch)
        grads = found.grads[0] if project is None else project[1](*found.grads)
        loss, norm = sum(found.values[name] for name in groups[0]), trees.norm(grads)
        moving, held = masks.split(state.params, chosen)
        filled = masks.merge(_clipped(grads, norm, clip), jax.tree.map(jnp.zeros_like, held))
        updates, opt_state = tx.update(filled, state.opt_state, state.params)
        now = {label: _rate(rate, state.step - start) for label, rate in rates.items()}
        moved = jax.tree.map(
            lambda p, u, label: (p + now[label] * u).astype(p.dtype),
            moving,
            masks.split(updates, chosen)[0],
            live_labels,
        )
        mean = _averaged(state, moved, moving, found.stats, ema, state.step - start)
        seen = see(state, moved, moving, found.task)
        # Not the new leaves: to look at them before they are chosen is one more pass over them.
        finite = state.finite & jnp.isfinite(loss) & jnp.isfinite(norm) & trees.all_finite(now)
        finite &= _still_finite(found.stats, state.stats)
        if project is not None:
            finite &= jnp.isfinite(trees.norm(found.grads[1]))
        old = (moving, state.stats, state.opt_state, state.ema, state.watch)
        kept = _choose(finite, (moved, found.stats, opt_state, mean, seen), old)
        examples = _examples(batch)
        metrics = {
            "loss": loss,
            **{f"loss/{name}": value for name, value in found.values.items()},
            "grad_norm": norm,
            **{f"rate/{label}": rate for label, rate in now.items()},
            "finite": finite,
            "examples": examples if axis_name is None else jax.lax.psum(examples, axis_name),
        }
        state = state._replace(
            step=state.step + finite.astype(state.step.dtype),
            params=masks.merge(kept[0], held),
            stats=kept[1],
            opt_state=kept[2],
            finite=finite,
            ema=kept[3],
            watch=kept[4],
        )
        return state, metrics

    return step


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


def _groups(terms: Mapping[str, Term], project: Project | None) -> tuple[tuple[str, ...], ...]:
    """Return the names of the terms that are summed, and of those that they are projected on."""
    if project is None:
        return (tuple(terms),)
    reference = tuple(project[0])
    summed = tuple(name for name in terms if name not in reference)
    if not summed or not reference or set(reference) - set(terms):
        raise ValueError(
            f"project names the reference terms {sorted(reference)}, and the terms are "
            f"{sorted(terms)}; name one or more of them, and leave one to be trained on"
        )
    return summed, reference


def _clipped(grads: Any, norm: jax.Array, clip: float | None) -> Any:
    if clip is None:
        return grads
    factor = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-16))
    return jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)


def _rate(rate: Rate, since: Any) -> jax.Array:
    return jnp.asarray(rate(since) if callable(rate) else rate, jnp.float32)


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
