"""Pretrained heads of a checkpoint, to be attached to its backbone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jtl.models.backbone import Backbone
from jtl.models.model import Model, attach, attach_weights, outline
from jtl.models.stated import opened
from jtl.weights.checkpoint import Checkpoint
from jtl.weights.load import fill
from jtl.weights.report import check


class ReadHead(NamedTuple):
    """A head of a checkpoint: its module, its parameters, its running statistics ({} for none)."""

    module: Any
    params: dict[str, Any]
    stats: dict[str, Any]


def load_head(
    name: str | Path | Checkpoint, backbone: Backbone, kind: str
) -> tuple[Any, dict[str, Any]]:
    """Return a pretrained head as `(module, params)`, to be attached to its backbone.

    Args:
        name: the checkpoint, as for `load_backbone`.
        backbone: what the head stands on.
        kind: a key of the family's `heads`, such as "masked_lm" or "classification".

    Raises:
        ValueError: the checkpoint has no such head, it reads another pooling, or it has running
            statistics beside its parameters.
    """
    found = read_head(name, backbone, kind)
    if found.stats:
        raise ValueError(
            f"the {kind} head of {str(name)!r} has running statistics of BatchNorm beside its "
            "parameters, and a pair has no place for them; take with_heads(name, backbone, "
            f"{{label: {kind!r}}}), which gives a model with both"
        )
    return found.module, found.params


def with_heads(
    name: str | Path | Checkpoint, backbone: Backbone, kinds: Mapping[str, str]
) -> Model:
    """Return a backbone with pretrained heads of its checkpoint, ready to run.

    Args:
        name: the checkpoint, as for `load_backbone`.
        backbone: what the heads stand on.
        kinds: {name and label of the head: a key of the family's `heads`}.

    Raises:
        ValueError: the checkpoint has no such head, or it reads another pooling.
    """
    found = {label: read_head(name, backbone, kind) for label, kind in kinds.items()}
    modules = {label: head.module for label, head in found.items()}
    params = {label: head.params for label, head in found.items()}
    stats = {label: head.stats for label, head in found.items() if head.stats}
    return attach_weights(backbone, modules, params, stats)


def read_head(name: str | Path | Checkpoint, backbone: Backbone, kind: str) -> ReadHead:
    """Return a pretrained head with its running statistics.

    Args:
        name: the checkpoint, as for `load_backbone`.
        backbone: what the head stands on.
        kind: a key of the family's `heads`.

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
    checkpoint, _, config = opened(name, family=row.model_type, otherwise=backbone.config)
    module = head.make(config, backbone)
    params, stats = outline(backbone, {"head": module})
    template = {"params": params["head"], "stats": stats.get("head", {})}
    if not template["params"]:  # nothing of its own: a tied one without bias
        return ReadHead(module, {}, {})
    trees, report = fill(template, checkpoint, rules=head.rules, aliases=row.aliases)
    shown = checkpoint.folder if isinstance(name, Checkpoint) else name
    source = f"the {kind} head of the checkpoint {str(shown)!r}"
    check(report, allow_fresh=head.optional, allow_unexpected=(".*",), source=source)
    if report.fresh:
        fresh = attach(backbone, {"head": module}, key=jax.random.key(0)).params["heads"]["head"]
        trees["params"] = jax.tree.map(_filled, trees["params"], fresh)
    return ReadHead(module, trees["params"], trees["stats"])


def _filled(found: Any, fresh: Any) -> Any:
    return fresh if isinstance(found, jax.ShapeDtypeStruct) else found
