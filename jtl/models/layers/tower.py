"""The transformer of CLIP's and SigLIP's towers: LayerNorm before attention and before the MLP.

The names of the leaves are those of transformers' FlaxCLIPModel. A layer reads the fields of a
tower's config under their names in `config.json`, so that any dataclass with these will do:
hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act,
attention_dropout, layer_norm_eps, initializer_range.

Reference: Radford et al. 2021, arXiv:2103.00020; the layer: Xiong et al. 2020, arXiv:2002.04745.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from jtl.models.layers.activations import activation
from jtl.models.layers.attention import attention
from jtl.models.layers.dense import flat_dot
from jtl.models.layers.dropout import Dropout
from jtl.models.layers.norms import layer_norm


def tower_fields(made: type, config: Mapping[str, Any], name: str) -> Any:
    """Return a frozen dataclass filled from a config, with what every tower has checked.

    Args:
        made: the dataclass; its fields bear the names of the config.
        config: the dict of a tower.
        name: of the tower, for errors.

    Raises:
        ValueError: a size is missing, the heads do not divide the width, or the activation is not
            known.
    """
    fields = dataclasses.fields(made)
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [field for field in needed if config.get(field) is None]
    if missing:
        raise ValueError(
            f"the config of {name} lacks {missing}; it has {sorted(config)}; add them, or correct "
            "model_type if the checkpoint is of another kind"
        )
    own = made(**{f.name: config[f.name] for f in fields if config.get(f.name) is not None})
    if own.hidden_size % own.num_attention_heads:
        raise ValueError(
            f"num_attention_heads={own.num_attention_heads} does not divide "
            f"hidden_size={own.hidden_size} of {name}; give a number of heads that does"
        )
    activation(own.hidden_act)
    return own


def _dense(width: int, config: Any, dtype: Any) -> nn.Dense:
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(width, dtype=dtype, kernel_init=init, dot_general=flat_dot)


class TowerAttention(nn.Module):
    """Multi-head self-attention: leaves q_proj, k_proj, v_proj, out_proj.

    Attributes:
        config: sizes and rates.
        causal: whether a position sees those before it alone.
        dtype: of the computation; parameters are float32.
    """

    config: Any
    causal: bool
    dtype: Any

    def setup(self) -> None:
        """Declare the four projections."""
        width = self.config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            _dense(width, self.config, self.dtype) for _ in range(4)
        )
        self.dropout = Dropout(self.config.attention_dropout)

    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        """Return (n, positions, dim) from hidden (n, positions, dim) and mask (n, positions)."""
        config = self.config
        heads = config.num_attention_heads
        shape = (*hidden.shape[:-1], heads, config.hidden_size // heads)
        query, key, value = (
            project(hidden).reshape(shape) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        drop = self.dropout if live and config.attention_dropout > 0 else None
        seen = attention(query, key, value, mask=mask, causal=self.causal, dropout=drop)
        return self.out_proj(seen.reshape(hidden.shape))


class TowerMLP(nn.Module):
    """Two dense layers with an activation between: leaves fc1, fc2."""

    config: Any
    dtype: Any

    def setup(self) -> None:
        """Declare both layers."""
        self.fc1 = _dense(self.config.intermediate_size, self.config, self.dtype)
        self.fc2 = _dense(self.config.hidden_size, self.config, self.dtype)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Return an array of the input's shape."""
        return self.fc2(activation(self.config.hidden_act)(self.fc1(hidden)))


class TowerLayer(nn.Module):
    """Attention, then MLP, each behind a LayerNorm and added to the residual stream."""

    config: Any
    causal: bool
    dtype: Any

    def setup(self) -> None:
        """Declare both halves and their norms."""
        self.self_attn = TowerAttention(self.config, self.causal, self.dtype)
        self.mlp = TowerMLP(self.config, self.dtype)
        self.layer_norm1 = layer_norm(self.config.layer_norm_eps, self.dtype)
        self.layer_norm2 = layer_norm(self.config.layer_norm_eps, self.dtype)

    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        """Return (n, positions, dim)."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), mask, live)
        return hidden + self.mlp(self.layer_norm2(hidden))


class _Layers(nn.Module):
    """The layers under the names "0", "1", ... as in the checkpoints."""

    config: Any
    causal: bool
    dtype: Any

    def setup(self) -> None:
        count = self.config.num_hidden_layers
        self.items = [
            TowerLayer(self.config, self.causal, self.dtype, name=str(i)) for i in range(count)
        ]

    def __call__(
        self, index: int, hidden: jax.Array, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        return self.items[index](hidden, mask, live)


class TowerEncoder(nn.Module):
    """The layers of a tower, to be called one by one: leaves layers/0, layers/1, ...

    Attributes:
        config: sizes and rates.
        causal: whether a position sees those before it alone.
        dtype: of the computation; parameters are float32.
    """

    config: Any
    causal: bool = False
    dtype: Any = None

    def setup(self) -> None:
        """Declare the layers."""
        self.layers = _Layers(self.config, self.causal, self.dtype)

    def __call__(
        self, index: int, hidden: jax.Array, mask: jax.Array | None = None, live: bool = False
    ) -> jax.Array:
        """Return the output of layer `index` (n, positions, dim)."""
        return self.layers(index, hidden, mask, live)
