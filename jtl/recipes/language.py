"""Language models that are watched: masked-LM perplexity, and any other loss over positions."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtl.data import Dataset
from jtl.losses import bootstrap
from jtl.models.heads import MaskedLM
from jtl.models.load_head import load_head
from jtl.recipes import masking
from jtl.recipes.retain import PARTS, Before, Values, Watched, encoded
from jtl.train.state import Apply


def masked_lm(
    before: Before,
    *,
    data: Mapping[str, Any],
    name: str = "masked_lm",
    share: float = 0.15,
    seed: int = 0,
    buckets: int = 2,
    max_length: int | None = None,
) -> Watched:
    """Return a set of texts whose masked tokens the checkpoint's own masked-LM head guesses.

    The head stays as it is in the checkpoint, on the word embeddings as they are now. The masks are
    drawn once, so all figures are of the same guesses: the perplexity, and the loss in nats.

    Args:
        before: the start; its checkpoint must have a masked-LM head.
        data: {"validation", "test"} of sources of texts; labels are not read.
        name: in the metrics.
        share: of the tokens of each text, special ones apart, that are masked; one at the least.
        seed: of the masks.
        buckets: number of padded lengths.
        max_length: longest text in tokens; None is the checkpoint's own limit.

    Raises:
        ValueError: the checkpoint has no masked-LM head, or the tokenizer no mask token.
    """
    model = before.model
    module, head = _language_head(before)
    datasets = {
        part: masking.masked(dataset, model.backbone.inputs.tokenizer, share=share, seed=seed)
        for part, dataset in encoded(model, data, buckets, max_length, PARTS).items()
    }

    def apply(params: Any, stats: Any, batch: Any, **options: Any) -> Any:
        out, stats = model.apply(params, stats, batch, **options)
        tokens = masking.at_masked(out["tokens"], batch)
        table = params["backbone"]["embeddings"]["word_embeddings"]["embedding"]
        seen = {"tokens": tokens, "table": table}
        return {**out, "logits": module.apply({"params": head}, seen, batch, False)}, stats

    def loss_per_position(out: Any, batch: Any) -> Any:
        labels = batch[masking.LABELS]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            out["logits"].astype(jnp.float32), jnp.maximum(labels, 0)
        )
        return losses, (labels >= 0).astype(jnp.float32)

    return per_position(
        *(name, "masked tokens", frozenset(model.groups)),
        datasets=datasets,
        apply=apply,
        loss_per_position=loss_per_position,
    )


def per_position(
    name: str,
    kind: str,
    reads: frozenset[str],
    *,
    datasets: Mapping[str, Dataset],
    apply: Apply,
    loss_per_position: Callable[[Any, Any], tuple[jax.Array, jax.Array]],
    metric: str = "perplexity",
) -> Watched:
    """Return a source whose figure is a loss over positions, such as that of a language model.

    Args:
        name: in the metrics.
        kind: in words.
        reads: labels on which the loss depends.
        datasets: "validation" and "test".
        apply: forward pass.
        loss_per_position: `(out, batch) -> (losses, weights)`, each (n, positions), in nats; a
            weight of 0 leaves a position out.
        metric: "perplexity", exp(mean loss), or "loss".
    """

    def summed(params: Any, stats: Any, batch: Any, **options: Any) -> Any:
        out, stats = apply(params, stats, batch, **options)
        losses, weights = loss_per_position(out, batch)
        return {"loss": jnp.sum(losses * weights, 1), "count": jnp.sum(weights, 1)}, stats

    def score(values: Values, labels: Any) -> dict[str, float]:
        del labels
        loss = float(np.sum(values["loss"], dtype=np.float64) / np.sum(values["count"]))
        return {"perplexity": float(np.exp(loss)), "loss": loss}

    def interval(first: Values, last: Values, labels: Any) -> tuple[float, float]:
        def change(rows: np.ndarray) -> float:
            one, other = ({k: v[rows] for k, v in values.items()} for values in (first, last))
            return score(other, None)[metric] - score(one, None)[metric]

        return bootstrap.resampled_interval(change, len(labels), samples=2000)

    outputs = ("loss", "count")
    return Watched(name, kind, metric, False, reads, datasets, summed, outputs, score, interval)


def _language_head(before: Before) -> tuple[Any, Any]:
    """Return (module, params) of the masked-LM head: kept by the model, or in its checkpoint."""
    model = before.model
    for name in before.kept:
        if isinstance(model.heads[name], MaskedLM):
            return model.heads[name], model.params["heads"][name]
    source = model.backbone.source
    try:
        return load_head(source, model.backbone, "masked_lm")
    except ValueError as error:
        raise ValueError(
            f"retain of kind 'masked_lm' needs the masked-LM head of the start, and {source!r} "
            f"gives none ({error}); start from a checkpoint that has one (BertForMaskedLM), or "
            "watch a probe"
        ) from error
