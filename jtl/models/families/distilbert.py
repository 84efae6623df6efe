"""DistilBERT: BERT's computation in half the layers, under names of its own and without a pooler.

The tree of parameters is that of transformers' FlaxDistilBertModel. The table of places is read
from the checkpoint, also where it was made of sines.

Reference: Sanh et al. 2019, arXiv:1910.01108.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch, Family, Out, Rules, run_stages
from jtl.models.families.bert import example
from jtl.models.heads import pool
from jtl.models.heads.pretrained import (
    masked_lm,
    question_answering,
    token_classification,
    two_layer,
)
from jtl.models.layers import Dropout, activation, attention, layer_norm
from jtl.models.layers.post_norm import EncoderConfig, NumberedLayers, dense, encoder_config
from jtl.models.layers.token_embeddings import TokenEmbeddings

POOLINGS = ("cls", "mean")
_EPSILON = 1e-12
_SPELLED = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
_FIXED = {"type_vocab_size": 0, "layer_norm_eps": _EPSILON, "embedding_size": None}


class _Attention(nn.Module):
    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        config, width = self.config, self.config.hidden_size
        shape = (*hidden.shape[:-1], config.num_attention_heads, -1)
        query, key, value = (
            dense(width, config, self.dtype, name)(hidden).reshape(shape)
            for name in ("q_lin", "k_lin", "v_lin")
        )
        drop = None
        if live and config.attention_probs_dropout_prob > 0:
            drop = Dropout(config.attention_probs_dropout_prob, deterministic=False)
        read = attention(query, key, value, mask=mask, dropout=drop).reshape(hidden.shape)
        return dense(width, config, self.dtype, "out_lin")(read)


class _FeedForward(nn.Module):
    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, live: bool) -> jax.Array:
        config = self.config
        wide = dense(config.intermediate_size, config, self.dtype, "lin1")(hidden)
        wide = activation(config.hidden_act)(wide)
        inner = dense(config.hidden_size, config, self.dtype, "lin2")(wide)
        return Dropout(config.hidden_dropout_prob, deterministic=not live)(inner)


class _Layer(nn.Module):
    config: EncoderConfig
    dtype: Any

    def setup(self) -> None:
        self.attention = _Attention(self.config, self.dtype)
        self.sa_layer_norm = layer_norm(_EPSILON, self.dtype)
        self.ffn = _FeedForward(self.config, self.dtype)
        self.output_layer_norm = layer_norm(_EPSILON, self.dtype)

    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        hidden = self.sa_layer_norm(self.attention(hidden, mask, live) + hidden)
        return self.output_layer_norm(self.ffn(hidden, live) + hidden)


class _Transformer(nn.Module):
    config: EncoderConfig
    dtype: Any

    def setup(self) -> None:
        self.layer = NumberedLayers(_Layer, self.config, self.dtype)

    def __call__(
        self, index: int, hidden: jax.Array, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        return self.layer(index, hidden, mask, live)


class DistilBert(nn.Module):
    """The DistilBERT encoder in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates, under BERT's names.
        pooling: what `out["pooled"]` is: "cls" (the first token) or "mean" (over `attention_mask`).
        dtype: of the computation; parameters are float32.
    """

    config: EncoderConfig
    pooling: str = "cls"
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the embeddings and the layers."""
        self.embeddings = TokenEmbeddings(self.config, self.dtype)
        self.transformer = _Transformer(self.config, self.dtype)

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
        return self.transformer(index, hidden, None if mask is None else jnp.asarray(mask), live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" and "pooled"."""
        return {"tokens": hidden, "pooled": pool({"tokens": hidden}, batch, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> DistilBert:
    if pooling not in POOLINGS:
        raise ValueError(
            f"pooling {pooling!r} is not known to DistilBERT, which has no pooler; "
            f"give one of {POOLINGS}"
        )
    made = encoder_config(config, "DistilBERT", spelled=_SPELLED, fixed=_FIXED)
    return DistilBert(made, pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    layers = range(config["n_layers"])
    blocks = ((rf"transformer/layer/{i}/.*", f"block_{i}") for i in layers)
    return (("embeddings/.*", "stem"), *blocks)


_MASKED_LM = (
    ("dense/kernel", "vocab_transform.weight", "dense"),
    ("dense/bias", "vocab_transform.bias", "same"),
    ("LayerNorm/scale", "vocab_layer_norm.weight", "same"),
    ("LayerNorm/bias", "vocab_layer_norm.bias", "same"),
    ("bias", "vocab_projector.bias", "same"),
)

DISTILBERT = Family(
    model_type="distilbert",
    modality="text",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["dim"],
    example=example,
    aliases=(("^distilbert[./]", ""), ("[.]gamma$", ".weight"), ("[.]beta$", ".bias")),
    ignored=(
        r"embeddings[.]position_ids",
        r"(vocab_transform|vocab_layer_norm|vocab_projector)[./].*",
        r"(pre_classifier|classifier|qa_outputs)[./].*",
    ),
    class_name="DistilBertModel",
    table="embeddings/word_embeddings/embedding",
    heads={
        "masked_lm": masked_lm(
            "DistilBertForMaskedLM",
            _MASKED_LM,
            dim="dim",
            hidden_act="activation",
            fixed={"epsilon": _EPSILON},
        ),
        "classification": two_layer(
            "DistilBertForSequenceClassification",
            "relu",
            ("pre_classifier", "classifier"),
            first=False,
        ),
        "token_classification": token_classification("DistilBertForTokenClassification"),
        "question_answering": question_answering("DistilBertForQuestionAnswering"),
    },
)
