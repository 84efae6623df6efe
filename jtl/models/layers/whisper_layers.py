"""The layers of Whisper's encoder and decoder: each part behind a LayerNorm.

The names of the leaves are those of transformers' FlaxWhisperModel: `self_attn`, in the decoder
`encoder_attn`, `fc1`, `fc2` and their norms. Keys have no bias.

Reference: Radford et al. 2022, arXiv:2212.04356.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax

from jtl.models.layers.activations import activation
from jtl.models.layers.attention import attention
from jtl.models.layers.dropout import Dropout
from jtl.models.layers.layer_drop import LayerDrop
from jtl.models.layers.nest import Nest
from jtl.models.layers.norms import layer_norm
from jtl.models.layers.vit_encoder import dense

EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Side:
    """Sizes of the encoder or of the decoder; `drop` is the rate of LayerDrop."""

    width: int
    layers: int
    heads: int
    inner: int
    positions: int
    activation: str
    dropout: float
    attention_dropout: float
    activation_dropout: float
    drop: float
    scale: float


class _Attention(nn.Module):
    """Attention to itself or to the encoder; keys have no bias."""

    side: Side
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, read: jax.Array, mask: Any, causal: bool, live: bool
    ) -> jax.Array:
        side = self.side

        def project(x: jax.Array, name: str, bias: bool = True) -> jax.Array:
            made = dense(side.width, side.scale, self.dtype, name, bias)(x)
            return made.reshape(*x.shape[:-1], side.heads, side.width // side.heads)

        query = project(hidden, "q_proj")
        key, value = project(read, "k_proj", bias=False), project(read, "v_proj")
        drop = None
        if live and side.attention_dropout > 0:
            drop = Dropout(side.attention_dropout, deterministic=False)
        seen = attention(query, key, value, mask=mask, causal=causal, dropout=drop)
        return dense(side.width, side.scale, self.dtype, "out_proj")(seen.reshape(hidden.shape))


class _Layer(nn.Module):
    """Attention to itself, in the decoder to the encoder, then an MLP: each behind a LayerNorm."""

    side: Side
    dtype: Any
    decoder: bool = False

    @nn.compact
    def __call__(
        self, hidden: jax.Array, live: bool, encoded: Any = None, mask: Any = None
    ) -> jax.Array:
        side, before = self.side, hidden

        def norm(x: jax.Array, name: str) -> jax.Array:
            return layer_norm(EPSILON, self.dtype, name=name)(x)

        def drop(x: jax.Array, rate: float = side.dropout) -> jax.Array:
            return Dropout(rate, deterministic=not live)(x)

        inner = norm(hidden, "self_attn_layer_norm")
        own = _Attention(side, self.dtype, name="self_attn")
        hidden = hidden + drop(own(inner, inner, mask, self.decoder, live))
        if self.decoder:
            inner = norm(hidden, "encoder_attn_layer_norm")
            cross = _Attention(side, self.dtype, name="encoder_attn")
            hidden = hidden + drop(cross(inner, encoded, None, False, live))
        inner = dense(side.inner, side.scale, self.dtype, "fc1")(norm(hidden, "final_layer_norm"))
        inner = drop(activation(side.activation)(inner), side.activation_dropout)
        hidden = hidden + drop(dense(side.width, side.scale, self.dtype, "fc2")(inner))
        return LayerDrop(side.drop)(before, hidden, live)


def whisper_layers(side: Side, dtype: Any, decoder: bool = False) -> Nest:
    """Return the layers of a side under the names "0", "1", ..., called by name.

    A call has (hidden, live), and for the decoder (encoded, mask) after them.
    """
    make = functools.partial(_Layer, side, dtype, decoder)
    return Nest(tuple((str(i), make) for i in range(side.layers)))
