"""A layer of ViT as timm has it: query, key and value in one, under timm's names.

`norm1`, `attn/qkv`, `attn/proj`, `norm2`, `mlp/fc1`, `mlp/fc2`: for families that are published in
no other layout.

Reference: Dosovitskiy et al. 2020, arXiv:2010.11929.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.layers.activations import activation
from jtl.models.layers.attention import attention
from jtl.models.layers.norms import layer_norm
from jtl.models.layers.vit_encoder import dense


class TimmBlock(nn.Module):
    """Attention, then MLP, each behind a LayerNorm and added to the residual stream.

    Attributes:
        dim: width.
        heads: of attention, a divisor of `dim`.
        inner: width of the MLP.
        epsilon: of the LayerNorms.
        drop_path: rate of stochastic depth where live.
        scale: standard deviation of the initial kernels.
        dtype: of the computation; parameters are float32.
    """

    dim: int
    heads: int
    inner: int
    epsilon: float = 1e-6
    drop_path: float = 0.0
    scale: float = 0.02
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the two branches and their norms."""
        self.norm1 = layer_norm(self.epsilon, self.dtype)
        self.attn = _Attention(self.dim, self.heads, self.scale, self.dtype)
        self.norm2 = layer_norm(self.epsilon, self.dtype)
        self.mlp = _MLP(self.dim, self.inner, self.scale, self.dtype)
        self.drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2))

    def __call__(self, hidden: jax.Array, live: bool) -> jax.Array:
        """Return (n, positions, dim)."""
        hidden = hidden + self.drop(self.attn(self.norm1(hidden)), deterministic=not live)
        return hidden + self.drop(self.mlp(self.norm2(hidden)), deterministic=not live)


class _Attention(nn.Module):
    dim: int
    heads: int
    scale: float
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        fused = dense(3 * self.dim, self.scale, self.dtype, "qkv")(hidden)
        shape = (*hidden.shape[:2], 3, self.heads, self.dim // self.heads)
        query, key, value = (fused.reshape(shape)[:, :, i] for i in range(3))
        read = attention(query, key, value).reshape(hidden.shape)
        return dense(self.dim, self.scale, self.dtype, "proj")(read)


class _MLP(nn.Module):
    dim: int
    inner: int
    scale: float
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        wide = activation("gelu")(dense(self.inner, self.scale, self.dtype, "fc1")(hidden))
        return dense(self.dim, self.scale, self.dtype, "fc2")(wide)
