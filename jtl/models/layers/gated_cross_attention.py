"""Gated cross-attention: words read images through gates that begin closed.

    words + tanh(a) attention(norm(words), images), then words + tanh(b) MLP(norm(words))

With a = b = 0, which training begins with, the words pass as they are.

Reference: Alayrac et al. 2022, arXiv:2204.14198, section 2.2; Laurençon et al. 2023,
arXiv:2306.16527 (gates of each channel, normalised queries and keys).
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jtl.models.layers.attention import attention
from jtl.models.layers.dense import flat_dot
from jtl.models.layers.dropout import Dropout
from jtl.models.layers.feed_forward import MLP, GatedMLP
from jtl.models.layers.norms import RMSNorm, layer_norm


class Seen(NamedTuple):
    """Which tokens of images a word reads.

    Attributes:
        bias: (n, 1, words, tokens), 0 where a word reads a token, else the lowest float32.
        gate: (n, words, 1), 0 where a word reads none, so that nothing is added to it.
    """

    bias: jax.Array
    gate: jax.Array


def seen_tokens(images: Bool[Array, "n words images"], per_image: int) -> Seen:
    """Return which tokens of images each word reads.

    Args:
        images: True where a word reads an image.
        per_image: tokens of an image.

    >>> seen = seen_tokens(jnp.array([[[False, False], [True, False]]]), 2)
    >>> (seen.bias[0, 0] == 0).tolist(), seen.gate.ravel().tolist()
    ([[False, False, False, False], [True, True, False, False]], [0.0, 1.0])
    """
    allowed = jnp.repeat(images, per_image, axis=2)[:, None]
    bias = jnp.where(allowed, 0.0, jnp.finfo(jnp.float32).min)
    return Seen(bias, jnp.any(images, axis=2, keepdims=True).astype(jnp.float32))


def image_before(ids: Int[Array, "n words"], image_token: int, images: int) -> Bool[Array, "n w i"]:
    """Return True where an image is the last one before a word, or stands at it.

    Args:
        ids: tokens, with `image_token` at the place of each image.
        image_token: which token stands for an image.
        images: of a row.

    >>> image_before(jnp.array([[5, 9, 5, 9]]), 9, 2)[0].astype(int).tolist()
    [[0, 0], [1, 0], [1, 0], [0, 1]]
    """
    last = jnp.cumsum(ids == image_token, axis=1)
    return last[:, :, None] == 1 + jnp.arange(images)[None, None, :]


class _Attention(nn.Module):
    """Attention of words to the tokens of images: leaves q_proj, k_proj, v_proj, o_proj."""

    heads: int
    size: int
    query_norm: bool
    epsilon: float
    dropout: float
    scale: float
    dtype: Any

    @nn.compact
    def __call__(
        self, words: jax.Array, images: jax.Array, bias: jax.Array | None, live: bool
    ) -> jax.Array:
        query = self._heads(words, "q_proj")
        key, value = self._heads(images, "k_proj"), self._heads(images, "v_proj")
        if self.query_norm:
            query = RMSNorm(self.epsilon, self.dtype, name="q_layer_norm")(query)
            key = RMSNorm(self.epsilon, self.dtype, name="k_layer_norm")(key)
        drop = None
        if live and self.dropout > 0:
            drop = Dropout(self.dropout, deterministic=False)
        # Not cuDNN: in 16 bits the bias would overflow.
        plain = None if bias is None or jax.default_backend() == "cpu" else "einsum"
        read = attention(query, key, value, bias=bias, dropout=drop, implementation=plain)
        return self._dense(words.shape[-1], "o_proj")(read.reshape(*words.shape[:2], -1))

    def _heads(self, x: jax.Array, name: str) -> jax.Array:
        made = self._dense(self.heads * self.size, name)(x)
        return made.reshape(*x.shape[:2], self.heads, self.size)

    def _dense(self, width: int, name: str) -> nn.Dense:
        init = nn.initializers.normal(self.scale)
        options: Any = dict(use_bias=False, kernel_init=init, dot_general=flat_dot)
        return nn.Dense(width, dtype=self.dtype, name=name, **options)


class GatedCrossAttention(nn.Module):
    """Cross-attention and MLP behind gates; the names are those of IDEFICS.

    Attributes:
        heads: of attention.
        size: width of a head.
        inner: width inside the MLP.
        act: activation of the MLP.
        gated: whether the MLP has a gate of its own (IDEFICS) or is plain (OpenFlamingo).
        centred: whether the norms are LayerNorm (OpenFlamingo) rather than by the root mean square.
        vector: whether each channel has a gate rather than all of them one.
        start: initial value of the gates, or, as `deviation`, that of a normal distribution.
        deviation: standard deviation of the gates around `start`.
        query_norm: whether queries and keys are normalised.
        epsilon: of the norms.
        dropout: of the attention probabilities and of what both halves add.
        scale: standard deviation of initial kernels.
        dtype: of the computation; parameters are float32.
    """

    heads: int
    size: int
    inner: int
    act: str = "silu"
    gated: bool = True
    centred: bool = False
    vector: bool = False
    start: float = 0.0
    deviation: float = 0.0
    query_norm: bool = False
    epsilon: float = 1e-6
    dropout: float = 0.0
    scale: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        words: Float[Array, "n words dim"],
        images: Float[Array, "n tokens width"] | None,
        seen: Seen | None = None,
        live: bool = False,
    ) -> Float[Array, "n words dim"]:
        """Return the words with what they read.

        Args:
            words: the residual stream of the language model.
            images: tokens of all images of a row; None where there are none, and then the MLP
                runs alone.
            seen: which tokens a word reads; None for all.
            live: whether dropout is on.
        """
        drop = Dropout(self.dropout, deterministic=not live)
        if images is not None:
            read = _Attention(
                *(self.heads, self.size, self.query_norm, self.epsilon),
                *(self.dropout, self.scale, self.dtype),
                name="cross_attn",
            )
            normal = self._norm("input_layernorm")(words)
            found = drop(read(normal, images, None if seen is None else seen.bias, live))
            if seen is not None:
                found = found * seen.gate.astype(found.dtype)
            words = words + self._gate("alpha_cross_attn", words.shape[-1]) * found
        options: Any = dict(bias=False, scale=self.scale, dtype=self.dtype, name="mlp")
        mlp = (GatedMLP if self.gated else MLP)(self.inner, self.act, **options)
        inner = drop(mlp(self._norm("post_attention_layernorm")(words)))
        return words + self._gate("alpha_dense", words.shape[-1]) * inner

    def _norm(self, name: str) -> nn.Module:
        if self.centred:
            return layer_norm(self.epsilon, self.dtype, name=name)
        return RMSNorm(self.epsilon, self.dtype, name=name)

    def _gate(self, name: str, dim: int) -> jax.Array:
        def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return self.start + self.deviation * jax.random.normal(key, shape)

        alpha = self.param(name, init, (1, 1, dim) if self.vector else (1,))
        return jnp.tanh(alpha).reshape(1, 1, -1).astype(self.dtype)
