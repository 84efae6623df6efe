"""MPNet: BERT's encoder with one table of relative places for all layers, RoBERTa's counting.

transformers has no Flax class of it, so the names are those of its PyTorch class. The table is a
leaf of the stem, which every block reads.

Reference: Song et al. 2020, arXiv:2004.09297; Raffel et al. 2020, arXiv:1910.10683 (the buckets).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import UNUSED, Batch, Family, Out, Rules, run_stages
from jtl.models.families.bert import POOLINGS, example
from jtl.models.families.roberta import LM_HEAD
from jtl.models.heads import pool
from jtl.models.heads.pretrained import (
    masked_lm,
    question_answering,
    token_classification,
    two_layer,
)
from jtl.models.layers import Dropout, attention, layer_norm
from jtl.models.layers.post_norm import (
    EncoderConfig,
    Intermediate,
    NumberedLayers,
    Pooler,
    SumNorm,
    dense,
    encoder_config,
)
from jtl.models.layers.relative_buckets import relative_buckets
from jtl.models.layers.skew import offsets, skew
from jtl.models.layers.token_embeddings import TokenEmbeddings, longest_text

_TABLE = "encoder/relative_attention_bias/.*"
_BUCKETS, _FARTHEST = 32, 128


class _SelfAttention(nn.Module):
    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, bias: jax.Array, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        config, width = self.config, self.config.hidden_size
        shape = (*hidden.shape[:-1], config.num_attention_heads, -1)
        query, key, value = (
            dense(width, config, self.dtype, name)(hidden).reshape(shape) for name in "qkv"
        )
        drop = None
        if live and config.attention_probs_dropout_prob > 0:
            drop = Dropout(config.attention_probs_dropout_prob, deterministic=False)
        # Not cuDNN beside a bias: the gradient of the bias has not been compared there.
        plain = None if jax.default_backend() == "cpu" else "einsum"
        read = attention(
            query, key, value, mask=mask, bias=bias, dropout=drop, implementation=plain
        )
        return dense(width, config, self.dtype, "o")(read.reshape(hidden.shape))


class _Attention(nn.Module):
    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, bias: jax.Array, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        config = self.config
        inner = _SelfAttention(config, self.dtype, name="attn")(hidden, bias, mask, live)
        drop = Dropout(config.hidden_dropout_prob, deterministic=not live)
        return layer_norm(config.layer_norm_eps, self.dtype, name="LayerNorm")(drop(inner) + hidden)


class _Layer(nn.Module):
    config: EncoderConfig
    dtype: Any

    def setup(self) -> None:
        self.attention = _Attention(self.config, self.dtype)
        self.intermediate = Intermediate(self.config, self.dtype)
        self.output = SumNorm(self.config, self.dtype)

    def __call__(
        self, hidden: jax.Array, bias: jax.Array, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        hidden = self.attention(hidden, bias, mask, live)
        return self.output(self.intermediate(hidden), hidden, live)


class _Encoder(nn.Module):
    config: EncoderConfig
    dtype: Any

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        self.layer = NumberedLayers(_Layer, config, self.dtype)
        self.relative_attention_bias = nn.Embed(
            _BUCKETS, config.num_attention_heads, dtype=jnp.float32, embedding_init=init
        )

    def __call__(
        self, index: int, hidden: jax.Array, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        return self.layer(index, hidden, self._bias(hidden.shape[1]), mask, live)

    def _bias(self, length: int) -> jax.Array:
        """Return what is added to the scores, (1, heads, queries, keys)."""
        buckets = relative_buckets(
            offsets(length), buckets=_BUCKETS, farthest=_FARTHEST, both_ways=True
        )
        by_offset = self.relative_attention_bias(jnp.asarray(buckets)).T[:, None, :]
        heads, _, columns = by_offset.shape
        return skew(jnp.broadcast_to(by_offset, (heads, length, columns)))[None]


class MPNet(nn.Module):
    """The MPNet encoder in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "pooler" (tanh of a dense layer on the first token),
            "cls" (the first token) or "mean" (over `attention_mask`).
        dtype: of the computation; parameters are float32.
    """

    config: EncoderConfig
    pooling: str = "pooler"
    dtype: Any = jnp.float32

    common = (_TABLE,)

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        self.embeddings = TokenEmbeddings(self.config, self.dtype)
        self.encoder = _Encoder(self.config, self.dtype)
        self.pooler = Pooler(self.config, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, positions, dim)."""
        return self.embeddings(batch, live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index` (n, positions, dim)."""
        mask = batch.get("attention_mask")
        return self.encoder(index, hidden, None if mask is None else jnp.asarray(mask), live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" and "pooled"; the pooler's weights exist under every pooling."""
        if self.pooling == "pooler" or self.is_initializing():
            pooled = self.pooler(hidden)
            if self.pooling == "pooler":
                return {"tokens": hidden, "pooled": pooled}
        return {"tokens": hidden, "pooled": pool({"tokens": hidden}, batch, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _config(config: Mapping[str, Any]) -> EncoderConfig:
    buckets = config.get("relative_attention_num_buckets", _BUCKETS)
    if buckets != _BUCKETS:
        raise ValueError(
            f"the MPNet config has relative_attention_num_buckets={buckets!r}; published MPNets, "
            f"and transformers whatever this field says, have {_BUCKETS}; correct the field"
        )
    # The padding token is 1 in transformers too, whatever the config says.
    fixed = {"type_vocab_size": 0, "embedding_size": None, "padding": 1}
    return encoder_config(config, "MPNet", fixed=fixed)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> MPNet:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not known to MPNet; give one of {POOLINGS}")
    return MPNet(_config(config), pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    layers = range(config["num_hidden_layers"])
    blocks = ((rf"encoder/layer/{i}/.*", f"block_{i}") for i in layers)
    top = "top" if pooling == "pooler" else UNUSED
    return ((f"embeddings/.*|{_TABLE}", "stem"), *blocks, ("pooler/.*", top))


MPNET = Family(
    model_type="mpnet",
    modality="text",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_size"],
    example=example,
    aliases=(("^mpnet[./]", ""), ("[.]gamma$", ".weight"), ("[.]beta$", ".bias")),
    optional=("pooler/.*",),
    ignored=(r"embeddings[.]position_ids", r"(lm_head|classifier|qa_outputs)[./].*"),
    class_name="MPNetModel",
    table="embeddings/word_embeddings/embedding",
    heads={
        "masked_lm": masked_lm("MPNetForMaskedLM", LM_HEAD, fixed={"activation": "gelu"}),
        "classification": two_layer("MPNetForSequenceClassification", "tanh"),
        "token_classification": token_classification("MPNetForTokenClassification"),
        "question_answering": question_answering("MPNetForQuestionAnswering"),
    },
    longest=lambda config: longest_text(_config(config)),
)
