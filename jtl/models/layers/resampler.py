"""The Perceiver resampler: a fixed number of trained vectors reads the tokens of an image.

Reference: Alayrac et al. 2022, arXiv:2204.14198, section 2.1; Jaegle et al. 2021, arXiv:2103.03206.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.layers.activations import activation
from jtl.models.layers.attention import attention
from jtl.models.layers.dense import flat_dot
from jtl.models.layers.nest import Nest
from jtl.models.layers.norms import layer_norm

EPSILON = 1e-5


def _dense(width: int, scale: float, dtype: Any, name: str) -> nn.Dense:
    init = nn.initializers.normal(scale)
    options: Any = dict(use_bias=False, dtype=dtype, kernel_init=init, dot_general=flat_dot)
    return nn.Dense(width, name=name, **options)


class _Attention(nn.Module):
    """The latents attend to the tokens and to themselves."""

    heads: int
    size: int
    query_norm: bool
    scale: float
    dtype: Any

    @nn.compact
    def __call__(self, latents: jax.Array, tokens: jax.Array) -> jax.Array:
        tokens = layer_norm(EPSILON, self.dtype, name="context_layer_norm")(tokens)
        normal = layer_norm(EPSILON, self.dtype, name="latents_layer_norm")(latents)
        both = jnp.concatenate([tokens, normal], axis=1)
        query = self._heads(normal, "q_proj")
        key, value = self._heads(both, "k_proj"), self._heads(both, "v_proj")
        if self.query_norm:
            query = layer_norm(EPSILON, self.dtype, name="q_layer_norm")(query)
            key = layer_norm(EPSILON, self.dtype, name="k_layer_norm")(key)
        read = attention(query, key, value).reshape(*latents.shape[:2], -1)
        return _dense(latents.shape[-1], self.scale, self.dtype, "output_proj")(read)

    def _heads(self, x: jax.Array, name: str) -> jax.Array:
        made = _dense(self.heads * self.size, self.scale, self.dtype, name)(x)
        return made.reshape(*x.shape[:2], self.heads, self.size)


class _MLP(nn.Module):
    """LayerNorm, then two dense layers with an activation between, four times as wide."""

    act: str
    scale: float
    dtype: Any

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        width = latents.shape[-1]
        normal = layer_norm(EPSILON, self.dtype, name="ln")(latents)
        inner = activation(self.act)(_dense(4 * width, self.scale, self.dtype, "fc")(normal))
        return _dense(width, self.scale, self.dtype, "c_proj")(inner)


class Resampler(nn.Module):
    """Tokens (n, positions, dim) of images to (n, latents, dim), whatever their number.

    Attributes:
        latents: number of trained vectors.
        depth: number of layers, each attention and MLP.
        heads: of attention.
        size: width of a head.
        act: activation of the MLPs.
        query_norm: whether queries and keys are normalised.
        scale: standard deviation of initial kernels.
        dtype: of the computation; parameters are float32.
    """

    latents: int
    depth: int
    heads: int
    size: int
    act: str = "relu"
    query_norm: bool = False
    scale: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return what the latents have read, normalised."""
        rows, _, dim = tokens.shape
        first = self.param("latents", nn.initializers.normal(1.0), (self.latents, dim))
        latents = jnp.broadcast_to(first[None].astype(self.dtype), (rows, *first.shape))
        read = functools.partial(
            *(_Attention, self.heads, self.size, self.query_norm, self.scale, self.dtype)
        )
        mlp = functools.partial(_MLP, self.act, self.scale, self.dtype)
        halves = (("0", read), ("1", mlp))
        parts = tuple((f"{i}/{half}", made) for i in range(self.depth) for half, made in halves)
        blocks = Nest(parts, name="blocks")
        for i in range(self.depth):
            latents = latents + blocks(f"{i}/0", latents, tokens)
            latents = latents + blocks(f"{i}/1", latents)
        return layer_norm(EPSILON, self.dtype, name="layer_norm")(latents)
