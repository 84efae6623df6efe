"""What training starts from: a pretrained backbone, a model, or a trained run; the head on it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jtl.models.backbone import Backbone
from jtl.models.model import Model, add_head, attach
from jtl.recipes import identity
from jtl.recipes.job import Settings
from jtl.recipes.predict import Predictor
from jtl.recipes.tasks import Task


def opened(
    backbone: Backbone | Model | Predictor,
) -> tuple[Backbone | Model, dict[str, tuple[str, ...]]]:
    """Return what training starts from, and the class names of the heads that it brings."""
    if isinstance(backbone, Predictor):
        return backbone.model, backbone.classes
    return backbone, {}


def origin(start: Backbone | Model) -> dict[str, str]:
    """Return the name of the checkpoint, and a checksum of the weights."""
    source = start.backbone.source if isinstance(start, Model) else start.source
    return {"source": source, "weights": identity.weights(start.params)}


def attached(
    backbone: Backbone | Model,
    head: str,
    task: Task,
    seed: int,
    *,
    classes: Mapping[str, tuple[str, ...]],
) -> Model:
    """Return the model with the task's head: a new one, or that of a model which has it.

    Args:
        backbone: what training starts from.
        head: its name.
        task: gives a new one.
        seed: of its weights.
        classes: {head of the model: names of its classes}, where they are known.

    Raises:
        ValueError: the model's head of this name is of another task.
    """
    key = jax.random.key(seed)
    if isinstance(backbone, Backbone):
        return attach(backbone, {head: task.head}, key=key)
    if head not in backbone.heads:
        return add_head(backbone, head, task.head, key=key)
    there = np.shape(backbone.params["heads"][head]["classifier"]["bias"])
    if there != (task.head.outputs,):
        raise ValueError(
            f"the model's head {head!r} has {there[0]} outputs and the task {task.head.outputs}; "
            "give the task a head of another name by head="
        )
    if tuple(classes.get(head, task.classes)) != tuple(task.classes):
        raise ValueError(
            f"the model's head {head!r} answers {list(classes[head])} and the task has the classes "
            f"{list(task.classes)}; give the task a head of another name by head=, or data with "
            "the same classes in this order (classes=)"
        )
    return backbone


def described(
    recipe: str,
    start: Backbone | Model,
    data: Mapping[str, Any],
    settings: Settings,
    options: Mapping[str, Any],
    *,
    calls: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a run is of, as plain data: `config.json` where there is no config file.

    Args:
        recipe: its name.
        start: what training starts from.
        data: {part: source}.
        settings: how it is trained.
        options: plain values; they stand before the settings of their names.
        calls: functions with options bound, or sequences of them.
    """
    return {
        "recipe": recipe,
        "backbone": origin(start),
        "data": identity.sources(data),
        **settings._asdict(),
        **options,
        **{name: _called(call) for name, call in calls.items()},
    }


def _called(call: Any) -> Any:
    many = isinstance(call, Sequence)
    return [identity.called(one) for one in call] if many else identity.called(call)
