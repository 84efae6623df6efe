"""What a task is made of: head, loss, metrics and the baseline that needs no features."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jtl.losses import bootstrap, metrics
from jtl.losses import classification as class_loss
from jtl.losses import regression as square_loss
from jtl.models.heads import Linear
from jtl.train.state import Context, Term


class Task(NamedTuple):
    """One task of a model.

    Attributes:
        kind: "classification" or "regression".
        head: the head module.
        term: `head name -> Term`, the task's loss.
        metric: name of the figure that plans go by; higher is better.
        score: `(logits, labels) -> {name: float}`, all figures.
        interval: `(logits, labels) -> (low, high)`, 95 % bootstrap interval of the metric.
        baseline: name of the answer without features, "majority" or "mean".
        guess: `(train labels, n) -> logits`, that answer for n examples.
        classes: names of the classes, () for a regression.
    """

    kind: str
    head: Any
    term: Callable[[str], Term]
    metric: str
    score: Callable[[Any, Any], dict[str, float]]
    interval: Callable[[Any, Any], tuple[float, float]]
    baseline: str
    guess: Callable[[Any, int], Any]
    classes: tuple[str, ...]


def classification(
    source: Any,
    *,
    metric: str = "accuracy",
    smoothing: float = 0.0,
    class_weights: str | None = None,
    dropout: float = 0.1,
    pooling: str | None = None,
    start: str = "normal",
) -> Task:
    """Return the task of telling classes apart, for the training data of `source`.

    Args:
        source: training data with `classes` and integer labels.
        metric: "accuracy" or "macro_f1".
        smoothing: label smoothing, 0 to 1.
        class_weights: "balanced" weighs class c by n / (classes * n_c); None weighs all alike.
        dropout: rate before the head's layer.
        pooling: see `heads.pool`.
        start: see `heads.Linear`.

    Raises:
        ValueError: an unknown metric or weighting, no classes, or a class without an example.
    """
    if metric not in ("accuracy", "macro_f1"):
        raise ValueError(f"metric {metric!r} is not known; there are 'accuracy' and 'macro_f1'")
    if class_weights not in (None, "balanced"):
        raise ValueError(f"class_weights {class_weights!r} is not known; give 'balanced' or None")
    counts = _counts(source)
    weights = None if class_weights is None else jnp.asarray(metrics.class_weights(counts))

    def term(name: str) -> Term:
        def loss(c: Context) -> Any:
            return class_loss.cross_entropy(
                c.out[name],
                c.batch["label"],
                smoothing=smoothing,
                class_weights=weights,
                mask=c.batch["mask"],
            )

        return loss

    classes = tuple(source.classes)
    score = _classification_scores(len(classes))
    head = Linear(len(classes), dropout=dropout, pooling=pooling, start=start)

    def interval(logits: Any, labels: Any) -> tuple[float, float]:
        if metric == "accuracy":
            return bootstrap.bootstrap_interval((logits.argmax(-1) == labels).astype(np.float32))
        return _resampled(lambda rows: score(logits[rows], labels[rows])[metric], len(labels))

    def majority(train: Any, rows: int) -> np.ndarray:
        most = np.bincount(np.asarray(train), minlength=len(classes)).argmax()
        return np.tile(np.eye(len(classes), dtype=np.float32)[most], (rows, 1))

    return Task(
        "classification", head, term, metric, score, interval, "majority", majority, classes
    )


def regression(
    source: Any, *, dropout: float = 0.0, pooling: str | None = None, start: str = "normal"
) -> Task:
    """Return the task of predicting a number; its metric is R², 1 - squared error / variance.

    Args:
        source: training data with numbers for labels.
        dropout: rate before the head's layer.
        pooling: see `heads.pool`.
        start: see `heads.Linear`.

    Raises:
        ValueError: the labels are classes, or all the same.
    """
    labels = np.asarray(source.columns["label"])
    if source.classes or not np.var(labels) > 0:
        there = f"classes {source.classes}" if source.classes else f"the one label {labels[:1]}"
        raise ValueError(
            f"{source.name} has {there}; a regression needs numbers that differ; take the task "
            "'classification', or give classes=() where integers are numbers"
        )

    def term(name: str) -> Term:
        def loss(c: Context) -> Any:
            return square_loss.squared_error(
                c.out[name][:, 0], c.batch["label"], mask=c.batch["mask"]
            )

        return loss

    def score(logits: Any, labels: Any) -> dict[str, float]:
        error = np.mean((_flat(logits) - labels) ** 2)
        return {"r2": float(1 - error / np.var(labels)), "rmse": float(np.sqrt(error))}

    def interval(logits: Any, labels: Any) -> tuple[float, float]:
        return _resampled(lambda rows: score(logits[rows], labels[rows])["r2"], len(labels))

    def mean(train: Any, rows: int) -> np.ndarray:
        return np.full((rows, 1), np.mean(train), np.float32)

    head = Linear(1, dropout=dropout, pooling=pooling, start=start)
    return Task("regression", head, term, "r2", score, interval, "mean", mean, ())


def _flat(logits: Any) -> Any:
    return logits[:, 0] if np.ndim(logits) == 2 else logits


def _counts(source: Any) -> np.ndarray:
    if not source.classes:
        raise ValueError(
            f"{source.name} has no classes; give integer or string labels, or the task 'regression'"
        )
    labels = np.asarray(source.columns["label"])
    counts = np.bincount(labels, minlength=len(source.classes))
    if counts.min() == 0:
        absent = [source.classes[i] for i in np.flatnonzero(counts == 0)]
        raise ValueError(
            f"the training data of {source.name} has no example of {absent}; it has "
            f"{dict(zip(source.classes, counts.tolist(), strict=True))}; "
            "take another seed or more rows"
        )
    return counts


def _classification_scores(classes: int) -> Callable[[Any, Any], dict[str, float]]:
    def score(logits: Any, labels: Any) -> dict[str, float]:
        logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
        total, weight = class_loss.cross_entropy(logits, labels)
        correct, count = metrics.accuracy_sums(logits, labels)
        table = metrics.confusion(logits, labels, classes)
        error = metrics.calibration_error(metrics.calibration_sums(logits, labels))
        figures = {
            "accuracy": correct / count,
            "macro_f1": metrics.macro_f1(table),
            "calibration_error": error,
            "loss": total / weight,
        }
        return {name: round(float(value), 6) for name, value in figures.items()}

    return score


def _resampled(
    figure: Callable[[np.ndarray], float], rows: int, *, samples: int = 500
) -> tuple[float, float]:
    """Return the percentile interval, 95 %, of a figure over examples drawn with replacement."""
    rng = np.random.default_rng(0)
    drawn = [figure(rng.integers(0, rows, rows)) for _ in range(samples)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
