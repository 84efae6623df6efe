"""Diagonal of the Fisher information from per-example gradients.

The square of a batch's mean gradient, which is often taken instead, is smaller by about the batch
size and mixes up the order of the leaves; so gradients here are those of single examples.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jtl import masks
from jtl.near import listed

LogProb = Callable[[Any, Any, Any], jax.Array]
_Score = Callable[[Any, Any], jax.Array]
_MODES = ("sampled", "data", "exact")


def fisher_diagonal(
    log_prob: LogProb,
    params: PyTree,
    batches: Iterable[tuple[Any, Any]],
    *,
    labels: Literal["sampled", "data", "exact"] = "sampled",
    classes: int | None = None,
    key: jax.Array | None = None,
    mask: PyTree | None = None,
    chunk: int | None = None,
) -> PyTree:
    """Return the mean over examples of (d log p(y | x) / d params)^2, in float32.

    The result does not depend on how the examples are cut into batches: a sampled label depends on
    the key and the example's number alone.

    >>> def log_prob(w, x, y):  # logistic regression: the gradient is (y - sigmoid(w x)) x
    ...     return jax.nn.log_sigmoid(jnp.where(y == 1, 1.0, -1.0) * w * x)
    >>> batches = [(jnp.array([1.0, 2.0]), jnp.array([1, 0])), (jnp.array([4.0]), jnp.array([1]))]
    >>> float(fisher_diagonal(log_prob, jnp.float32(0.0), batches, labels="exact", classes=2))
    1.75

    At w = 0 the squared gradient is x^2 / 4 for both labels, so the value is (1 + 4 + 16) / 12.

    Args:
        log_prob: `(params, example, label) -> scalar` for one example, in evaluation mode.
        params: where the information is taken.
        batches: `(examples, labels)`, each with a leading axis of rows that are all real (no
            padding); labels may be None unless they are taken from the data.
        labels: "sampled" draws one label for each example from the model (the Fisher information,
            unbiased); "exact" takes the expectation over all classes, at `classes` backward passes;
            "data" takes the given labels (the empirical Fisher, which vanishes where they fit).
        classes: number of labels, 0..classes-1; for "sampled" and "exact".
        key: for "sampled".
        mask: True = included; other leaves are not differentiated and are None in the result.
        chunk: examples whose gradients are in memory at once, each as large as the included leaves;
            None takes a whole batch.

    Raises:
        ValueError: an option is missing or unknown; there are no examples; rows do not agree in
            number; an included leaf is no float; a value is not finite.

    Reference: Kirkpatrick et al. 2017, arXiv:1612.00796; Kunstner, Balles and Hennig 2019,
        arXiv:1905.12558 (true against empirical).
    """
    _check_options(labels, classes, key, chunk)
    chosen = jax.tree.map(lambda _: True, params) if mask is None else mask
    live, held = masks.split(params, chosen)
    _check_floats(live)
    step = jax.jit(_make_step(log_prob, labels, classes, chunk))
    total = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.float32), live)
    seen = 0
    for examples, targets, rows in _rows(batches, labels):
        total = step(total, live, held, examples, targets, key, seen)
        seen += rows
    if not seen:
        raise ValueError("batches gave no examples; give at least one, and no spent iterator")
    mean = jax.tree.map(lambda leaf: leaf / seen, total)
    _check_finite(mean)
    return mean


def _make_step(
    log_prob: LogProb, mode: str, classes: int | None, chunk: int | None
) -> Callable[..., Any]:
    """Return `step` that adds the squared gradients of a batch to a total, chunk by chunk."""

    def step(
        total: Any, live: Any, held: Any, examples: Any, targets: Any, key: Any, seen: Any
    ) -> Any:
        rows = jax.tree.leaves(examples)[0].shape[0]
        width = rows if chunk is None else min(chunk, rows)

        def squares(row: Any) -> Any:
            example, target = jax.tree.map(lambda leaf: leaf[row], (examples, targets))

            def score(live: Any, label: Any) -> Any:
                value = log_prob(masks.merge(live, held), example, label)
                _check_scalar(value)
                return value.astype(jnp.float32)

            own_key = None if key is None else jax.random.fold_in(key, seen + row)
            return _squares(score, live, mode, target, classes, own_key)

        def add(total: Any, numbers: Any) -> tuple[Any, None]:
            found = jax.vmap(squares)(jnp.minimum(numbers, rows - 1))
            real = (numbers < rows).astype(jnp.float32)
            return jax.tree.map(lambda t, s: t + jnp.tensordot(real, s, 1), total, found), None

        numbers = jnp.arange(-(-rows // width) * width).reshape(-1, width)
        return jax.lax.scan(add, total, numbers)[0]

    return step


def _squares(
    score: _Score, live: Any, mode: str, target: Any, classes: int | None, key: Any
) -> Any:
    """Return the squared gradient of one example in float32, for its label or over all labels."""
    if mode == "data":
        return _squared(jax.grad(score)(live, target))
    every = jnp.arange(classes)
    scores, pull = jax.vjp(lambda p: jax.vmap(lambda label: score(p, label))(every), live)
    if mode == "sampled":
        label = jax.random.categorical(key, scores)
        return _squared(pull(jax.nn.one_hot(label, len(every)))[0])

    def add(total: Any, row: Any) -> tuple[Any, None]:
        cotangent, probability = row
        found = _squared(pull(cotangent)[0])
        return jax.tree.map(lambda t, s: t + probability * s, total, found), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.float32), live)
    rows = jnp.eye(len(every)), jax.nn.softmax(scores)
    return jax.lax.scan(add, zeros, rows)[0]


def _squared(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) ** 2, tree)


def _rows(batches: Iterable[tuple[Any, Any]], mode: str) -> Iterator[tuple[Any, Any, int]]:
    for number, (examples, targets) in enumerate(batches):
        if mode == "data" and targets is None:
            raise ValueError(
                f"labels='data' needs the labels of every batch, and batch {number} has None; "
                "give them, or take labels='sampled'"
            )
        targets = targets if mode == "data" else None
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves((examples, targets))]
        if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
            raise ValueError(
                f"batch {number} has arrays of the shapes {shapes}; "
                "all need one leading axis of the same number of rows"
            )
        if shapes[0][0]:
            yield *jax.tree.map(jnp.asarray, (examples, targets)), shapes[0][0]


def _check_options(mode: str, classes: int | None, key: Any, chunk: int | None) -> None:
    if mode not in _MODES:
        raise ValueError(f"labels={mode!r} is not known; take one of {_MODES}")
    if mode != "data" and (classes is None or classes < 1):
        raise ValueError(
            f"labels={mode!r} goes over all labels, and classes={classes} is given; "
            "give classes=, or take labels='data'"
        )
    if mode == "sampled" and key is None:
        raise ValueError(
            "labels='sampled' draws labels, and key=None is given; give key=jax.random.key(0), or "
            "take labels='exact'"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(
            f"chunk={chunk} examples at once; take 1 or more, or None for a whole batch"
        )


def _check_floats(live: Any) -> None:
    kinds = [jnp.result_type(leaf) for leaf in jax.tree.leaves(live)]
    pairs = zip(masks.names(live), kinds, strict=True)
    wrong = [f"{name}: {kind}" for name, kind in pairs if not jnp.issubdtype(kind, jnp.floating)]
    if wrong or not kinds:
        raise ValueError(
            f"gradients need float leaves; of {len(kinds)} included leaves these are none: "
            f"{listed(wrong)}; choose float leaves with mask="
        )


def _check_scalar(value: Any) -> None:
    if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"log_prob gives {jnp.result_type(value)}{list(jnp.shape(value))} for one example; it "
            "must give a float scalar: index the log-probabilities with the label"
        )


def _check_finite(mean: Any) -> None:
    leaves = zip(masks.names(mean), jax.tree.leaves(mean), strict=True)
    wrong = [name for name, leaf in leaves if not bool(jnp.all(jnp.isfinite(leaf)))]
    if wrong:
        raise ValueError(
            f"the Fisher information is not finite in {listed(wrong)}; "
            "look for NaN in params or examples, and for log 0 in log_prob"
        )
