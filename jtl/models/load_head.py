"""Pretrained heads of a checkpoint, to be attached to its backbone."""

from pathlib import Path
from typing import Any

import jax

from jtl.models.backbone import Backbone
from jtl.models.load import opened
from jtl.models.model import attach
from jtl.weights.load import fill
from jtl.weights.report import check


def load_head(name: str | Path, backbone: Backbone, kind: str) -> tuple[Any, dict[str, Any]]:
    """Return a pretrained head as `(module, params)`, to be attached to its backbone.

    Args:
        name: the checkpoint, as for `load_backbone`.
        backbone: what the head stands on.
        kind: a key of the family's `heads`, such as "masked_lm" or "classification".

    Raises:
        ValueError: the checkpoint has no such head, or it reads another pooling.
    """
    row = backbone.family
    if kind not in row.heads:
        raise ValueError(
            f"{row.model_type} has no pretrained head {kind!r}; it has {sorted(row.heads)}; "
            "name one of them, or attach a fresh head"
        )
    head = row.heads[kind]
    if head.pooling not in (None, backbone.pooling):
        raise ValueError(
            f"{head.class_name} reads pooling {head.pooling!r}; the backbone has "
            f"{backbone.pooling!r}; load it with pooling={head.pooling!r}"
        )
    checkpoint, _, config = opened(name, family=row.model_type)
    module = head.make(config, backbone)
    template = attach(backbone, {"head": module}, key=jax.random.key(0)).params["heads"]
    if "head" not in template:  # nothing of its own: a tied one without bias
        return module, {}
    trees, report = fill(
        {"params": template["head"]}, checkpoint, rules=head.rules, aliases=row.aliases
    )
    source = f"the {kind} head of the checkpoint {str(name)!r}"
    check(report, allow_fresh=head.optional, allow_unexpected=(".*",), source=source)
    return module, trees["params"]
