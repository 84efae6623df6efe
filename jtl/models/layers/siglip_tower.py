"""The image tower of SigLIP: patches, layers, and a learned query that attends to all of them.

Reference: Zhai et al. 2023, arXiv:2303.15343; the pooling: Lee et al. 2018, arXiv:1810.00825.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch
from jtl.models.layers.attention import attention
from jtl.models.layers.clip_towers import sides
from jtl.models.layers.dense import flat_dot
from jtl.models.layers.norms import layer_norm
from jtl.models.layers.patches import grid
from jtl.models.layers.pixels import pixels
from jtl.models.layers.tower import TowerEncoder, TowerMLP


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig:
    """The fields of `vision_config` that the tower reads, under their names there."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int | tuple[int, int]
    patch_size: int
    num_channels: int = 3
    hidden_act: str = "gelu_pytorch_tanh"
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    vision_use_head: bool = True

    @property
    def positions(self) -> int:
        """Number of tokens of an image: one for each patch."""
        return math.prod(grid(sides(self.image_size), sides(self.patch_size)))


class _Embeddings(nn.Module):
    """Patches with positions added; there is no token of the whole image."""

    config: SiglipVisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        config, width = self.config, self.config.hidden_size
        init = nn.initializers.normal(config.initializer_range)
        side = (config.patch_size, config.patch_size)
        conv = nn.Conv(
            *(width, side, side, "VALID"),
            dtype=self.dtype,
            kernel_init=init,
            name="patch_embedding",
        )
        patches = conv(images.astype(self.dtype)).reshape(len(images), -1, width)
        places = nn.Embed(config.positions, width, embedding_init=init, name="position_embedding")
        # Added in float32 whatever the dtype: their gradients are sums over all rows.
        hidden = patches.astype(jnp.float32) + places(jnp.arange(config.positions)[None, :])
        return hidden.astype(self.dtype)


class _PoolingAttention(nn.Module):
    """Attention of one query to all tokens, its three projections in one kernel."""

    config: SiglipVisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, query: jax.Array, tokens: jax.Array) -> jax.Array:
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        init = nn.initializers.normal(self.config.initializer_range)
        fused = nn.Dense(
            3 * width, dtype=self.dtype, kernel_init=init, dot_general=flat_dot, name="in_proj"
        )
        # One product over the query and the tokens: the kernel is one array in the checkpoints.
        parts = fused(jnp.concatenate([query, tokens], axis=1))
        split = parts.reshape(*parts.shape[:2], 3, heads, width // heads)
        seen = attention(split[:, :1, 0], split[:, 1:, 1], split[:, 1:, 2])
        out = nn.Dense(
            width, dtype=self.dtype, kernel_init=init, dot_general=flat_dot, name="out_proj"
        )
        return out(seen.reshape(query.shape))


class _AttentionPooling(nn.Module):
    """One vector for each image: a learned query attends to its tokens, then an MLP."""

    config: SiglipVisionConfig
    dtype: Any

    def setup(self) -> None:
        init = nn.initializers.normal(self.config.initializer_range)
        self.probe = self.param("probe", init, (1, 1, self.config.hidden_size))
        self.attention = _PoolingAttention(self.config, self.dtype)
        self.layernorm = layer_norm(self.config.layer_norm_eps, self.dtype)
        self.mlp = TowerMLP(self.config, self.dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        shape = (len(tokens), 1, tokens.shape[-1])
        pooled = self.attention(jnp.broadcast_to(self.probe, shape).astype(self.dtype), tokens)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class SiglipVisionTower(nn.Module):
    """The image tower with its final norm and its pooling."""

    config: SiglipVisionConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare embeddings, layers, the final norm and the pooling, where it has one."""
        self.embeddings = _Embeddings(self.config, self.dtype)
        self.encoder = TowerEncoder(self.config, dtype=self.dtype)
        self.post_layernorm = layer_norm(self.config.layer_norm_eps, self.dtype)
        if self.config.vision_use_head:
            self.head = _AttentionPooling(self.config, self.dtype)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.config.num_hidden_layers

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.config.hidden_size

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, patches, width)."""
        size = sides(self.config.image_size)
        return self.embeddings(pixels(batch, self.config.num_channels, size))

    def layer(self, index: int, hidden: jax.Array, batch: Batch, live: bool) -> jax.Array:
        """Return the output of layer `index`."""
        return self.encoder(index, hidden, None, live)

    def final(self, hidden: jax.Array) -> jax.Array:
        """Return the tokens behind the final norm."""
        return self.post_layernorm(hidden)

    def pooled(self, tokens: jax.Array) -> jax.Array:
        """Return one vector for each image (n, width)."""
        return self.head(tokens)
