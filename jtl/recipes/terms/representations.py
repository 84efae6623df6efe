"""Penalties on features as terms: what the backbone of the start model gives is kept to."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl import data as jdata
from jtl.penalties import delta as delta_formula
from jtl.penalties import features as features_formula
from jtl.recipes import probe
from jtl.recipes.terms.outputs import answers, counted
from jtl.recipes.terms.part import Part, Start, check_weight, examples_of
from jtl.train.state import Context

Formula = Callable[..., jax.Array]


def features(
    start: Start, *, weight: float = 1.0, at: str = "pooled", kind: str = "squared"
) -> Part | None:
    """Return weight times the distance of the backbone's features from the start model's.

    Args:
        start: the model to keep to.
        weight: of the mean over examples or positions.
        at: "pooled", or "tokens" for each position (padding apart).
        kind: "squared" or "cosine", see `penalties.features`.

    Returns:
        The part; None before the first of several tasks.

    Raises:
        ValueError: features that the model does not give, an unknown kind.

    Reference: Romero et al. 2015, arXiv:1412.6550, equation 3.
    """
    check_weight(weight, "features")
    if start.first:
        return None

    def formula(ours: jax.Array, theirs: jax.Array, mask: jax.Array, refs: Any) -> jax.Array:
        return weight * features_formula.features(ours, theirs, kind=kind, mask=mask)

    return _feature_part(f"features_{at}", start, at, {}, formula)


def delta(
    start: Start,
    *,
    weight: float = 1.0,
    at: str = "tokens",
    data: Mapping[str, Any] | None = None,
    examples: int = 256,
    strength: float = 0.01,
    spread: float | None = 0.2,
) -> Part | None:
    """Return weight times DELTA towards the features of the start model, channel by channel.

    What a channel is worth is seen from a probe: logistic regression on the start's features (their
    mean over positions), standardised, with strength / 2 * |kernel|^2, on labelled examples; the
    loss is taken again with the channel put to zero.

    Args:
        start: the model to keep to.
        weight: of the weighted mean square; see `penalties.delta`.
        at: "tokens" for each position (padding apart), or "pooled".
        data: {"train": source} with classes, the task's own as a rule; None weighs all channels
            alike, the paper's variant without attention.
        examples: number of training examples that the probe is fitted on.
        strength: of the probe's decay.
        spread: see `penalties.channel_weights`.

    Returns:
        The part; None before the first of several tasks.

    Raises:
        ValueError: features that the model does not give, data without classes.

    Reference: Li et al. 2019, arXiv:1901.09229.
    """
    check_weight(weight, "delta")
    if start.first:
        return None
    name, channels = f"delta_{at}", _features(start, at).shape[-1]
    weights = jnp.full(channels, 1 / channels)
    if data is not None:
        losses, loss = _probe_losses(start, at, data, examples, strength)
        weights = delta_formula.channel_weights(losses, loss, spread=spread)

    def formula(ours: jax.Array, theirs: jax.Array, mask: jax.Array, refs: Any) -> jax.Array:
        return weight * delta_formula.delta(ours, theirs, refs[name], mask=mask)

    return _feature_part(name, start, at, {name: weights}, formula)


def _feature_part(name: str, start: Start, at: str, refs: dict[str, Any], formula: Formula) -> Part:
    """Return the part that compares `out[at]`; a formula is called as `(ours, theirs, mask, refs)`.

    A phase in which the whole backbone is held may give no tokens: they cannot move then, and the
    term is 0.
    """
    column = f"{name}/reference"

    def columns(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        return {column: answers(start, batch)[at]}

    def term(c: Context) -> Any:
        if at not in c.out:
            return 0.0, jnp.sum(c.batch["mask"], dtype=jnp.float32)
        mask = counted(c.out[at], c.batch)
        count = jnp.sum(mask, dtype=jnp.float32)
        return formula(c.out[at], c.batch[column], mask, c.refs) * count, count

    shape = _features(start, at)
    mask = jax.ShapeDtypeStruct(shape.shape[:-1], bool)
    jax.eval_shape(formula, shape, shape, mask, refs)  # options checked
    return Part(name, term, refs, columns, (column,))


def _probe_losses(
    start: Start, at: str, data: Mapping[str, Any], examples: int, strength: float
) -> tuple[jax.Array, jax.Array]:
    """Return the probe's loss without each channel, and with all of them."""
    dataset = jdata.encode(data["train"], start.model.backbone.inputs)
    if dataset.classes is None:
        raise ValueError(
            f"delta weighs channels by what they tell of classes, and {dataset.name} has numbers "
            "for labels; give data with classes, or data=None to weigh all channels alike"
        )
    pairs, means = list(examples_of(dataset, examples)), _means(start, at)
    inputs = np.concatenate([means(batch) for batch, _ in pairs])
    labels = np.concatenate([labels for _, labels in pairs])
    fitted = probe.fit_probe(
        *(inputs, labels),
        outputs=len(dataset.classes),
        choose=lambda logits: 0.0,  # one strength: nothing to choose
        validation=inputs,
        strengths=(strength,),
    )
    logits = fitted(inputs)

    def loss(logits: Any) -> jax.Array:
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -jnp.mean(own)

    def without(channel: jax.Array) -> jax.Array:
        gone = jnp.take(inputs / fitted.scale, channel, axis=1)[:, None]
        return loss(logits - gone * jnp.take(fitted.kernel, channel, axis=0)[None, :])

    return jax.lax.map(without, jnp.arange(inputs.shape[1])), loss(logits)


def _means(start: Start, at: str) -> Callable[[Mapping[str, Any]], jax.Array]:
    """Return `batch -> (n, channels)`: features of the start, a mean over real positions."""

    def mean(batch: Mapping[str, Any]) -> jax.Array:
        found = answers(start, batch)[at].astype(jnp.float32)
        if found.ndim == 2:
            return found
        real = {"mask": jnp.ones(found.shape[0], bool), **batch}
        weight = counted(found, real).astype(jnp.float32)
        total = jnp.sum(found * weight[..., None], axis=1)
        return total / jnp.maximum(jnp.sum(weight, axis=1), 1.0)[:, None]

    return jax.jit(mean)


def _features(start: Start, at: str) -> jax.ShapeDtypeStruct:
    """Return the shape of the features for one example."""
    backbone = start.model.backbone
    out = jax.eval_shape(lambda: answers(start, backbone.family.example(backbone.config)))
    known = sorted(set(out) - set(start.model.heads))
    if at not in known:
        raise ValueError(
            f"at={at!r} is not among the features of the backbone; take one of {known}"
        )
    return out[at]
