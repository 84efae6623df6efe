"""The next token, with a kernel of the language model and one for the tokens that were added."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.heads.start import kernel_init


class Decoupled(nn.Module):
    """The logits of the language model's tokens and, behind them, those of the added ones.

    It computes in the dtype of the tokens, with sums in float32.

    Attributes:
        vocabulary: tokens of the language model.
        additional: tokens that were added; 0 for none.
        tied: whether the first kernel is `out["table"]`, the word embedding of the backbone.
    """

    vocabulary: int
    additional: int = 0
    tied: bool = False

    needs = "tokens"

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 logits (n, positions, vocabulary + additional)."""
        tokens = out["tokens"]
        kernels = [out["table"].T if self.tied else self._kernel(tokens.shape[-1])]
        if self.additional:
            kernels.append(_Added(self.additional, name="additional_fc")(tokens))
        kernels = [kernel.astype(tokens.dtype) for kernel in kernels]
        products = [jnp.matmul(tokens, k, preferred_element_type=jnp.float32) for k in kernels]
        return jnp.concatenate(products, axis=-1)

    def _kernel(self, dim: int) -> jax.Array:
        return self.param("kernel", kernel_init("normal"), (dim, self.vocabulary))


class _Added(nn.Module):
    """A kernel under a name of its own."""

    outputs: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.param("kernel", kernel_init("normal"), (tokens.shape[-1], self.outputs))
