"""A dense layer with an activation before the linear layer: heads of RoBERTa and DistilBERT."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.heads.start import kernel_init
from jtl.models.layers.activations import activation
from jtl.models.layers.dropout import Dropout


class TwoLayer(nn.Module):
    """Dropout, dense layer, activation, dropout and dense layer on the first token.

    Attributes:
        outputs: number of classes or of regressed values.
        activation: between the layers; a name of `layers.ACTIVATIONS`.
        dropout: rate before each layer, in phases in which the head is live.
        first: whether there is dropout before the first layer too.
        start: of the last kernel, "normal" (standard deviation 0.02) or "zeros".
    """

    outputs: int
    activation: str = "tanh"
    dropout: float = 0.0
    first: bool = True
    start: str = "normal"

    needs = "tokens"
    tied = False

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 logits (n, outputs)."""
        hidden = out["tokens"][:, 0].astype(jnp.float32)
        if self.first:
            hidden = Dropout(self.dropout, deterministic=not live)(hidden)
        dense = nn.Dense(hidden.shape[-1], kernel_init=kernel_init("normal"), name="dense")
        hidden = activation(self.activation)(dense(hidden))
        hidden = Dropout(self.dropout, deterministic=not live)(hidden)
        return nn.Dense(self.outputs, kernel_init=kernel_init(self.start), name="out_proj")(hidden)
