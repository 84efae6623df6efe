"""The encoder of BERT: attention and two dense layers, each followed by LayerNorm of the sum.

The names of the leaves are those of transformers' FlaxBertModel, which RoBERTa and ELECTRA share;
MPNet has another attention between the same outer parts.

Reference: Vaswani et al. 2017, arXiv:1706.03762; Devlin et al. 2018, arXiv:1810.04805.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.layers.activations import activation
from jtl.models.layers.dense import flat_dot
from jtl.models.layers.dropout import Dropout
from jtl.models.layers.norms import layer_norm
from jtl.models.layers.self_attention import SelfAttention


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and rates of an encoder of texts, under the names of BERT's `config.json`.

    `embedding_size` is the width of the embeddings, None for `hidden_size`. `padding` is the token
    whose places do not count (see `positions_of`), None where places are counted from 0 in all.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    embedding_size: int | None = None
    padding: int | None = None


def encoder_config(
    config: Mapping[str, Any],
    family: str,
    *,
    spelled: Mapping[str, str] | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> EncoderConfig:
    """Return the fields that an encoder reads, checked.

    Args:
        config: the dict of `config.json`; other fields are left alone.
        family: how to name it in errors.
        spelled: {field of `EncoderConfig`: its name in this family's `config.json`}.
        fixed: {field: its value}, whatever `config.json` has.

    Raises:
        ValueError: a size is missing, the heads do not divide the width, the activation is not
            known, or the config asks for a variant that is not built here.

    >>> sizes = dict(vocab_size=9, dim=4, num_hidden_layers=1, num_attention_heads=2)
    >>> sizes = dict(sizes, intermediate_size=8, max_position_embeddings=5)
    >>> encoder_config(sizes, "BERT", spelled={"hidden_size": "dim"}).hidden_size
    4
    """
    spelled, own = spelled or {}, dict(fixed or {})
    missing = []
    for field in dataclasses.fields(EncoderConfig):
        name = spelled.get(field.name, field.name)
        if field.name not in own and field.name != "padding" and config.get(name) is not None:
            own[field.name] = config[name]
        if field.name not in own and field.default is dataclasses.MISSING:
            missing.append(name)
    if missing:
        raise ValueError(
            f"the {family} config lacks {missing}; it has {sorted(config)}; "
            f"add them, or correct model_type if the checkpoint is no {family}"
        )
    for name, only in (("position_embedding_type", "absolute"), ("is_decoder", False)):
        if config.get(name, only) not in (only, None):
            raise ValueError(
                f"the {family} config has {name}={config[name]!r}; the encoder here has "
                f"{only!r} alone; use a checkpoint of that kind"
            )
    made = EncoderConfig(**own)
    if made.hidden_size % made.num_attention_heads:
        heads, width = (spelled.get(n, n) for n in ("num_attention_heads", "hidden_size"))
        raise ValueError(
            f"{heads}={made.num_attention_heads} does not divide "
            f"{width}={made.hidden_size}; give a number of heads that does"
        )
    activation(made.hidden_act)
    return made


def dense(width: int, config: EncoderConfig, dtype: Any, name: str = "dense") -> nn.Dense:
    """Return a dense layer with the initial values of the config."""
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(width, dtype=dtype, kernel_init=init, dot_general=flat_dot, name=name)


class SumNorm(nn.Module):
    """Dense, dropout, and LayerNorm of the sum with the residual stream."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, inner: jax.Array, residual: jax.Array, live: bool) -> jax.Array:
        """Return (n, positions, dim) from inner (n, positions, any) and residual of its shape."""
        config = self.config
        inner = dense(config.hidden_size, config, self.dtype)(inner)
        drop = Dropout(config.hidden_dropout_prob, deterministic=not live)
        return layer_norm(config.layer_norm_eps, self.dtype, name="LayerNorm")(
            drop(inner) + residual
        )


class Intermediate(nn.Module):
    """Dense layer to the inner width and activation."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Return (n, positions, intermediate_size)."""
        wide = dense(self.config.intermediate_size, self.config, self.dtype)(hidden)
        return activation(self.config.hidden_act)(wide)


class _Attention(nn.Module):
    config: EncoderConfig
    dtype: Any

    def setup(self) -> None:
        config = self.config
        self.self = SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            dropout=config.attention_probs_dropout_prob,
            scale=config.initializer_range,
            dtype=self.dtype,
        )
        self.output = SumNorm(config, self.dtype)

    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        return self.output(self.self(hidden, mask, live), hidden, live)


class PostNormLayer(nn.Module):
    """One layer of BERT: leaves attention, intermediate, output."""

    config: EncoderConfig
    dtype: Any

    def setup(self) -> None:
        """Declare the three parts."""
        self.attention = _Attention(self.config, self.dtype)
        self.intermediate = Intermediate(self.config, self.dtype)
        self.output = SumNorm(self.config, self.dtype)

    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        """Return (n, positions, dim); mask (n, positions)."""
        hidden = self.attention(hidden, mask, live)
        return self.output(self.intermediate(hidden), hidden, live)


class NumberedLayers(nn.Module):
    """Layers under the names "0", "1", ... as in the checkpoints.

    Attributes:
        layer: `(config, dtype) -> module`.
        config: of each; `num_hidden_layers` of them.
        dtype: of the computation.
    """

    layer: Callable[..., Any]
    config: EncoderConfig
    dtype: Any

    def setup(self) -> None:
        """Declare the layers."""
        count = self.config.num_hidden_layers
        self.layers = [self.layer(self.config, self.dtype, name=str(i)) for i in range(count)]

    def __call__(self, index: int, *inputs: Any) -> jax.Array:
        """Return what layer `index` gives."""
        return self.layers[index](*inputs)


class PostNormEncoder(nn.Module):
    """The layers of BERT under `layer/0`, `layer/1`, ..."""

    config: EncoderConfig
    dtype: Any

    def setup(self) -> None:
        """Declare the layers."""
        self.layer = NumberedLayers(PostNormLayer, self.config, self.dtype)

    def __call__(
        self, index: int, hidden: jax.Array, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        """Return the output of layer `index` (n, positions, dim)."""
        return self.layer(index, hidden, mask, live)


class Pooler(nn.Module):
    """Tanh of a dense layer on the first token."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return (n, dim)."""
        return jnp.tanh(dense(self.config.hidden_size, self.config, self.dtype)(tokens[:, 0]))
