"""Mean over examples of a power of per-example gradients, without forming most of them.

The gradient of one example with respect to a weight that is used once, in a product with a vector,
is the outer product a d^T of that vector and the gradient at the product's output. A power of its
absolute value is the outer product of the powers, so the sum over n examples is one product of
matrices, (|a|^p)^T |d|^p: it costs as much as the gradient of a batch. Gradients of all other
leaves (biases, norms, shared weights, products over positions, convolutions) are formed example by
example.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jtl import masks, products
from jtl.near import listed

Score = Callable[[Any, Any], tuple[jax.Array, jax.Array]]
_MEMORY = 2**28  # bytes of per-example gradients at once, where nobody says how many examples
_MADE: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def gradient_moment(
    score: Score,
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    power: int = 2,
    mask: PyTree | None = None,
    chunk: int | None = None,
) -> PyTree:
    """Return the mean over examples of sum_k w_k |d s_k / d params|^power, in float32.

    The result does not depend on how the examples are cut into batches. What is compiled is kept
    for as long as `score` lives.

    >>> def score(w, x):
    ...     return (w * x)[None], jnp.ones(1)
    >>> batches = [jnp.array([1.0, -2.0]), jnp.array([4.0])]
    >>> float(gradient_moment(score, jnp.float32(5.0), batches))  # (1 + 4 + 16) / 3
    7.0

    Args:
        score: `(params, example) -> (s, w)`, two vectors of one length: scalars to differentiate
            and the weight of each, which is not differentiated.
        params: where the gradients are taken.
        batches: trees of arrays with a leading axis of rows that are all real (no padding).
        power: 2 for squares, 1 for absolute values; any other will do.
        mask: True = included; other leaves are not differentiated and are None in the result.
        chunk: examples that are taken at once; None takes as many of a batch as have their
            gradients, those that must be formed, in 256 MiB.

    Raises:
        ValueError: chunk is below 1; there are no examples; rows do not agree in number; an
            included leaf is no float; a value is not finite.

    Reference: for layers of one vector an example, Goodfellow 2015, arXiv:1510.01799.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(
            f"chunk={chunk} examples at once; take 1 or more, or None to have it chosen"
        )
    chosen = jax.tree.map(lambda _: True, params) if mask is None else mask
    live, held = masks.split(params, chosen)
    _check_floats(live)
    step = once(_make_step, score, power, chunk)
    total = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.float32), live)
    seen = 0
    for batch, rows in _counted(batches):
        total = step(total, live, held, batch)
        seen += rows
    if not seen:
        raise ValueError("batches gave no examples; give at least one, and no spent iterator")
    mean = jax.tree.map(lambda leaf: leaf / seen, total)
    _check_finite(mean)
    return mean


def once(make: Callable[..., Any], function: Callable[..., Any], *options: Any) -> Any:
    """Return `make(function, *options)`, made once and kept for as long as `function` lives."""
    try:
        own = _MADE.setdefault(function, {})
    except TypeError:  # no hash, or no weak reference
        return make(function, *options)
    if (make, *options) not in own:
        # A strong reference to the key would keep it alive for good.
        own[make, *options] = make(weakref.proxy(function), *options)
    return own[make, *options]


def _make_step(score: Score, power: int, chunk: int | None) -> Callable[..., Any]:
    """Return the compiled `step` that adds a batch to a total, chunk by chunk."""

    def step(total: Any, live: Any, held: Any, batch: Any) -> Any:
        rows = jax.tree.leaves(batch)[0].shape[0]
        plan = _plan(score, live, held, jax.tree.map(lambda leaf: leaf[0], batch))
        width = min(rows, _width(plan, live) if chunk is None else chunk)

        def add(total: list[jax.Array], numbers: jax.Array) -> tuple[list[jax.Array], None]:
            taken = jnp.minimum(numbers, rows - 1)
            some = jax.tree.map(lambda leaf: leaf[taken], batch)
            found = _sums(plan, live, held, some, numbers < rows, power)
            return [t + f for t, f in zip(total, found, strict=True)], None

        numbers = jnp.arange(-(-rows // width) * width).reshape(-1, width)
        leaves, structure = jax.tree.flatten(total)
        return jax.tree.unflatten(structure, jax.lax.scan(add, leaves, numbers)[0])

    return jax.jit(step, donate_argnums=0)


def _plan(score: Score, live: Any, held: Any, example: Any) -> products.Plan:
    def one(live: Any, held: Any, example: Any) -> Any:
        values, weights = score(masks.merge(live, held), example)
        return values.astype(jnp.float32), weights.astype(jnp.float32)

    return products.make_plan(one, live, held, example)


def _sums(
    plan: products.Plan, live: Any, held: Any, batch: Any, real: jax.Array, power: int
) -> list[jax.Array]:
    """Return the sum over real rows of the powers, for each live leaf."""
    leaves = jax.tree.leaves(live)
    formed = {i: leaf for i, leaf in enumerate(leaves) if i not in plan.products}
    results = {i: plan.ops[p.at].eqn.outvars[0].aval for i, p in plan.products.items()}

    def of_row(example: Any) -> Any:
        def run(formed: Any, added: Any) -> Any:
            every = [formed.get(i, leaf) for i, leaf in enumerate(leaves)]
            (values, weights), operands = products.run(
                plan, [*every, *jax.tree.leaves((held, example))], added
            )
            return values, (weights, operands)

        zeros = {i: jnp.zeros(aval.shape, aval.dtype) for i, aval in results.items()}
        values, pull, (weights, operands) = jax.vjp(run, formed, zeros, has_aux=True)
        return *_weighted(pull, values, weights, power), operands

    powers, slopes, operands = jax.vmap(of_row)(batch)

    def only_real(x: jax.Array) -> jax.Array:
        return jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)

    return [
        jnp.sum(only_real(powers[i]), 0)
        if i in formed
        else products.outer(plan, i, leaf, _power(operands[i], power), only_real(slopes[i]))
        for i, leaf in enumerate(leaves)
    ]


def _weighted(pull: Any, values: jax.Array, weights: jax.Array, power: int) -> Any:
    """Return the weighted sum over the values of the powers of their gradients."""

    def of_one(cotangent: jax.Array, weight: jax.Array) -> Any:
        return jax.tree.map(lambda g: weight * _power(g, power), pull(cotangent))

    if len(values) == 1:
        return of_one(jnp.ones_like(values), weights[0])

    def add(total: Any, row: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_one(*row)), None

    rows = jnp.eye(len(values)), weights
    zeros = jax.tree.map(lambda g: jnp.zeros(g.shape), jax.eval_shape(pull, values))
    return jax.lax.scan(add, zeros, rows)[0]


def _power(x: jax.Array, power: int) -> jax.Array:
    wide = jnp.abs(x.astype(jnp.float32))
    return wide if power == 1 else wide**power


def _width(plan: products.Plan, live: Any) -> int:
    """Return how many examples have the gradients that must be formed in the memory for them."""
    leaves = enumerate(jax.tree.leaves(live))
    formed = sum(4 * leaf.size for i, leaf in leaves if i not in plan.products)
    return max(1, _MEMORY // max(1, formed))


def _counted(batches: Iterable[Any]) -> Iterator[tuple[Any, int]]:
    for number, batch in enumerate(batches):
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
        if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
            raise ValueError(
                f"batch {number} has arrays of the shapes {shapes}; "
                "all need one leading axis of the same number of rows"
            )
        if shapes[0][0]:
            yield jax.tree.map(jnp.asarray, batch), shapes[0][0]


def _check_floats(live: Any) -> None:
    kinds = [jnp.result_type(leaf) for leaf in jax.tree.leaves(live)]
    pairs = zip(masks.names(live), kinds, strict=True)
    wrong = [f"{name}: {kind}" for name, kind in pairs if not jnp.issubdtype(kind, jnp.floating)]
    if wrong or not kinds:
        raise ValueError(
            f"gradients need float leaves; of {len(kinds)} included leaves these are none: "
            f"{listed(wrong)}; choose float leaves with mask="
        )


def _check_finite(mean: Any) -> None:
    leaves = zip(masks.names(mean), jax.tree.leaves(mean), strict=True)
    wrong = [name for name, leaf in leaves if not bool(jnp.all(jnp.isfinite(leaf)))]
    if wrong:
        raise ValueError(
            f"the mean over examples is not finite in {listed(wrong)}; look for NaN in params or "
            "examples, and for log 0 in what is differentiated"
        )
