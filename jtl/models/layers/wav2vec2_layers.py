"""The layers of wav2vec 2.0's encoder, each LayerNorm before its part or after the sum.

The names of the leaves are those of transformers' FlaxWav2Vec2Model. A layer reads the fields of
the config under their names in `config.json`.

Reference: Baevski et al. 2020, arXiv:2006.11477.
"""

from typing import Any

import flax.linen as nn
import jax

from jtl.models.layers.activations import activation
from jtl.models.layers.dropout import Dropout
from jtl.models.layers.layer_drop import LayerDrop
from jtl.models.layers.norms import layer_norm
from jtl.models.layers.tower import TowerAttention
from jtl.models.layers.vit_encoder import dense


class _FeedForward(nn.Module):
    config: Any
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, live: bool) -> jax.Array:
        config, scale = self.config, self.config.initializer_range
        inner = dense(config.intermediate_size, scale, self.dtype, "intermediate_dense")(hidden)
        inner = activation(config.hidden_act)(inner)
        inner = Dropout(config.activation_dropout, deterministic=not live)(inner)
        outer = dense(config.hidden_size, scale, self.dtype, "output_dense")(inner)
        return Dropout(config.hidden_dropout, deterministic=not live)(outer)


class Wav2Vec2Layer(nn.Module):
    """Attention and two dense layers, each LayerNorm before them (stable) or after the sum."""

    config: Any
    dtype: Any

    def setup(self) -> None:
        """Declare both parts and their norms."""
        config = self.config
        self.attention = TowerAttention(config, False, self.dtype)
        self.layer_norm = layer_norm(config.layer_norm_eps, self.dtype)
        self.feed_forward = _FeedForward(config, self.dtype)
        self.final_layer_norm = layer_norm(config.layer_norm_eps, self.dtype)
        self.dropout = Dropout(config.hidden_dropout)
        self.drop = LayerDrop(config.layerdrop)

    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        """Return (n, positions, dim) from hidden (n, positions, dim) and mask (n, positions)."""
        stable, before = self.config.do_stable_layer_norm, hidden
        inner = self.layer_norm(hidden) if stable else hidden
        inner = self.attention(inner, mask, live)
        hidden = hidden + (self.dropout(inner) if live else inner)
        if stable:
            hidden = hidden + self.feed_forward(self.final_layer_norm(hidden), live)
        else:
            hidden = self.layer_norm(hidden)
            hidden = self.final_layer_norm(hidden + self.feed_forward(hidden, live))
        return self.drop(before, hidden, live)
