"""BERT and its relatives (MiniLM, sentence transformers): encoder, pooler, names for its heads.

The tree of parameters is that of transformers' FlaxBertModel, so `flax_model.msgpack` loads as it
is and PyTorch checkpoints by the default rules. Stages: "stem" is the three embeddings, "block_i"
is `encoder/layer/i`, "top" is the pooler.

Reference: Devlin et al. 2018, arXiv:1810.04805; Wang et al. 2020, arXiv:2002.10957 (MiniLM).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import UNUSED, Batch, Family, Out, Rules, run_stages
from jtl.models.heads import pool
from jtl.models.heads.pretrained import classification, masked_lm
from jtl.models.layers import Dropout, SelfAttention, activation, flat_dot, layer_norm

POOLINGS = ("pooler", "cls", "mean")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The fields of `config.json` that the encoder reads, under their names there."""

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


def bert_config(config: Mapping[str, Any]) -> BertConfig:
    """Return the fields that the encoder reads, checked.

    Args:
        config: the dict of `config.json`; other fields are left alone.

    Raises:
        ValueError: a size is missing, the heads do not divide the width, the activation is not
            known, or the config asks for a variant that is not built here.

    >>> sizes = dict(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
    >>> bert_config(dict(sizes, intermediate_size=8, max_position_embeddings=5)).hidden_act
    'gelu'
    """
    fields = dataclasses.fields(BertConfig)
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [name for name in needed if config.get(name) is None]
    if missing:
        raise ValueError(
            f"the BERT config lacks {missing}; it has {sorted(config)}; "
            "add them, or correct model_type if the checkpoint is no BERT"
        )
    for name, only in (("position_embedding_type", "absolute"), ("is_decoder", False)):
        if config.get(name, only) not in (only, None):
            raise ValueError(
                f"the BERT config has {name}={config[name]!r}; the encoder here has "
                f"{only!r} alone; use a checkpoint of that kind"
            )
    own = {f.name: config[f.name] for f in fields if config.get(f.name) is not None}
    made = BertConfig(**own)
    if made.hidden_size % made.num_attention_heads:
        raise ValueError(
            f"num_attention_heads={made.num_attention_heads} does not divide "
            f"hidden_size={made.hidden_size}; give a number of heads that does"
        )
    activation(made.hidden_act)
    return made


def _dense(width: int, config: BertConfig, dtype: Any, name: str = "dense") -> nn.Dense:
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(width, dtype=dtype, kernel_init=init, dot_general=flat_dot, name=name)


def _norm(config: BertConfig, dtype: Any) -> nn.LayerNorm:
    return layer_norm(config.layer_norm_eps, dtype, name="LayerNorm")


class _Embeddings(nn.Module):
    """Sum of word, position and token type embeddings, LayerNorm, dropout."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, batch: Batch, live: bool) -> jax.Array:
        config = self.config
        ids = _ids(batch, config)
        types = batch.get("token_type_ids")
        types = jnp.zeros_like(ids) if types is None else jnp.asarray(types)
        positions = jnp.arange(ids.shape[1])[None, :]
        hidden = self._table("word_embeddings", config.vocab_size)(ids)
        hidden = hidden + self._table("token_type_embeddings", config.type_vocab_size)(types)
        places = self._table("position_embeddings", config.max_position_embeddings)(positions)
        hidden = _norm(config, self.dtype)(hidden + places)
        return Dropout(config.hidden_dropout_prob, deterministic=not live)(hidden)

    def _table(self, name: str, rows: int) -> nn.Embed:
        init = nn.initializers.normal(self.config.initializer_range)
        width = self.config.hidden_size
        # float32 whatever the dtype: the gradient of a row is a sum over all tokens that took it.
        return nn.Embed(rows, width, dtype=jnp.float32, embedding_init=init, name=name)


def _ids(batch: Batch, config: BertConfig) -> jax.Array:
    """Return `input_ids`, checked for what is static."""
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
    if ids.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"the texts have {ids.shape[1]} tokens; the model has "
            f"{config.max_position_embeddings} positions; truncate with max_length"
        )
    return ids


class _Output(nn.Module):
    """Dense, dropout, and LayerNorm of the sum with the residual stream."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, inner: jax.Array, residual: jax.Array, live: bool) -> jax.Array:
        inner = _dense(self.config.hidden_size, self.config, self.dtype)(inner)
        drop = Dropout(self.config.hidden_dropout_prob, deterministic=not live)
        return _norm(self.config, self.dtype)(drop(inner) + residual)


class _Attention(nn.Module):
    config: BertConfig
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
        self.output = _Output(config, self.dtype)

    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        return self.output(self.self(hidden, mask, live), hidden, live)


class _Intermediate(nn.Module):
    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        wide = _dense(self.config.intermediate_size, self.config, self.dtype)(hidden)
        return activation(self.config.hidden_act)(wide)


class _Layer(nn.Module):
    config: BertConfig
    dtype: Any

    def setup(self) -> None:
        self.attention = _Attention(self.config, self.dtype)
        self.intermediate = _Intermediate(self.config, self.dtype)
        self.output = _Output(self.config, self.dtype)

    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        hidden = self.attention(hidden, mask, live)
        return self.output(self.intermediate(hidden), hidden, live)


class _Layers(nn.Module):
    """The layers under the names "0", "1", ... as in the checkpoints."""

    config: BertConfig
    dtype: Any

    def setup(self) -> None:
        count = self.config.num_hidden_layers
        self.layers = [_Layer(self.config, self.dtype, name=str(i)) for i in range(count)]

    def __call__(
        self, index: int, hidden: jax.Array, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        return self.layers[index](hidden, mask, live)


class _Encoder(nn.Module):
    config: BertConfig
    dtype: Any

    def setup(self) -> None:
        self.layer = _Layers(self.config, self.dtype)

    def __call__(
        self, index: int, hidden: jax.Array, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        return self.layer(index, hidden, mask, live)


class _Pooler(nn.Module):
    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return jnp.tanh(_dense(self.config.hidden_size, self.config, self.dtype)(tokens[:, 0]))


class Bert(nn.Module):
    """The BERT encoder in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "pooler" (tanh of a dense layer on the first token),
            "cls" (the first token) or "mean" (over `attention_mask`).
        dtype: of the computation; parameters are float32.
    """

    config: BertConfig
    pooling: str = "pooler"
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        self.embeddings = _Embeddings(self.config, self.dtype)
        self.encoder = _Encoder(self.config, self.dtype)
        self.pooler = _Pooler(self.config, self.dtype)

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


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Bert:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not known to BERT; give one of {POOLINGS}")
    return Bert(bert_config(config), pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    layers = range(config["num_hidden_layers"])
    blocks = ((rf"encoder/layer/{i}/.*", f"block_{i}") for i in layers)
    top = "top" if pooling == "pooler" else UNUSED
    return (("embeddings/.*", "stem"), *blocks, ("pooler/.*", top))


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    length = min(4, config["max_position_embeddings"])
    ids = jnp.zeros((1, length), jnp.int32)
    return {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}


_MASKED_LM = (
    ("dense/kernel", "cls.predictions.transform.dense.weight", "dense"),
    ("dense/bias", "cls.predictions.transform.dense.bias", "same"),
    ("LayerNorm/scale", "cls.predictions.transform.LayerNorm.weight", "same"),
    ("LayerNorm/bias", "cls.predictions.transform.LayerNorm.bias", "same"),
    ("bias", "cls.predictions.bias", "same"),
)

BERT = Family(
    model_type="bert",
    modality="text",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_size"],
    example=_example,
    aliases=(("^bert[./]", ""), ("[.]gamma$", ".weight"), ("[.]beta$", ".bias")),
    optional=("pooler/.*",),
    ignored=(
        r"embeddings[.](position_ids|token_type_ids)",
        r"(cls|classifier|qa_outputs|dropout)[./].*",
    ),
    class_name="BertModel",
    table="embeddings/word_embeddings/embedding",
    heads={
        "masked_lm": masked_lm("BertForMaskedLM", _MASKED_LM),
        "classification": classification("BertForSequenceClassification", "pooler"),
    },
)
