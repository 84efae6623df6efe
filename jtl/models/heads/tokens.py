"""Heads with an answer for each token: its class, the ends of a span, whether it was replaced."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.heads.start import kernel_init
from jtl.models.layers.activations import activation
from jtl.models.layers.dropout import Dropout
from jtl.models.layers.norms import layer_norm


class TokenLinear(nn.Module):
    """Dropout and one dense layer on each token: tagging.

    Attributes:
        outputs: number of classes.
        dropout: rate of dropout before the layer, in phases in which the head is live.
        start: of the kernel, "normal" (standard deviation 0.02) or "zeros".
    """

    outputs: int
    dropout: float = 0.0
    start: str = "normal"

    needs = "tokens"
    tied = False

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 logits (n, positions, outputs)."""
        tokens = out["tokens"].astype(jnp.float32)
        tokens = Dropout(self.dropout, deterministic=not live)(tokens)
        init = kernel_init(self.start)
        return nn.Dense(self.outputs, kernel_init=init, name="classifier")(tokens)


class Span(nn.Module):
    """Dropout and one dense layer on each token: how well a span of the text starts, ends there.

    Attributes:
        dropout: rate of dropout before the layer, in phases in which the head is live.
        start: of the kernel, "normal" (standard deviation 0.02) or "zeros".
    """

    dropout: float = 0.0
    start: str = "normal"

    outputs = 2
    needs = "tokens"
    tied = False

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 logits (n, positions, 2): of the start, of the end.

        Padding has its logits too; mask them before a softmax over the positions.
        """
        tokens = out["tokens"].astype(jnp.float32)
        tokens = Dropout(self.dropout, deterministic=not live)(tokens)
        return nn.Dense(2, kernel_init=kernel_init(self.start), name="qa_outputs")(tokens)


class ReplacedToken(nn.Module):
    """ELECTRA's discriminator: dense, activation, one logit for each token.

    Attributes:
        activation: a name of `layers.ACTIVATIONS`.

    Reference: Clark et al. 2020, arXiv:2003.10555.
    """

    activation: str = "gelu"

    needs = "tokens"
    tied = False

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 logits (n, positions); above 0 says that the token was replaced."""
        tokens = out["tokens"].astype(jnp.float32)
        init = kernel_init("normal")
        dense = nn.Dense(tokens.shape[-1], kernel_init=init, name="dense")
        hidden = activation(self.activation)(dense(tokens))
        return nn.Dense(1, kernel_init=init, name="dense_prediction")(hidden)[..., 0]


class TokenProjection(nn.Module):
    """CXR-BERT's projection of the first token: dense, GELU, LayerNorm, dense.

    Attributes:
        outputs: width of the space that texts and images share.

    Reference: Boecking et al. 2022, arXiv:2204.09817.
    """

    outputs: int

    needs = "tokens"
    tied = False

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 vectors (n, outputs), not normalised."""
        hidden = out["tokens"][:, 0].astype(jnp.float32)
        init = kernel_init("normal")
        hidden = nn.Dense(self.outputs, kernel_init=init, name="dense_to_hidden")(hidden)
        hidden = layer_norm(1e-12, name="LayerNorm")(activation("gelu")(hidden))
        return nn.Dense(self.outputs, kernel_init=init, name="dense_to_output")(hidden)
