"""Penalties on outputs as terms: what the heads of the start model answer is kept to.

What the start model gives is computed once, as columns of the data, in evaluation mode.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl import data as jdata
from jtl.penalties import kl as kl_formula
from jtl.recipes.terms.part import Part, Start, Stream, check_weight, one_head
from jtl.train.state import Context


def kl(
    start: Start,
    *,
    weight: float = 1.0,
    head: str | None = None,
    temperature: float = 2.0,
    direction: str = "forward",
    keep: int | None = None,
    data: Mapping[str, Any] | None = None,
    rows: int | float = 0.25,
) -> Part | None:
    """Return weight times the KL divergence of a kept head's outputs from the start model's.

    Over examples, or over the real tokens of a head with outputs for each token. It is taken over
    the task's own batches or over other data; for both, give the penalty twice.

    Args:
        start: its model must have kept a trained head.
        weight: of the mean over examples or tokens.
        head: which kept head; None where there is only one.
        temperature: T; the divergence is scaled by T^2.
        direction: "forward" is KL(start ‖ model), "reverse" KL(model ‖ start), or "js".
        keep: only the start's `keep` likeliest classes are stored one by one, all others as one; a
            column of a large vocabulary stays small. None stores all.
        data: {"train": source} of general examples, which fill a part of each batch; None takes the
            task's own.
        rows: of each batch for `data`; a number below 1 is a share.

    Returns:
        The part; None before the first of several tasks.

    Raises:
        ValueError: no kept head, or several and none named; a head that tells no classes apart; a
            temperature, direction or keep that `penalties.kl` refuses.

    Reference: Hinton, Vinyals and Dean 2015, arXiv:1503.02531.
    """
    check_weight(weight, "kl")
    if start.first:
        return None
    head = one_head(start, head, "kl")
    name = f"kl_{head}" if data is None else f"kl_{head}_stream"
    classes = _classes(start, head, "kl")
    formula = functools.partial(
        kl_formula.kl if keep is None else kl_formula.kl_top_k,
        temperature=temperature,
        direction=direction,
    )
    kinds = ("logits",) if keep is None else kl_formula.TopK._fields
    names = tuple(f"{name}/{kind}" for kind in kinds)

    def reference(logits: jax.Array) -> tuple[jax.Array, ...]:
        logits = _chosen(logits, classes)
        return (
            (logits,) if keep is None else kl_formula.top_k(logits, keep, temperature=temperature)
        )

    def columns(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        return dict(zip(names, reference(answers(start, batch)[head]), strict=True))

    def term(c: Context) -> Any:
        logits, mask = _chosen(c.out[head], classes), counted(c.out[head], c.batch)
        count = jnp.sum(mask, dtype=jnp.float32)
        return weight * formula(logits, *(c.batch[n] for n in names), mask=mask) * count, count

    like = jax.ShapeDtypeStruct((1, _outputs(start, head)[-1]), jnp.float32)
    jax.eval_shape(lambda x: formula(_chosen(x, classes), *reference(x)), like)  # checks options
    stream = None
    if data is not None:
        stream = Stream(jdata.encode(data["train"], start.model.backbone.inputs), rows)
    return Part(name, term, {}, columns, names, stream)


def lwf(start: Start, *, weight: float = 1.0, temperature: float = 2.0) -> Part | None:
    """Return weight times the distillation loss of all kept heads on the task's own batches.

        weight * sum over heads of T^2 KL(start ‖ model), a mean over examples

    over the classes that a head's tasks had: a head that several tasks share is compared on the
    old classes alone, and the new ones are free. T^2 is kept, so that T does not weigh.

    Args:
        start: its model must have kept a trained head.
        weight: lambda_o of the paper.
        temperature: T.

    Returns:
        The part; None before the first of several tasks.

    Raises:
        ValueError: no kept head; a head that tells no classes apart, or with outputs for each
            token; classes are given for other heads than this one.

    Reference: Li and Hoiem 2016, arXiv:1606.09282, equations 2 and 3.
    """
    check_weight(weight, "lwf")
    if start.first:
        return None
    if not start.kept:
        one_head(start, None, "lwf")
    heads = {head: _classes(start, head, "lwf") for head in start.kept}
    _check_flat(start, heads)

    def columns(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        out = answers(start, batch)
        return {f"lwf/{head}": _chosen(out[head], classes) for head, classes in heads.items()}

    def term(c: Context) -> Any:
        mask = jnp.asarray(c.batch["mask"], bool)
        count = jnp.sum(mask, dtype=jnp.float32)
        total = jnp.float32(0.0)
        for head, classes in heads.items():
            logits, reference = _chosen(c.out[head], classes), c.batch[f"lwf/{head}"]
            total += kl_formula.kl(logits, reference, temperature=temperature, mask=mask)
        return weight * total * count, count

    kl_formula.kl(jnp.zeros((1, 2)), jnp.zeros((1, 2)), temperature=temperature)  # checks it
    return Part("lwf", term, {}, columns, tuple(f"lwf/{head}" for head in heads))


def answers(start: Start, batch: Mapping[str, Any]) -> Mapping[str, jax.Array]:
    """Return what the start model gives on a batch, in evaluation mode."""
    out, _ = start.model.apply(start.model.params, start.model.stats, batch)
    return out


def counted(out: jax.Array, batch: Mapping[str, Any]) -> jax.Array:
    """Return the mask of an output without its last axis: real rows, and of these real tokens."""
    rows = jnp.asarray(batch["mask"], bool)
    if out.ndim == 2:
        return rows
    tokens = jnp.asarray(batch.get("attention_mask", jnp.ones(out.shape[:2])), bool)
    return rows[:, None] & tokens


def _chosen(logits: jax.Array, classes: tuple[int, ...] | None) -> jax.Array:
    return logits if classes is None else jnp.take(logits, np.asarray(classes), axis=-1)


def _outputs(start: Start, head: str) -> tuple[int, ...]:
    """Return the shape of a head's outputs for one example."""
    backbone = start.model.backbone
    example = backbone.family.example(backbone.config)
    return jax.eval_shape(lambda: answers(start, example)[head]).shape


def _classes(start: Start, head: str, what: str) -> tuple[int, ...] | None:
    """Return the classes that the tasks of a head had, None for all; there must be two or more."""
    if start.seen and head not in start.seen:
        raise ValueError(
            f"{what} needs the classes that head {head!r} was trained on; they are given for "
            f"{sorted(map(repr, start.seen))}; name all kept heads there, with None for all classes"
        )
    chosen = start.seen.get(head)
    count = _outputs(start, head)[-1] if chosen is None else len(chosen)
    kind = getattr(start.tasks.get(head), "kind", None)
    if count < 2 or kind == "regression":
        raise ValueError(
            f"{what} compares distributions over classes; head {head!r} has {count} outputs, of a "
            f"task of kind {kind}; name another head, or take features, which needs none"
        )
    return chosen


def _check_flat(start: Start, heads: Mapping[str, Any]) -> None:
    deep = [head for head in heads if len(_outputs(start, head)) != 2]
    if deep:
        raise ValueError(
            f"lwf sums means over examples, and heads {deep} of {sorted(heads)} give outputs for "
            "each token; take one kl penalty for each head"
        )
