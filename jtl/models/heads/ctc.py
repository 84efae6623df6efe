"""The head of connectionist temporal classification: a letter, or none, at each frame."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.heads.start import kernel_init
from jtl.models.layers.dropout import Dropout


class CTC(nn.Module):
    """Dropout and one dense layer on each frame; the loss over the logits is `losses.ctc`'s.

    Attributes:
        vocabulary: number of letters or pieces of words, the blank among them.
        dropout: rate of dropout before the layer, in phases in which the head is live.
        start: of the kernel, "normal" (standard deviation 0.02) or "zeros".

    Reference: Graves et al. 2006 (ICML), Connectionist Temporal Classification.
    """

    vocabulary: int
    dropout: float = 0.0
    start: str = "normal"

    needs = "tokens"
    tied = False

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 logits (n, frames, vocabulary); `out["token_mask"]` says which count."""
        frames = out["tokens"].astype(jnp.float32)
        frames = Dropout(self.dropout, deterministic=not live)(frames)
        return nn.Dense(self.vocabulary, kernel_init=kernel_init(self.start), name="lm_head")(
            frames
        )
