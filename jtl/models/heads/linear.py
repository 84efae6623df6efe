"""A linear layer on pooled features: classification and regression."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.heads.pooling import AttentionPool, pool
from jtl.models.heads.start import kernel_init
from jtl.models.layers.dropout import Dropout


class Linear(nn.Module):
    """Dropout and one dense layer on pooled features, for classification and regression.

    Attributes:
        outputs: number of classes or of regressed values.
        dropout: rate of dropout before the layer, in phases in which the head is live.
        pooling: None for the backbone's own pooling; of its tokens "cls", "last", "mean", or
            "attention", whose weights are the head's own.
        start: of the kernel, see `start.kernel_init`.
        bias: whether the layer has one.
    """

    outputs: int
    dropout: float = 0.0
    pooling: str | None = None
    start: str = "normal"  # a field named `init` would hide the module's own method
    bias: bool = True

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
        if self.pooling == "attention":
            mask = out.get("token_mask", batch.get("attention_mask"))
            features = AttentionPool(name="attention")(out["tokens"], mask)
        else:
            features = pool(out, batch, self.pooling).astype(jnp.float32)
        features = Dropout(self.dropout, deterministic=not live)(features)
        init = kernel_init(self.start)
        dense = nn.Dense(self.outputs, use_bias=self.bias, kernel_init=init, name="classifier")
        return dense(features)
