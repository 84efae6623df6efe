"""DeBERTa v2 and v3: disentangled attention over words and relative places.

A score is the sum of three products: of the two words, of the query's word with the relative place
(c2p), and of the key's word with it (p2c). The table of relative places, `encoder/rel_embeddings`,
serves all blocks, so it is labelled "stem". The names are those of transformers' DebertaV2Model.

Reference: He et al. 2020, arXiv:2006.03654; He et al. 2021, arXiv:2111.09543 (v3).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Backbone, Batch, Family, Out, Rules, run_stages
from jtl.models.heads import TwoLayer, pool
from jtl.models.heads.pretrained import (
    masked_lm,
    question_answering,
    token_classification,
    two_layer,
)
from jtl.models.layers import Dropout, activation, flat_dot, layer_norm
from jtl.models.layers.disentangled import DisentangledAttention, RelativePlaces
from jtl.models.layers.post_norm import EncoderConfig, Intermediate, NumberedLayers, SumNorm
from jtl.models.layers.post_norm import encoder_config as sizes_of
from jtl.models.layers.token_embeddings import token_ids

POOLINGS = ("cls", "mean")


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
    """What `config.json` says beside the sizes and rates that every encoder of texts has.

    `relative` is None without relative attention; `terms` are of `pos_att_type`.
    """

    sizes: EncoderConfig
    position_biased_input: bool = True
    relative: RelativePlaces | None = None
    terms: tuple[str, ...] = ()
    share_att_key: bool = False
    norm_rel_ebd: bool = False
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"


def deberta_config(config: Mapping[str, Any]) -> DebertaConfig:
    """Return the fields that the encoder reads, checked.

    Args:
        config: the dict of `config.json`; other fields are left alone.

    Raises:
        ValueError: as `encoder_config`, or the config asks for a variant that is not built here.

    >>> sizes = dict(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
    >>> sizes = dict(sizes, intermediate_size=8, max_position_embeddings=5, type_vocab_size=0)
    >>> made = deberta_config(dict(sizes, relative_attention=True, pos_att_type="p2c|c2p"))
    >>> made.relative, made.terms
    (RelativePlaces(span=5, farthest=5, bucketed=False), ('p2c', 'c2p'))
    """
    sizes = sizes_of(config, "DeBERTa")
    relative = bool(config.get("relative_attention", False))
    terms = _words(config.get("pos_att_type"))
    norms = tuple(word for word in _words(config.get("norm_rel_ebd")) if word != "none")
    farthest = config.get("max_relative_positions") or -1
    farthest = sizes.max_position_embeddings if farthest < 1 else farthest
    buckets = config.get("position_buckets") or -1
    places = RelativePlaces(max(buckets, 0) or farthest, farthest, buckets > 0)
    kernel = config.get("conv_kernel_size") or 0
    made = DebertaConfig(
        sizes=sizes,
        position_biased_input=bool(config.get("position_biased_input", True)),
        relative=places if relative else None,
        terms=terms,
        share_att_key=bool(config.get("share_att_key", False)),
        norm_rel_ebd=norms == ("layer_norm",),
        conv_kernel_size=kernel,
        conv_groups=config.get("conv_groups") or 1,
        conv_act=config.get("conv_act") or "tanh",
    )
    head = config.get("attention_head_size")
    width = sizes.hidden_size // sizes.num_attention_heads
    for name, wrong, built in (
        ("pos_att_type", not set(terms) <= {"c2p", "p2c"} or relative != bool(terms),
         "'c2p' and 'p2c' with relative_attention, none without"),
        ("norm_rel_ebd", norms not in ((), ("layer_norm",)), "'none' and 'layer_norm'"),
        ("conv_kernel_size", kernel and not kernel % 2, "odd kernels"),
        ("attention_head_size", head not in (None, width), f"hidden_size / heads = {width}"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(
                f"the DeBERTa config has {name}={config[name]!r}; the encoder here has "
                f"{built}; use a checkpoint of that kind"
            )
    activation(made.conv_act)
    return made


def _words(value: Any) -> tuple[str, ...]:
    """Return the parts of a field that is "a|b" in some configs and ["a", "b"] in others."""
    parts = value.split("|") if isinstance(value, str) else value or ()
    return tuple(part.strip().lower() for part in parts if part.strip())


class _Embeddings(nn.Module):
    """Sum of the embeddings that the config has, LayerNorm, zeros at padding, dropout."""

    config: DebertaConfig
    dtype: Any

    @nn.compact
    def __call__(self, batch: Batch, live: bool) -> jax.Array:
        config, sizes = self.config, self.config.sizes
        limit = sizes.max_position_embeddings if config.position_biased_input else None
        ids = token_ids(batch, limit)
        hidden = self._table("word_embeddings", sizes.vocab_size)(ids)
        if config.position_biased_input:
            places = self._table("position_embeddings", sizes.max_position_embeddings)
            hidden = hidden + places(jnp.arange(ids.shape[1])[None, :])
        if sizes.type_vocab_size:
            types = batch.get("token_type_ids")
            types = jnp.zeros_like(ids) if types is None else jnp.asarray(types)
            hidden = hidden + self._table("token_type_embeddings", sizes.type_vocab_size)(types)
        if hidden.shape[-1] != sizes.hidden_size:
            init = nn.initializers.normal(sizes.initializer_range)
            hidden = nn.Dense(
                sizes.hidden_size,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=init,
                dot_general=flat_dot,
                name="embed_proj",
            )(hidden)
        hidden = layer_norm(sizes.layer_norm_eps, self.dtype, name="LayerNorm")(hidden)
        hidden = _real(hidden, batch.get("attention_mask"))
        return Dropout(sizes.hidden_dropout_prob, deterministic=not live)(hidden)

    def _table(self, name: str, rows: int) -> nn.Embed:
        sizes = self.config.sizes
        init = nn.initializers.normal(sizes.initializer_range)
        width = sizes.embedding_size or sizes.hidden_size
        # float32 whatever the dtype: the gradient of a row is a sum over all tokens that took it.
        return nn.Embed(rows, width, dtype=jnp.float32, embedding_init=init, name=name)


def _real(hidden: jax.Array, mask: Any) -> jax.Array:
    """Return hidden (n, positions, dim) with zeros at padding."""
    if mask is None:
        return hidden
    return jnp.where(jnp.asarray(mask).astype(bool)[:, :, None], hidden, 0)


class _Attention(nn.Module):
    config: DebertaConfig
    dtype: Any

    def setup(self) -> None:
        sizes = self.config.sizes
        self.self = DisentangledAttention(
            sizes.hidden_size,
            sizes.num_attention_heads,
            self.config.terms,
            self.config.relative,
            shared=self.config.share_att_key,
            dropout=sizes.attention_probs_dropout_prob,
            place_dropout=sizes.hidden_dropout_prob,
            scale=sizes.initializer_range,
            dtype=self.dtype,
        )
        self.output = SumNorm(self.config.sizes, self.dtype)

    def __call__(self, hidden: jax.Array, table: Any, mask: Any, live: bool) -> jax.Array:
        return self.output(self.self(hidden, table, mask, live), hidden, live)


class _Layer(nn.Module):
    config: DebertaConfig
    dtype: Any

    def setup(self) -> None:
        self.attention = _Attention(self.config, self.dtype)
        self.intermediate = Intermediate(self.config.sizes, self.dtype)
        self.output = SumNorm(self.config.sizes, self.dtype)

    def __call__(self, hidden: jax.Array, table: Any, mask: Any, live: bool) -> jax.Array:
        hidden = self.attention(hidden, table, mask, live)
        return self.output(self.intermediate(hidden), hidden, live)


class _Convolution(nn.Module):
    """The convolution of v2-xlarge: of the embeddings, added to what block 0 gives."""

    config: DebertaConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, embedded: jax.Array, hidden: jax.Array, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        config, sizes = self.config, self.config.sizes
        near = config.conv_kernel_size // 2
        wide = nn.Conv(
            sizes.hidden_size,
            (config.conv_kernel_size,),
            padding=((near, near),),
            feature_group_count=config.conv_groups,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(sizes.initializer_range),
            name="conv",
        )(embedded)
        drop = Dropout(sizes.hidden_dropout_prob, deterministic=not live)
        near_words = activation(config.conv_act)(drop(_real(wide, mask)))
        norm = layer_norm(sizes.layer_norm_eps, self.dtype, name="LayerNorm")
        return _real(norm(hidden + near_words), mask)


class _Encoder(nn.Module):
    config: DebertaConfig
    dtype: Any

    def setup(self) -> None:
        config, sizes = self.config, self.config.sizes
        # The layers are numbered by their sizes; what else they read is bound beforehand.
        self.layer = NumberedLayers(
            lambda _, dtype, name: _Layer(config, dtype, name=name), sizes, self.dtype
        )
        if config.relative:
            init = nn.initializers.normal(sizes.initializer_range)
            rows = 2 * config.relative.span
            self.rel_embeddings = nn.Embed(rows, sizes.hidden_size, embedding_init=init)
            if config.norm_rel_ebd:
                self.LayerNorm = layer_norm(sizes.layer_norm_eps, self.dtype)
        if config.conv_kernel_size:
            self.conv = _Convolution(config, self.dtype)

    def __call__(self, index: int, hidden: jax.Array, mask: Any, live: bool) -> jax.Array:
        found = self.layer(index, hidden, self._table(), mask, live)
        if index == 0 and self.config.conv_kernel_size:
            found = self.conv(hidden, found, mask, live)
        return found

    def _table(self) -> jax.Array | None:
        if not self.config.relative:
            return None
        table = self.rel_embeddings.embedding
        table = self.LayerNorm(table) if self.config.norm_rel_ebd else table
        return table.astype(self.dtype)


class Deberta(nn.Module):
    """The DeBERTa encoder in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes, rates and variants.
        pooling: what `out["pooled"]` is: "cls" (the first token) or "mean" (over
            `attention_mask`).
        dtype: of the computation; parameters are float32.
    """

    config: DebertaConfig
    pooling: str = "cls"
    dtype: Any = jnp.float32

    common = ("encoder/rel_embeddings/.*", "encoder/LayerNorm/.*")

    def setup(self) -> None:
        """Declare the modules of the stages."""
        self.embeddings = _Embeddings(self.config, self.dtype)
        self.encoder = _Encoder(self.config, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.sizes.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, positions, dim)."""
        return self.embeddings(batch, live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index` (n, positions, dim)."""
        mask = batch.get("attention_mask")
        return self.encoder(index, hidden, None if mask is None else jnp.asarray(mask), live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" and "pooled"; it has no weights."""
        return {"tokens": hidden, "pooled": pool({"tokens": hidden}, batch, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Deberta:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not known to DeBERTa; give one of {POOLINGS}")
    return Deberta(deberta_config(config), pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    made = deberta_config(config)
    stem = ["embeddings/.*"]
    stem += ["encoder/rel_embeddings/.*"] if made.relative else []
    stem += ["encoder/LayerNorm/.*"] if made.relative and made.norm_rel_ebd else []
    first = [("encoder/conv/.*", "block_0")] if made.conv_kernel_size else []
    layers = range(made.sizes.num_hidden_layers)
    blocks = [(rf"encoder/layer/{i}/.*", f"block_{i}") for i in layers]
    return (*((rule, "stem") for rule in stem), *first, *blocks)


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    length = min(4, config["max_position_embeddings"])
    ids = jnp.zeros((1, length), jnp.int32)
    return {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}


# Of `legacy` in transformers. The other spelling, `lm_predictions.lm_head`, is what the published
# checkpoints have; an alias brings it to this one, and a folder that is written says legacy.
_MASKED_LM = (
    ("dense/kernel", "cls.predictions.transform.dense.weight", "dense"),
    ("dense/bias", "cls.predictions.transform.dense.bias", "same"),
    ("LayerNorm/scale", "cls.predictions.transform.LayerNorm.weight", "same"),
    ("LayerNorm/bias", "cls.predictions.transform.LayerNorm.bias", "same"),
    ("bias", "cls.predictions.bias", "same"),
)


def _classifier(config: Mapping[str, Any], backbone: Backbone) -> TwoLayer:
    return TwoLayer(outputs=len(config["id2label"]), activation=config["pooler_hidden_act"])


DEBERTA_V2 = Family(
    model_type="deberta-v2",
    modality="text",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_size"],
    example=_example,
    rules=(("encoder/conv/conv/kernel", "encoder.conv.conv.weight", "conv"),),
    aliases=(
        ("^deberta[./]", ""),
        (r"^lm_predictions[.]lm_head[.](dense|LayerNorm)", r"cls.predictions.transform.\1"),
        (r"^lm_predictions[.]lm_head[.]bias", "cls.predictions.bias"),
    ),
    ignored=(
        r"embeddings[.](position_ids|(position|token_type)_embeddings[.].*)",
        r"(cls|lm_predictions|mask_predictions|pooler|classifier|qa_outputs|dropout)[.].*",
    ),
    class_name="DebertaV2Model",
    prefix="deberta",
    table="embeddings/word_embeddings/embedding",
    heads={
        "masked_lm": masked_lm("DebertaV2ForMaskedLM", _MASKED_LM)._replace(
            stated=lambda head: {"legacy": True}
        ),
        "classification": two_layer(
            "DebertaV2ForSequenceClassification", "gelu", ("pooler.dense", "classifier")
        )._replace(
            make=_classifier,
            fields={},
            stated=lambda head: {"pooler_hidden_act": head.activation},
        ),
        "token_classification": token_classification("DebertaV2ForTokenClassification"),
        "question_answering": question_answering("DebertaV2ForQuestionAnswering"),
    },
)
