"""Embeddings of tokens: words, places and kinds added up, LayerNorm, dropout."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jtl.models.layers.dropout import Dropout
from jtl.models.layers.norms import layer_norm
from jtl.models.layers.post_norm import EncoderConfig


def positions_of(
    ids: Int[Array, "n length"], padding: int | None = None
) -> Int[Array, "#n length"]:
    """Return the row of each token in the table of places.

    Args:
        ids: of tokens.
        padding: None counts places from 0. Else, as RoBERTa does, the tokens that are no padding
            are counted from padding + 1, and padding itself has the row `padding`.

    >>> positions_of(jnp.array([[5, 6, 1, 1]])).tolist()
    [[0, 1, 2, 3]]
    >>> positions_of(jnp.array([[5, 6, 1, 1]]), padding=1).tolist()
    [[2, 3, 1, 1]]
    """
    if padding is None:
        return jnp.arange(ids.shape[1])[None, :]
    real = (ids != padding).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + padding


def longest_text(config: EncoderConfig) -> int:
    """Return how many tokens the table of places has rows for.

    >>> sizes = dict(hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
    >>> sizes = dict(sizes, vocab_size=9, intermediate_size=8, max_position_embeddings=514)
    >>> longest_text(EncoderConfig(**sizes)), longest_text(EncoderConfig(**sizes, padding=1))
    (514, 512)
    """
    before = 0 if config.padding is None else config.padding + 1
    return config.max_position_embeddings - before


def token_ids(batch: Mapping[str, Any], limit: int | None = None) -> jax.Array:
    """Return the column `input_ids`, checked for what is static.

    Args:
        batch: raw columns.
        limit: how many tokens a text may have; None for any number.

    Raises:
        ValueError: there is no such column, it is of another kind, or the texts are too long.
    """
    if "input_ids" not in batch:
        raise ValueError(
            f"the batch has no column 'input_ids'; it has {sorted(batch)}; "
            "make batches with backbone.inputs(texts)"
        )
    ids = jnp.asarray(batch["input_ids"])
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"'input_ids' is {ids.dtype}{ids.shape}; it must hold whole numbers in (n, length); "
            "make batches with backbone.inputs(texts)"
        )
    if limit is not None and ids.shape[1] > limit:
        raise ValueError(
            f"the texts have {ids.shape[1]} tokens; the model has "
            f"{limit} positions; truncate with max_length"
        )
    return ids


class TokenEmbeddings(nn.Module):
    """Sum of word, place and, where there are any, token type embeddings; LayerNorm; dropout."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, batch: Mapping[str, Any], live: bool) -> jax.Array:
        """Return (n, positions, embedding_size)."""
        config = self.config
        ids = token_ids(batch, longest_text(config))
        hidden = self._table("word_embeddings", config.vocab_size)(ids)
        if config.type_vocab_size:
            types = batch.get("token_type_ids")
            types = jnp.zeros_like(ids) if types is None else jnp.asarray(types)
            hidden += self._table("token_type_embeddings", config.type_vocab_size)(types)
        places = self._table("position_embeddings", config.max_position_embeddings)
        hidden = hidden + places(positions_of(ids, config.padding))
        hidden = layer_norm(config.layer_norm_eps, self.dtype, name="LayerNorm")(hidden)
        return Dropout(config.hidden_dropout_prob, deterministic=not live)(hidden)

    def _table(self, name: str, rows: int) -> nn.Embed:
        init = nn.initializers.normal(self.config.initializer_range)
        width = self.config.embedding_size or self.config.hidden_size
        # float32 whatever the dtype: the gradient of a row is a sum over all tokens that took it.
        return nn.Embed(rows, width, dtype=jnp.float32, embedding_init=init, name=name)
