"""Heads of language models: the masked token, and the next one."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.heads.start import kernel_init
from jtl.models.layers.activations import activation
from jtl.models.layers.norms import layer_norm


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
        init = kernel_init("normal")
        dense = nn.Dense(self.dim, dtype=tokens.dtype, kernel_init=init, name="dense")
        norm = layer_norm(self.epsilon, tokens.dtype, name="LayerNorm")
        hidden = norm(activation(self.activation)(dense(tokens)))
        bias = self.param("bias", nn.initializers.zeros, (self.vocabulary,))
        table = out["table"].astype(tokens.dtype)
        logits = jnp.matmul(hidden, table.T, preferred_element_type=jnp.float32)
        return logits + bias[None, None, :]


class CausalLM(nn.Module):
    """The next token at each position: one product with the word embedding, or with its own kernel.

    It computes in the dtype of the tokens, with sums in float32.

    Attributes:
        vocabulary: number of tokens.
        tied: whether the kernel is `out["table"]`, the word embedding of the backbone.
        bias: whether the logits have one.
        scale: of the tokens before the product.
    """

    vocabulary: int
    tied: bool = True
    bias: bool = False
    scale: float = 1.0

    needs = "tokens"

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 logits (n, positions, vocabulary)."""
        tokens = out["tokens"] * self.scale
        if self.tied:
            kernel = out["table"].T
        else:
            shape = (tokens.shape[-1], self.vocabulary)
            kernel = self.param("kernel", kernel_init("normal"), shape)
        kernel = kernel.astype(tokens.dtype)
        logits = jnp.matmul(tokens, kernel, preferred_element_type=jnp.float32)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.vocabulary,))
            logits = logits + bias[None, None, :]
        return logits
