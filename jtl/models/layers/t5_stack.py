"""The stacks of T5: pre-norm blocks without biases, whose attention sees relative positions.

Scores are not divided by the root of their size; one table of relative positions, which lies in
block 0, serves all blocks of a stack. The names of the leaves are those of FlaxT5Model.

Reference: Raffel et al. 2020, arXiv:1910.10683, section 2.1; the gated layer: Shazeer 2020,
arXiv:2002.05202.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.layers.activations import activation
from jtl.models.layers.attention import attention
from jtl.models.layers.dense import flat_dot
from jtl.models.layers.dropout import Dropout
from jtl.models.layers.norms import RMSNorm
from jtl.models.layers.relative_buckets import relative_buckets
from jtl.models.layers.skew import offsets, skew


class T5Sizes(NamedTuple):
    """Sizes and rates of one stack.

    Attributes:
        dim: width of the stream.
        size: width of a head; heads times size need not be `dim`.
        heads: number of heads.
        inner: width of the feed-forward layer.
        blocks: number of blocks.
        decoder: whether attention is causal and each block reads the encoder too.
        gated: whether the feed-forward layer has a gate.
        activation: a name of `layers.ACTIVATIONS`.
        buckets: of relative positions.
        farthest: distance from which on all positions are one bucket.
        dropout: rate of every dropout.
        epsilon: of the norms.
        start: factor of the initial values.
    """

    dim: int
    size: int
    heads: int
    inner: int
    blocks: int
    decoder: bool
    gated: bool
    activation: str
    buckets: int = 32
    farthest: int = 128
    dropout: float = 0.1
    epsilon: float = 1e-6
    start: float = 1.0


def _dense(
    width: int, fan_in: int, sizes: T5Sizes, dtype: Any, name: str | None = None
) -> nn.Dense:
    init = nn.initializers.normal(sizes.start * fan_in**-0.5)
    return nn.Dense(
        width, use_bias=False, dtype=dtype, kernel_init=init, dot_general=flat_dot, name=name
    )


class _Attention(nn.Module):
    sizes: T5Sizes
    dtype: Any
    relative: bool = False
    causal: bool = False

    def setup(self) -> None:
        sizes = self.sizes
        width = sizes.heads * sizes.size
        self.q = _dense(width, sizes.dim * sizes.size, sizes, self.dtype)
        self.k = _dense(width, sizes.dim, sizes, self.dtype)
        self.v = _dense(width, sizes.dim, sizes, self.dtype)
        self.o = _dense(sizes.dim, width, sizes, self.dtype)
        self.drop = Dropout(sizes.dropout)
        if self.relative:
            init = nn.initializers.normal(sizes.start * sizes.dim**-0.5)
            self.relative_attention_bias = nn.Embed(sizes.buckets, sizes.heads, embedding_init=init)

    def bias(self, length: int) -> jax.Array:
        """Return what the table adds to the scores, (1, heads, length, length)."""
        rows = relative_buckets(
            offsets(length),
            buckets=self.sizes.buckets,
            farthest=self.sizes.farthest,
            both_ways=not self.causal,
        )
        values = self.relative_attention_bias.embedding[rows].T[None, :, None, :]
        return skew(jnp.broadcast_to(values, (1, self.sizes.heads, length, 2 * length)))

    def __call__(
        self,
        hidden: jax.Array,
        seen: jax.Array,
        mask: jax.Array | None,
        bias: jax.Array | None,
        live: bool,
    ) -> jax.Array:
        """Return (n, positions, dim); seen (n, keys, dim) is what is attended to."""
        query, key, value = self._heads(self.q(hidden)), self.k(seen), self.v(seen)
        # Not cuDNN beside a bias: the gradient of the bias has not been compared there.
        plain = bias is not None and jax.default_backend() != "cpu"
        found = attention(
            *(query, self._heads(key), self._heads(value)),
            mask=mask,
            bias=bias,
            causal=self.causal,
            scale=1.0,
            dropout=self.drop if live and self.sizes.dropout > 0 else None,
            implementation="einsum" if plain else None,
        )
        return self.o(found.reshape(*hidden.shape[:-1], -1))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.sizes.heads, self.sizes.size)


class _FeedForward(nn.Module):
    """The two or three dense layers; the last one in float32, as its sums overflow 16 bits."""

    sizes: T5Sizes
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, live: bool) -> jax.Array:
        sizes = self.sizes
        names = ("wi_0", "wi_1") if sizes.gated else ("wi",)
        wide, *linear = (
            _dense(sizes.inner, sizes.dim, sizes, self.dtype, name)(hidden) for name in names
        )
        wide = activation(sizes.activation)(wide)
        wide = wide * linear[0] if linear else wide
        wide = Dropout(sizes.dropout, deterministic=not live)(wide)
        return _dense(sizes.dim, sizes.inner, sizes, jnp.float32, "wo")(wide)


class _Part(nn.Module):
    """One layer of a block: norm, attention or feed-forward layer, dropout, sum."""

    sizes: T5Sizes
    dtype: Any
    kind: str
    relative: bool = False

    def setup(self) -> None:
        sizes, dtype = self.sizes, self.dtype
        self.layer_norm = RMSNorm(sizes.epsilon, dtype)
        self.drop = Dropout(sizes.dropout)
        if self.kind == "SelfAttention":
            self.SelfAttention = _Attention(sizes, dtype, self.relative, causal=sizes.decoder)
        elif self.kind == "EncDecAttention":
            self.EncDecAttention = _Attention(sizes, dtype)
        else:
            self.DenseReluDense = _FeedForward(sizes, dtype)

    def __call__(
        self,
        hidden: jax.Array,
        mask: jax.Array | None,
        seen: jax.Array | None,
        bias: jax.Array | None,
        live: bool,
    ) -> jax.Array:
        inner = self.layer_norm(hidden)
        if self.kind == "SelfAttention":
            found = self.SelfAttention(inner, inner, mask, bias, live)
        elif self.kind == "EncDecAttention":
            assert seen is not None, "a decoder's block is called with what the encoder gave"
            found = self.EncDecAttention(inner, seen, mask, None, live)
        else:
            found = self.DenseReluDense(inner, live)
        found = self.drop(found) if live else found
        return (hidden.astype(found.dtype) + found).astype(self.dtype)


class _Parts(nn.Module):
    """The layers of a block under the names "0", "1", and "2" in a decoder."""

    sizes: T5Sizes
    dtype: Any
    relative: bool

    def setup(self) -> None:
        kinds = ["SelfAttention", *["EncDecAttention"] * self.sizes.decoder, "DenseReluDense"]
        self.parts = [
            _Part(self.sizes, self.dtype, kind, self.relative and not i, name=str(i))
            for i, kind in enumerate(kinds)
        ]


class _Block(nn.Module):
    sizes: T5Sizes
    dtype: Any
    relative: bool

    def setup(self) -> None:
        self.layer = _Parts(self.sizes, self.dtype, self.relative)


class _Blocks(nn.Module):
    """The blocks under the names "0", "1", ...; the first one has the table."""

    sizes: T5Sizes
    dtype: Any

    def setup(self) -> None:
        self.blocks = [
            _Block(self.sizes, self.dtype, relative=not i, name=str(i))
            for i in range(self.sizes.blocks)
        ]


class T5Stack(nn.Module):
    """The blocks of the encoder or of the decoder, and the norm at their end.

    Attributes:
        sizes: sizes and rates.
        dtype: of the computation; parameters are float32.
    """

    sizes: T5Sizes
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare blocks, norm and dropout."""
        self.block = _Blocks(self.sizes, self.dtype)
        self.final_layer_norm = RMSNorm(self.sizes.epsilon, self.dtype)
        self.drop = Dropout(self.sizes.dropout)

    def __call__(
        self,
        index: int,
        hidden: jax.Array,
        mask: jax.Array | None,
        seen: jax.Array | None = None,
        seen_mask: jax.Array | None = None,
        *,
        live: bool = False,
    ) -> jax.Array:
        """Return the output of block `index`.

        Args:
            index: of the block.
            hidden: (n, positions, dim).
            mask: (n, positions), 1 or True at real positions.
            seen: what the encoder gave (n, its positions, dim), for a decoder.
            seen_mask: (n, its positions).
            live: whether there is dropout.
        """
        parts = self.block.blocks[index].layer.parts
        first = self.block.blocks[0].layer.parts[0].SelfAttention
        hidden = parts[0](hidden, mask, None, first.bias(hidden.shape[1]), live)
        for part in parts[1:]:
            hidden = part(hidden, seen_mask, seen, None, live)
        return hidden

    def end(self, hidden: jax.Array, live: bool = False) -> jax.Array:
        """Return the norm of what the last block gave."""
        hidden = self.final_layer_norm(hidden)
        return self.drop(hidden) if live else hidden
