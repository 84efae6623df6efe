"""A narrow layer before the classifier: the head of wav2vec 2.0 and of Whisper's encoder."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.heads.start import kernel_init
from jtl.models.layers.dropout import Dropout


class Projected(nn.Module):
    """Dropout and two dense layers without an activation on pooled features.

    transformers projects each position and takes the mean then; the layer is linear, so that is the
    projection of the mean.

    Attributes:
        outputs: number of classes or of regressed values.
        width: of the first layer.
        dropout: rate of dropout before it, in phases in which the head is live.
        start: of the last kernel, "normal" (standard deviation 0.02) or "zeros".
    """

    outputs: int
    width: int = 256
    dropout: float = 0.0
    start: str = "normal"

    needs = "pooled"
    tied = False

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 logits (n, outputs)."""
        features = out["pooled"].astype(jnp.float32)
        features = Dropout(self.dropout, deterministic=not live)(features)
        hidden = nn.Dense(self.width, name="projector")(features)
        init = kernel_init(self.start)
        return nn.Dense(self.outputs, kernel_init=init, name="classifier")(hidden)
