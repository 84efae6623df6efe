"""Heads: what turns the features of a backbone into the outputs of a task.

A head is a Linen module called as `head(out, batch, live)`, with two fields that say what it reads:
`needs` is "pooled" or "tokens", `tied` is True where it also reads `out["table"]`, the word
embedding of the backbone (vocabulary, dim).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.layers import Dropout, activation

POOLINGS = ("cls", "mean")


def pool(out: Mapping[str, jax.Array], batch: Mapping[str, Any], pooling: str | None) -> jax.Array:
    """Return one vector for each example, (n, dim), from tokens of shape (n, positions, dim).

    Args:
        out: "tokens" for "cls" and "mean", "pooled" for None.
        batch: its "attention_mask" (n, positions), if any, keeps padding out of the mean.
        pooling: "cls" takes the first position, "mean" the mean over real positions, None the
            backbone's own.

    >>> tokens = jnp.array([[[1.0], [3.0], [9.0]]])
    >>> float(pool({"tokens": tokens}, {"attention_mask": jnp.array([[1, 1, 0]])}, "mean")[0, 0])
    2.0
    """
    if pooling is None:
        return out["pooled"]
    if pooling == "cls":
        return out["tokens"][:, 0]
    if pooling != "mean":
        raise ValueError(f"pooling {pooling!r} is not known; give one of {POOLINGS}, or None")
    tokens = out["tokens"].astype(jnp.float32)
    mask = batch.get("attention_mask")
    if mask is None:
        return jnp.mean(tokens, axis=1).astype(out["tokens"].dtype)
    weight = jnp.asarray(mask, jnp.float32)[:, :, None]
    mean = jnp.sum(tokens * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1e-9)
    return mean.astype(out["tokens"].dtype)


def _kernel_init(start: str) -> Any:
    if start == "zeros":
        return nn.initializers.zeros
    if start == "normal":
        return nn.initializers.normal(0.02)
    raise ValueError(f"head start {start!r} is not known; there are 'normal' and 'zeros'")


class Linear(nn.Module):
    """Dropout and one dense layer on pooled features, for classification and regression.

    Attributes:
        outputs: number of classes or of regressed values.
        dropout: rate of dropout before the layer, in phases in which the head is live.
        pooling: None for the backbone's own pooling, "cls" or "mean" over its tokens.
        start: of the kernel, "normal" (standard deviation 0.02) or "zeros".
    """

    outputs: int
    dropout: float = 0.0
    pooling: str | None = None
    start: str = "normal"  # a field named `init` would hide the module's own method

    tied = False

    @property
    def needs(self) -> str:
        """Which entry of `out` the head reads."""
        return "pooled" if self.pooling is None else "tokens"

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 logits (n, outputs)."""
        features = pool(out, batch, self.pooling).astype(jnp.float32)
        features = Dropout(self.dropout, deterministic=not live)(features)
        dense = nn.Dense(self.outputs, kernel_init=_kernel_init(self.start), name="classifier")
        return dense(features)


class MaskedLM(nn.Module):
    """The masked-LM head of BERT: dense, activation, LayerNorm, decoder tied to the embedding.

    It computes in the dtype of the tokens, with sums in float32.

    Attributes:
        dim: width of the tokens.
        vocabulary: number of tokens, rows of `out["table"]`.
        activation: name in `jax.nn`, "gelu" is the exact one (erf).
        epsilon: of the LayerNorm.
    """

    dim: int
    vocabulary: int
    activation: str = "gelu"
    epsilon: float = 1e-12

    needs = "tokens"
    tied = True

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 logits (n, positions, vocabulary)."""
        tokens = out["tokens"]
        init = _kernel_init("normal")
        dense = nn.Dense(self.dim, dtype=tokens.dtype, kernel_init=init, name="dense")
        norm = nn.LayerNorm(
            epsilon=self.epsilon, dtype=tokens.dtype, use_fast_variance=False, name="LayerNorm"
        )
        hidden = norm(activation(self.activation)(dense(tokens)))
        bias = self.param("bias", nn.initializers.zeros, (self.vocabulary,))
        table = out["table"].astype(tokens.dtype)
        logits = jnp.matmul(hidden, table.T, preferred_element_type=jnp.float32)
        return logits + bias[None, None, :]
