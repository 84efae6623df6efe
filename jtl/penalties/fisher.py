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

from jtl import per_example

LogProb = Callable[[Any, Any, Any], jax.Array]
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
        chunk: examples that are taken at once; None chooses, see `per_example.gradient_moment`.

    Raises:
        ValueError: an option is missing or unknown; there are no examples; rows do not agree in
            number; an included leaf is no float; a value is not finite.

    Reference: Kirkpatrick et al. 2017, arXiv:1612.00796; Kunstner, Balles and Hennig 2019,
        arXiv:1905.12558 (true against empirical).
    """
    _check_options(labels, classes, key)
    score = per_example.once(_make_score, log_prob, labels, classes)
    rows = _rows(batches, labels, key)
    return per_example.gradient_moment(score, params, rows, mask=mask, chunk=chunk)


def _make_score(log_prob: LogProb, mode: str, classes: int | None) -> per_example.Score:
    """Return the log-probabilities that are differentiated for one example, and their weights."""

    def log_prob_of(params: Any, example: Any, label: Any) -> jax.Array:
        value = log_prob(params, example, label)
        _check_scalar(value)
        return value.astype(jnp.float32)

    def score(params: Any, row: Any) -> tuple[jax.Array, jax.Array]:
        example, target, key = row
        if mode == "data":
            return log_prob_of(params, example, target)[None], jnp.ones(1)
        every = jax.vmap(lambda label: log_prob_of(params, example, label))(jnp.arange(classes))
        if mode == "exact":
            return every, jax.nn.softmax(every)
        return every[jax.random.categorical(key, every)][None], jnp.ones(1)

    return score


def _rows(batches: Iterable[tuple[Any, Any]], mode: str, key: Any) -> Iterator[Any]:
    """Yield (examples, labels, keys), with None for what the mode does not read."""
    seen = 0
    for number, (examples, targets) in enumerate(batches):
        if mode == "data" and targets is None:
            raise ValueError(
                f"labels='data' needs the labels of every batch, and batch {number} has None; "
                "give them, or take labels='sampled'"
            )
        rows = np.shape(jax.tree.leaves(examples)[0])[:1]
        keys = _keys(key, seen + np.arange(*rows)) if mode == "sampled" and rows else None
        seen += sum(rows)
        yield examples, targets if mode == "data" else None, keys


@jax.jit
def _keys(key: Any, numbers: Any) -> Any:
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)


def _check_options(mode: str, classes: int | None, key: Any) -> None:
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


def _check_scalar(value: Any) -> None:
    if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"log_prob gives {jnp.result_type(value)}{list(jnp.shape(value))} for one example; it "
            "must give a float scalar: index the log-probabilities with the label"
        )
