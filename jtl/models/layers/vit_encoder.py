"""The encoder of ViT: attention, then MLP, each behind a LayerNorm and added to the stream.

The names are those of transformers' ViT: `layer/0/attention/attention/query`, `attention/output`,
`intermediate`, `output`, `layernorm_before`, `layernorm_after`.

Reference: Dosovitskiy et al. 2020, arXiv:2010.11929; stochastic depth: Huang et al. 2016,
arXiv:1603.09382.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from jtl.models.layers.activations import activation
from jtl.models.layers.dense import flat_dot
from jtl.models.layers.dropout import Dropout
from jtl.models.layers.norms import layer_norm
from jtl.models.layers.self_attention import SelfAttention


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and rates of a ViT's layers, under the names that `config.json` has for them.

    `drop_path_rate` is the rate of stochastic depth in the last layer; it grows evenly from 0 in
    the first one.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.0
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02


def check_heads(dim: int, heads: int) -> None:
    """Refuse a number of heads that does not divide the width.

    Raises:
        ValueError: it does not.
    """
    if dim % heads:
        raise ValueError(
            f"num_attention_heads={heads} does not divide hidden_size={dim}; "
            "give a number of heads that does"
        )


def drop_path_rates(last: float, layers: int) -> list[float]:
    """Return the rate of stochastic depth in each layer, from 0 evenly to the last one's.

    >>> drop_path_rates(0.2, 3)
    [0.0, 0.1, 0.2]
    """
    return [last * i / max(layers - 1, 1) for i in range(layers)]


def dense(width: int, scale: float, dtype: Any, name: str = "dense", bias: bool = True) -> nn.Dense:
    """Return a dense layer whose kernel begins normal, of standard deviation `scale`."""
    init = nn.initializers.normal(scale)
    return nn.Dense(
        width, use_bias=bias, dtype=dtype, kernel_init=init, dot_general=flat_dot, name=name
    )


class Encoder(nn.Module):
    """All layers, run one at a time by their index.

    Attributes:
        config: sizes and rates.
        dtype: of the computation; parameters are float32.
    """

    config: EncoderConfig
    dtype: Any

    def setup(self) -> None:
        """Declare the layers."""
        self.layer = Layers(self.config, self.dtype)

    def __call__(self, index: int, hidden: jax.Array, live: bool) -> jax.Array:
        """Return the output of layer `index`, (n, positions, dim)."""
        return self.layer(index, hidden, live)


class Layers(nn.Module):
    """The layers under the names "0", "1", ... as in the checkpoints; attributes of `Encoder`."""

    config: EncoderConfig
    dtype: Any

    def setup(self) -> None:
        """Declare the layers."""
        rates = drop_path_rates(self.config.drop_path_rate, self.config.num_hidden_layers)
        self.layers = [
            _Layer(self.config, rate, self.dtype, name=str(i)) for i, rate in enumerate(rates)
        ]

    def __call__(self, index: int, hidden: jax.Array, live: bool) -> jax.Array:
        """Return the output of layer `index`, (n, positions, dim)."""
        return self.layers[index](hidden, live)


class _Layer(nn.Module):
    config: EncoderConfig
    drop_path: float
    dtype: Any

    def setup(self) -> None:
        self.attention = Attention(self.config, self.dtype)
        self.intermediate = _Intermediate(self.config, self.dtype)
        self.output = _Output(self.config, self.dtype)
        self.layernorm_before = layer_norm(self.config.layer_norm_eps, self.dtype)
        self.layernorm_after = layer_norm(self.config.layer_norm_eps, self.dtype)
        self.drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2))

    def __call__(self, hidden: jax.Array, live: bool) -> jax.Array:
        inner = self.attention(self.layernorm_before(hidden), live)
        hidden = hidden + self.drop(inner, deterministic=not live)
        inner = self.output(self.intermediate(self.layernorm_after(hidden)), live)
        return hidden + self.drop(inner, deterministic=not live)


class Attention(nn.Module):
    """Self-attention with its output projection; attributes of `Encoder`."""

    config: EncoderConfig
    dtype: Any

    def setup(self) -> None:
        """Declare the two parts."""
        config = self.config
        self.attention = SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            dropout=config.attention_probs_dropout_prob,
            bias=config.qkv_bias,
            scale=config.initializer_range,
            dtype=self.dtype,
        )
        self.output = _Output(config, self.dtype)

    def __call__(self, hidden: jax.Array, live: bool) -> jax.Array:
        """Return (n, positions, dim)."""
        return self.output(self.attention(hidden, None, live), live)


class _Intermediate(nn.Module):
    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        config = self.config
        wide = dense(config.intermediate_size, config.initializer_range, self.dtype)(hidden)
        return activation(config.hidden_act)(wide)


class _Output(nn.Module):
    """Dense layer and dropout; the caller adds the residual stream."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, inner: jax.Array, live: bool) -> jax.Array:
        config = self.config
        inner = dense(config.hidden_size, config.initializer_range, self.dtype)(inner)
        return Dropout(config.hidden_dropout_prob, deterministic=not live)(inner)
