"""T5, Flan-T5, mT5 and ByT5: an encoder and a decoder, or the encoder alone.

The names are those of transformers' FlaxT5Model. Stages of the whole model: "stem" is the word
embedding with the two tables of relative positions, which every block of their stack reads; the
blocks are those of the encoder, then those of the decoder; the last block of the encoder ends with
the encoder's final norm; "top" is the decoder's. Between the stages the two streams lie in one
array (`layers.pack`), the encoder's positions first.

Reference: Raffel et al. 2020, arXiv:1910.10683; Xue et al. 2021, arXiv:2010.11934 (mT5); Xue et al.
2022, arXiv:2105.13626 (ByT5); Chung et al. 2022, arXiv:2210.11416 (Flan-T5).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Backbone, Batch, Family, Out, Rules, run_stages
from jtl.models.heads import CausalLM, pool
from jtl.models.heads.pretrained import causal_lm, token_classification
from jtl.models.layers import Dropout, activation, pack, unpack
from jtl.models.layers.stated import stated
from jtl.models.layers.t5_stack import T5Sizes, T5Stack

POOLINGS = ("decoder_last", "decoder_mean", "encoder_mean")
ENCODER_POOLINGS = ("mean", "cls")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The fields of `config.json` that the model reads, under their names there."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    dense_act_fn: str
    is_gated_act: bool
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0


def t5_config(config: Mapping[str, Any]) -> T5Config:
    """Return the fields that the model reads, checked.

    Args:
        config: the dict of `config.json`; other fields are left alone.

    Raises:
        ValueError: a size is missing, the activation is not known, or the config asks for a variant
            that is not built here.

    >>> sizes = dict(vocab_size=9, d_model=4, d_kv=2, d_ff=8, num_layers=1, num_heads=3)
    >>> made = t5_config(dict(sizes, feed_forward_proj="gated-gelu"))
    >>> made.is_gated_act, made.dense_act_fn, made.num_decoder_layers
    (True, 'gelu_new', 1)
    """
    if config.get("is_decoder"):
        raise ValueError(
            f"the T5 config has is_decoder={config['is_decoder']!r}; here are the encoder with "
            "the decoder, and the encoder alone; use a checkpoint of one of these"
        )
    *gate, act = str(config.get("feed_forward_proj") or "relu").split("-")
    if gate not in ([], ["gated"]):
        raise ValueError(
            f"the T5 config has feed_forward_proj={config['feed_forward_proj']!r}; it is the name "
            "of an activation, or 'gated-' before one; correct it"
        )
    # "gated-gelu" has always meant the tanh form.
    defaults = {
        "is_gated_act": bool(gate),
        "dense_act_fn": "gelu_new" if gate and act == "gelu" else act,
        "num_decoder_layers": config.get("num_layers"),
    }
    own = {name: value for name, value in config.items() if value is not None}
    made = stated(T5Config, {**defaults, **own}, "T5")
    activation(made.dense_act_fn)
    return made


def _sizes(config: T5Config, *, decoder: bool = False) -> T5Sizes:
    return T5Sizes(
        dim=config.d_model,
        size=config.d_kv,
        heads=config.num_heads,
        inner=config.d_ff,
        blocks=config.num_decoder_layers if decoder else config.num_layers,
        decoder=decoder,
        gated=config.is_gated_act,
        activation=config.dense_act_fn,
        buckets=config.relative_attention_num_buckets,
        farthest=config.relative_attention_max_distance,
        dropout=config.dropout_rate,
        epsilon=config.layer_norm_epsilon,
        start=config.initializer_factor,
    )


def _words(config: T5Config) -> nn.Embed:
    init = nn.initializers.normal(config.initializer_factor)
    # float32 whatever the dtype: the gradient of a row is a sum over all tokens that took it.
    return nn.Embed(config.vocab_size, config.d_model, dtype=jnp.float32, embedding_init=init)


def _ids(batch: Batch, name: str) -> jax.Array:
    """Return a column of tokens, checked for what is static."""
    if name not in batch:
        way = (
            "make it from the labels, moved one place to the right behind decoder_start_token_id, "
            "or load the encoder alone with family='t5_encoder'"
            if name == "decoder_input_ids"
            else "make batches with backbone.inputs(texts)"
        )
        raise ValueError(f"the batch has no column {name!r}; it has {sorted(batch)}; {way}")
    ids = jnp.asarray(batch[name])
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{name!r} is {ids.dtype}{ids.shape}; it must hold whole numbers in (n, length); "
            "make batches with backbone.inputs(texts)"
        )
    return ids


def _mask(batch: Batch, name: str = "attention_mask") -> jax.Array | None:
    mask = batch.get(name)
    return None if mask is None else jnp.asarray(mask)


class T5(nn.Module):
    """The encoder and the decoder in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "decoder_last" (the last real position of the decoder),
            "decoder_mean" (over `decoder_attention_mask`) or "encoder_mean" (over
            `attention_mask`; no gradient reaches the decoder then).
        dtype: of the computation; parameters are float32.
    """

    config: T5Config
    pooling: str = POOLINGS[0]
    dtype: Any = jnp.float32

    beside = ("attention_mask", "decoder_attention_mask")
    common = (".*/relative_attention_bias/.*",)

    def setup(self) -> None:
        """Declare the embedding and the two stacks."""
        self.shared = _words(self.config)
        self.drop = Dropout(self.config.dropout_rate)
        self.encoder = T5Stack(_sizes(self.config), self.dtype)
        self.decoder = T5Stack(_sizes(self.config, decoder=True), self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks of the encoder and of the decoder."""
        return self.config.num_layers + self.config.num_decoder_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, positions of both streams, dim)."""
        streams = [
            self.shared(_ids(batch, name)).astype(self.dtype)
            for name in ("input_ids", "decoder_input_ids")
        ]
        return pack(*(self.drop(stream) if live else stream for stream in streams))

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return both streams after block `index`, which changes one of them."""
        source, target = self._streams(hidden, batch)
        mask, first = _mask(batch), self.config.num_layers
        if index < first:
            source = self.encoder(index, source, mask, live=live)
            source = self.encoder.end(source, live) if index == first - 1 else source
        else:
            own = _mask(batch, "decoder_attention_mask")
            target = self.decoder(index - first, target, own, source, mask, live=live)
        return pack(source, target)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" of the decoder, which of them are real, "encoder", and "pooled"."""
        source, target = self._streams(hidden, batch)
        target = self.decoder.end(target, live)
        stream, _, how = self.pooling.partition("_")
        mask = batch.get("attention_mask" if stream == "encoder" else "decoder_attention_mask")
        tokens = {"tokens": source if stream == "encoder" else target}
        pooled = pool(tokens, {} if mask is None else {"attention_mask": mask}, how)
        real = batch.get("decoder_attention_mask")
        real = jnp.ones(target.shape[:2], bool) if real is None else jnp.asarray(real).astype(bool)
        return {"tokens": target, "token_mask": real, "encoder": source, "pooled": pooled}

    def _streams(self, hidden: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
        lengths = {}
        for stream, names in (
            ("encoder", ("attention_mask", "input_ids")),
            ("decoder", ("decoder_attention_mask", "decoder_input_ids")),
        ):
            there = [batch[name].shape[1] for name in names if name in batch]
            lengths[stream] = there[0] if there else -1
        if max(lengths.values()) < 0:
            raise ValueError(
                "nothing says where the decoder's positions begin in the activations; the batch "
                f"has {sorted(batch)}; give 'attention_mask' or 'decoder_attention_mask'"
            )
        return unpack(hidden, tuple(lengths.values()), (self.config.d_model,) * 2)

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


class T5Encoder(nn.Module):
    """The encoder alone in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "mean" (over `attention_mask`) or "cls" (the first token).
        dtype: of the computation; parameters are float32.
    """

    config: T5Config
    pooling: str = ENCODER_POOLINGS[0]
    dtype: Any = jnp.float32

    common = (".*/relative_attention_bias/.*",)

    def setup(self) -> None:
        """Declare the embedding and the stack."""
        self.shared = _words(self.config)
        self.drop = Dropout(self.config.dropout_rate)
        self.encoder = T5Stack(_sizes(self.config), self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.num_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, positions, dim)."""
        hidden = self.shared(_ids(batch, "input_ids")).astype(self.dtype)
        return self.drop(hidden) if live else hidden

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of block `index` (n, positions, dim)."""
        return self.encoder(index, hidden, _mask(batch), live=live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" and "pooled"."""
        out = {"tokens": self.encoder.end(hidden, live)}
        return {**out, "pooled": pool(out, batch, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> T5:
    _known(pooling, POOLINGS)
    return T5(t5_config(config), pooling, dtype)


def _make_encoder(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> T5Encoder:
    _known(pooling, ENCODER_POOLINGS)
    return T5Encoder(t5_config(config), pooling, dtype)


def _known(pooling: str, poolings: tuple[str, ...]) -> None:
    if pooling not in poolings:
        raise ValueError(f"pooling {pooling!r} is not known to T5; give one of {poolings}")


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    made = t5_config(config)
    first = made.num_layers
    encoder = ((rf"encoder/block/{i}/.*", f"block_{i}") for i in range(first))
    end = ("encoder/final_layer_norm/.*", f"block_{first - 1}")
    blocks = range(made.num_decoder_layers)
    decoder = ((rf"decoder/block/{i}/.*", f"block_{first + i}") for i in blocks)
    top = ("decoder/final_layer_norm/.*", "top")
    return (*_STEM, *encoder, end, *decoder, top)


def _encoder_groups(config: Mapping[str, Any], pooling: str) -> Rules:
    blocks = range(t5_config(config).num_layers)
    encoder = ((rf"encoder/block/{i}/.*", f"block_{i}") for i in blocks)
    return (*_STEM, *encoder, ("encoder/final_layer_norm/.*", "top"))


_STEM = (("shared/.*", "stem"), (".*/relative_attention_bias/.*", "stem"))


def _encoder_example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    ids = jnp.zeros((1, 4), jnp.int32)
    return {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    ids = jnp.zeros((1, 3), jnp.int32)
    decoder = {"decoder_input_ids": ids, "decoder_attention_mask": jnp.ones_like(ids)}
    return {**_encoder_example(config), **decoder}


def _encoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole config of T5, whose `model_type` transformers' encoder class has."""
    from jtl.models import stated

    return stated.full_config(T5_ROW, config)


def _head(config: Mapping[str, Any], backbone: Backbone) -> CausalLM:
    """Return the head as the checkpoint has it.

    A file with `lm_head` has its own kernel, except that the first T5's files repeat the word
    embedding there. transformers 5 writes `tie_word_embeddings=True` into every config.
    """
    scaled = bool(config.get("scale_decoder_outputs", False))
    left = backbone.report.unexpected if backbone.report else ()
    stored = any(re.fullmatch("lm_head[./].*", name) for name in left)
    tied = bool(config.get("tie_word_embeddings", True)) and (scaled or not stored)
    scale = config["d_model"] ** -0.5 if scaled else 1.0
    return CausalLM(vocabulary=config["vocab_size"], tied=tied, scale=scale)


T5_ROW = Family(
    model_type="t5",
    modality="text",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["d_model"],
    example=_example,
    aliases=(("^transformer[./]", ""),),
    ignored=(
        r"(encoder|decoder)[.]embed_tokens[.].*",
        r"decoder[.]block[.]0[.]layer[.]1[.]EncDecAttention[.]relative_attention_bias[.].*",
        r"(lm_head|classification_head|classifier|qa_outputs)[.].*",
    ),
    class_name="T5Model",
    prefix="",
    table="shared/embedding",
    heads={
        "sequence_to_sequence": causal_lm("T5ForConditionalGeneration")._replace(
            make=_head, stated=lambda head: {"scale_decoder_outputs": head.scale != 1.0}
        ),
    },
)

MT5_ROW = T5_ROW._replace(
    model_type="mt5",
    class_name="MT5Model",
    heads={
        "sequence_to_sequence": causal_lm("MT5ForConditionalGeneration")._replace(
            make=_head, fields={"scale": 1.0}
        ),
    },
)

T5_ENCODER = T5_ROW._replace(
    model_type="t5_encoder",
    make=_make_encoder,
    groups=_encoder_groups,
    poolings=ENCODER_POOLINGS,
    example=_encoder_example,
    ignored=(*T5_ROW.ignored, "decoder[.].*"),
    class_name="T5EncoderModel",
    complete=_encoder_config,
    heads={
        "token_classification": token_classification("T5ForTokenClassification")._replace(
            prefix="transformer"
        ),
    },
)
