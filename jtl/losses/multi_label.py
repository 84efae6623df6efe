"""Several labels at once: binary cross entropy of each class, and mean average precision."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def binary_cross_entropy(
    logits: Float[Array, "n classes"],
    labels: Float[Array, "n classes"],
    *,
    positive_weights: Float[Array, " classes"] | None = None,
    mask: Bool[Array, " n"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the sum over examples of the mean over classes, in nats, and the number of examples.

        loss = -w_c y log s(x) - (1 - y) log(1 - s(x)),    s the logistic function

    the same numbers as PyTorch's `BCEWithLogitsLoss`.

    Args:
        logits: unnormalised scores in any float dtype; computed in float32.
        labels: 1 where the example is of the class, 0 where not; shares in between will do.
        positive_weights: w, above 1 for classes whose examples are few; None weighs all 1.
        mask: True = counted.

    >>> total, count = binary_cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 0.0]]))
    >>> f"{total:.4f} {count:.0f}"  # log 2
    '0.6931 1'
    """
    wide = logits.astype(jnp.float32)
    weights = jnp.ones(wide.shape[1]) if positive_weights is None else positive_weights
    yes, no = jax.nn.log_sigmoid(wide), jax.nn.log_sigmoid(-wide)
    loss = -(weights[None, :] * labels * yes + (1 - labels) * no).mean(axis=1)
    mask = jnp.ones(len(loss), bool) if mask is None else mask
    return jnp.sum(jnp.where(mask, loss, 0.0)), jnp.sum(mask, dtype=jnp.float32)


def mean_average_precision(
    logits: Float[np.ndarray, "n classes"], labels: Float[np.ndarray, "n classes"]
) -> float:
    """Return the mean over classes of average precision; classes without an example do not count.

    Average precision is the sum over positive examples, in order of falling score, of the precision
    at that place, over their number; examples of one score share a place.

    Raises:
        ValueError: no class has an example.

    >>> scores = np.array([[3.0], [2.0], [1.0]])
    >>> round(mean_average_precision(scores, np.array([[1.0], [0.0], [1.0]])), 4)  # (1 + 2/3) / 2
    0.8333
    """
    found = []
    for scores, truth in zip(np.asarray(logits).T, np.asarray(labels).T > 0.5, strict=True):
        if not truth.any():
            continue
        order = np.argsort(-scores, kind="stable")
        ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
        hits = np.cumsum(truth[order])[ends]
        precision = hits / (ends + 1)
        found.append(float(np.sum(precision * np.diff(hits, prepend=0)) / truth.sum()))
    if not found:
        raise ValueError(
            f"none of the {np.shape(labels)[1]} classes has an example among {np.shape(labels)[0]} "
            "rows; give rows with labels"
        )
    return float(np.mean(found))
