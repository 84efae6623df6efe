"""A backbone with named heads: one tree of parameters, one `apply`, labels by depth."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jtl import masks
from jtl.models import backbone as stages
from jtl.models import remat
from jtl.models.backbone import Backbone, Batch, Out, variables


@dataclasses.dataclass(frozen=True)
class Model:
    """A backbone and its heads.

    `params` is `{"backbone": ..., "heads": {name: ...}}`. `stats` has the same two branches, each
    only where there are running statistics, and under "heads" only the heads that have some; it is
    `{}` where nothing has any. The backbone's leaves bear the labels of their stages, a head's
    leaves the head's own name; statistics belong to the label of the module that they are of.
    `remat` and `hold_statistics` are set by `computing`.
    """

    backbone: Backbone
    heads: Mapping[str, Any]
    params: dict[str, Any]
    stats: dict[str, Any]
    remat: bool = False
    hold_statistics: bool = False

    @property
    def rules(self) -> tuple[tuple[str, str], ...]:
        """(regex, label) rules that cover every leaf of `params`."""
        body = tuple((f"backbone/(?:{regex})", label) for regex, label in self.backbone.groups)
        return (*body, *((f"heads/{re.escape(name)}/.*", name) for name in self.heads))

    @property
    def labels(self) -> Any:
        """Return the tree of labels of `params`."""
        optional = tuple(rule for rule, label in self.rules if label == stages.UNUSED)
        return masks.label(self.params, self.rules, optional=optional)

    @property
    def groups(self) -> tuple[str, ...]:
        """Labels of the backbone from stem to top, without "unused"."""
        return self.backbone.labels

    def apply(
        self,
        params: Any,
        stats: Any,
        batch: Batch,
        *,
        key: jax.Array | None = None,
        live: frozenset[str] = frozenset(),
    ) -> tuple[Out, Any]:
        """Run the model; stages and heads whose label is not in `live` run in evaluation mode.

        Args:
            params: tree like `self.params`.
            stats: tree like `self.stats`.
            batch: raw columns, or the column of a border (see `prefix`).
            key: for dropout; needed where `live` names anything that has dropout.
            live: labels in training mode.

        Returns:
            `out` with "pooled", "tokens" where they were computed, and the logits of each head
            under its name; and the statistics, changed in live stages only.
        """
        parts = 1 + len(self.heads)
        keys = [None] * parts if key is None else list(jax.random.split(key, parts))
        body, kept = stats.get("backbone", {}), stats.get("heads", {})
        own = variables(params["backbone"], body)
        module, rngs = self.backbone.module, _rngs(keys[0])
        if self.remat:
            labels = self.labels["backbone"]
            out, moved = remat.apply(
                module, labels, own, batch, live, rngs, hold_statistics=self.hold_statistics
            )
        else:
            out, moved = module.apply(own, batch, live, rngs=rngs, mutable=self._mutable(body))
        out, after = dict(out), {}
        tied = any(head.tied for head in self.heads.values())
        seen = {**out, "table": self._table(params)} if tied else dict(out)
        for (name, head), head_key in zip(self.heads.items(), keys[1:], strict=True):
            running = kept.get(name, {})
            args = (variables(params["heads"][name], running), seen, batch, name in live)
            options: Any = dict(rngs=_rngs(head_key), mutable=self._mutable(running))
            out[name], after[name] = head.apply(*args, **options)
        if self.hold_statistics:
            return out, stats
        after = {name: after[name]["batch_stats"] for name in kept}
        return out, _stats(moved["batch_stats"] if body else {}, after)

    def _mutable(self, stats: Any) -> list[str]:
        return ["batch_stats"] if stats and not self.hold_statistics else []

    def _table(self, params: Any) -> jax.Array:
        leaf = params["backbone"]
        for name in self.backbone.family.table.split("/"):
            leaf = leaf[name]
        return leaf

    def border(self, live: frozenset[str]) -> int:
        """Return the highest border below which every stage is held and so constant.

        With 6 blocks, {"head"} gives 8 (the features) and {"block_4", "block_5", "head"} gives 5.
        """
        labels = stages.stage_labels(self.backbone.module.blocks)
        moving = [k for k, label in enumerate(labels) if label in live]
        if moving:
            return moving[0]
        pooled_only = all(head.needs == "pooled" for head in self.heads.values())
        return len(labels) if pooled_only else len(labels) - 1

    def prefix(self, params: Any, stats: Any, batch: Batch, *borders: int) -> dict[str, jax.Array]:
        """Return the columns at `borders`, in one forward pass in evaluation mode.

        Where the stages below a border are held, its column never changes; a batch that holds it
        starts there.
        """
        module = self.backbone.module
        own = variables(params["backbone"], stats.get("backbone", {}))
        found: dict[str, jax.Array] = {}
        for border in sorted(borders):
            name = stages.column(border, module.blocks)
            stop = None if border == module.blocks + 2 else border
            value = module.apply(own, {**batch, **found}, frozenset(), stop)
            found[name] = value["pooled"] if stop is None else value
        return found

    def locate(self, params: Any, stats: Any, batch: Batch) -> str | None:
        """Return the label of the first stage or head with output that is not finite, or None."""
        module = self.backbone.module
        own = variables(params["backbone"], stats.get("backbone", {}))
        first = stages.given(batch, module.blocks) + 1
        for stop, label in enumerate(stages.stage_labels(module.blocks), start=1):
            if stop >= first and not _finite(module.apply(own, batch, frozenset(), stop)):
                return label
        out, _ = self.apply(params, stats, batch)
        return next((name for name in self.heads if not _finite(out[name])), None)

    def computing(
        self, dtype: Any = None, *, remat: bool | None = None, hold_statistics: bool | None = None
    ) -> "Model":
        """Return the model with another way to compute; parameters and statistics stay float32.

        Whatever the dtype, the softmax, the statistics of the norms, the mean over tokens, the sums
        of embeddings and the logits are float32; columns of `prefix` are in the dtype.

        Args:
            dtype: "float32" or "bfloat16" (the dtype itself will do); None leaves it.
            remat: whether the backward pass computes the inside of each block again instead of
                keeping it: less memory for one more forward pass of the blocks that it reaches,
                and the same numbers. Held blocks below the lowest live one run once. None leaves
                it.
            hold_statistics: whether BatchNorm normalises by its stored statistics in live stages
                too, and they stay: for small batches, or data unlike those of the checkpoint. None
                leaves it.

        Raises:
            ValueError: another dtype.
        """
        held = self.hold_statistics if hold_statistics is None else hold_statistics
        how = dict(remat=self.remat if remat is None else remat, hold_statistics=held)
        if dtype is None:
            return dataclasses.replace(self, **how)
        if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
            raise ValueError(
                f"dtype is {jnp.dtype(dtype).name}; models compute in float32 or bfloat16 "
                "(float16 would need its losses scaled); give one of the two"
            )
        return dataclasses.replace(self._with(dtype=jnp.dtype(dtype)), **how)

    def on_axis(self, axis_name: str) -> "Model":
        """Return the model with BatchNorm statistics taken over the devices of a pmapped axis."""
        made = self._with(axis_name=axis_name) if _has_axis(self.backbone.module) else self
        if not any(_has_axis(head) for head in self.heads.values()):
            return made
        heads = {
            name: head.clone(axis_name=axis_name) if _has_axis(head) else head
            for name, head in self.heads.items()
        }
        return dataclasses.replace(made, heads=heads)

    def _with(self, **fields: Any) -> "Model":
        module = self.backbone.module.clone(**fields)
        return dataclasses.replace(self, backbone=dataclasses.replace(self.backbone, module=module))


def attach(backbone: Backbone, heads: Mapping[str, Any], *, key: jax.Array) -> Model:
    """Put heads on a backbone; their weights are fresh.

    Args:
        backbone: the features.
        heads: {name: head module}; a head's name is also its label, so no stage may bear it.
        key: for the initial weights of the heads.

    Raises:
        ValueError: a head bears the name of a stage or of an output of the backbone, or is tied to
            a word embedding that there is not; or there is no head.
    """
    out, batch = _example(backbone, heads)
    fresh = {
        name: head.init(jax.random.fold_in(key, position), out, batch)
        for position, (name, head) in enumerate(heads.items())
    }
    params, stats = _parts(fresh)
    return attach_weights(backbone, heads, params, stats)


def attach_weights(
    backbone: Backbone,
    heads: Mapping[str, Any],
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
) -> Model:
    """Put heads with weights of their own on a backbone.

    Args:
        backbone: the features.
        heads: {name: head module}, as for `attach`.
        params: {name: parameters} of all heads.
        stats: {name: running statistics} of the heads that have some.
    """
    own = {"backbone": backbone.params, "heads": dict(params)}
    return Model(backbone, dict(heads), own, _stats(backbone.stats, dict(stats)))


def outline(backbone: Backbone, heads: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the shapes of the heads' params and stats, as `attach_weights` takes them.

    Nothing is computed or compiled.

    Raises:
        ValueError: as for `attach`.
    """
    out, batch = _example(backbone, heads)
    key = jax.random.key(0)
    return _parts({n: jax.eval_shape(head.init, key, out, batch) for n, head in heads.items()})


def _example(backbone: Backbone, heads: Mapping[str, Any]) -> tuple[Out, Batch]:
    """Return a batch of the backbone and what heads read of it, zeros of the right shapes."""
    stage_names = stages.stage_labels(backbone.module.blocks)
    taken = {*stage_names, stages.UNUSED, "tokens", "pooled", "table"} & set(heads)
    untied = [name for name, head in heads.items() if head.tied and not backbone.family.table]
    if untied:
        raise ValueError(
            f"the heads {untied} read the word embedding; {backbone.family.model_type} has none; "
            "give heads that are not tied"
        )
    if taken or not heads:
        raise ValueError(
            f"heads are named {sorted(heads)}; {sorted(taken)} are names of the backbone's own; "
            "give at least one head, under a name of its own"
        )
    batch = backbone.family.example(backbone.config)
    own = variables(backbone.params, backbone.stats)
    out = jax.eval_shape(lambda: backbone.module.apply(own, batch))
    out = {name: jnp.zeros(value.shape, value.dtype) for name, value in out.items()}
    if any(head.tied for head in heads.values()):
        out["table"] = attach_weights(backbone, heads, {}, {})._table({"backbone": backbone.params})
    return out, batch


def _parts(fresh: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the params of all heads, and the stats of those that have some."""
    stats = {name: made["batch_stats"] for name, made in fresh.items() if "batch_stats" in made}
    return {name: made.get("params", {}) for name, made in fresh.items()}, stats


def add_head(model: Model, name: str, head: Any, *, key: jax.Array) -> Model:
    """Return the model with one more head, with fresh weights; all else is as it was.

    Raises:
        ValueError: the model has a head of that name, or it is the name of a stage.
    """
    if name in model.heads:
        raise ValueError(f"the model has a head {name!r} among {sorted(model.heads)}; take another")
    fresh = attach(model.backbone, {name: head}, key=key)
    params = {**model.params, "heads": {**model.params["heads"], **fresh.params["heads"]}}
    of_heads = {**model.stats.get("heads", {}), **fresh.stats.get("heads", {})}
    stats = _stats(model.stats.get("backbone", {}), of_heads)
    return dataclasses.replace(model, heads={**model.heads, name: head}, params=params, stats=stats)


def _stats(backbone: Any, heads: Any) -> dict[str, Any]:
    """Return the branches that hold anything."""
    return {name: tree for name, tree in (("backbone", backbone), ("heads", heads)) if tree}


def _has_axis(module: Any) -> bool:
    return hasattr(module, "axis_name")


def _rngs(key: jax.Array | None) -> dict[str, jax.Array]:
    return {} if key is None else {"dropout": key}


def _finite(tree: Any) -> bool:
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))
