"""The verdict of a run: majority class, linear probe and fine-tuned model on the same splits."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jtl.losses import bootstrap, metrics
from jtl.recipes.probe import Probe, fit_probe
from jtl.recipes.tasks import Task


class Scored(NamedTuple):
    """What one way of solving the task gives on both splits: logits, and seconds to make it."""

    validation: Any
    test: Any
    seconds: float


def score(task: Task, scored: Scored, labels: Mapping[str, Any]) -> dict[str, Any]:
    """Return {validation, test, test_interval, seconds} of the task's metric."""
    low, high = task.interval(scored.test, labels["test"])
    return {
        "validation": task.score(scored.validation, labels["validation"])[task.metric],
        "test": task.score(scored.test, labels["test"])[task.metric],
        "test_interval": [low, high],
        "seconds": scored.seconds,
    }


def guess(task: Task, labels: Mapping[str, Any]) -> dict[str, Any]:
    """Return the score of the answer that reads no input: the majority class, or the mean."""
    logits = {part: task.guess(labels["train"], len(labels[part])) for part in labels}
    return score(task, Scored(logits["validation"], logits["test"], 0.0), labels)


def probe(task: Task, features: Mapping[str, Any], labels: Mapping[str, Any]) -> Probe:
    """Return the linear probe on frozen features, its strength chosen on the validation split."""
    return fit_probe(
        features["train"],
        labels["train"],
        outputs=len(task.classes),
        choose=lambda logits: task.score(logits, labels["validation"])[task.metric],
        validation=features["validation"],
    )


def gain(task: Task, tuned: Any, probed: Any, labels: Any) -> dict[str, Any] | None:
    """Return the paired gain of the fine-tuned model over the probe on the test split.

    None for a task whose metric is no mean over examples.
    """
    if task.metric != "accuracy":
        return None
    hits = [(logits.argmax(-1) == labels).astype(np.float32) for logits in (tuned, probed)]
    low, high = bootstrap.paired_bootstrap(hits[0], hits[1])
    value = float(hits[0].mean() - hits[1].mean())
    return {"over": "linear_probe", "value": value, "interval": [low, high]}


def pictures(task: Task, logits: Any, labels: Any) -> dict[str, Any]:
    """Return what the report draws of a classification: confusion matrix and calibration sums."""
    if not task.classes:
        return {}
    scores, truth = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    table = metrics.confusion(scores, truth, len(task.classes))
    sums = metrics.calibration_sums(scores, truth)
    confidence, correct, count = (np.asarray(part).tolist() for part in sums)
    return {
        "confusion": {"classes": list(task.classes), "counts": np.asarray(table).tolist()},
        "calibration": {"confidence": confidence, "correct": correct, "count": count},
    }
