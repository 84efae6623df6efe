"""Whisper: an encoder of spectrograms and a decoder of text, or the encoder alone.

The trees of parameters are those of transformers' FlaxWhisperModel and of its encoder. Stages of
the whole model: "stem" is the two convolutions, both tables of positions and the words; the blocks
are the encoder's layers (its last LayerNorm belongs to the last of them), then the decoder's; "top"
is the decoder's last LayerNorm. The hidden array holds the encoder's positions before the
decoder's. A batch has `input_features` (n, mels, frames) as transformers' extractor makes them,
`decoder_input_ids` (n, tokens) and, where texts are padded, `decoder_attention_mask`.
`scale_embedding` has no effect, as in transformers. LayerDrop is on where a block is live.

Reference: Radford et al. 2022, arXiv:2212.04356.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch, Family, Out, Rules, run_stages
from jtl.models.heads import pool
from jtl.models.heads.pretrained import causal_lm, projected
from jtl.models.layers import Dropout, activation, layer_norm, pack, unpack
from jtl.models.layers.sincos import sinusoids
from jtl.models.layers.vit_encoder import check_heads
from jtl.models.layers.whisper_layers import EPSILON, Side, whisper_layers


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """What the model reads of `config.json`; `mels` is `num_mel_bins`."""

    encoder: Side
    decoder: Side
    mels: int
    vocabulary: int


def whisper_config(config: Mapping[str, Any]) -> WhisperConfig:
    """Return the fields that the model reads, checked.

    Args:
        config: the whole dict of `config.json`, as `stated.full_config` gives it.

    Raises:
        ValueError: a field is missing, the heads do not divide the width, the width is odd, or the
            activation is not known.
    """
    shared = ("d_model", "num_mel_bins", "vocab_size", "activation_function", "dropout")
    shared = (*shared, "attention_dropout", "activation_dropout", "init_std")
    own = [f"{side}_{name}" for side in ("encoder", "decoder") for name in _OWN]
    needed = (*shared, *own, "max_source_positions", "max_target_positions")
    missing = [name for name in needed if config.get(name) is None]
    if missing:
        raise ValueError(
            f"the Whisper config lacks {missing}; it has {sorted(config)}; add them, or correct "
            "model_type if the checkpoint is no Whisper"
        )
    encoder, decoder = (
        Side(
            *(config["d_model"], *(config[f"{side}_{name}"] for name in _OWN[:3])),
            positions=config[f"max_{place}_positions"],
            activation=config["activation_function"],
            dropout=config["dropout"],
            attention_dropout=config["attention_dropout"],
            activation_dropout=config["activation_dropout"],
            drop=config[f"{side}_layerdrop"],
            scale=config["init_std"],
        )
        for side, place in (("encoder", "source"), ("decoder", "target"))
    )
    for side in (encoder, decoder):
        check_heads(side.width, side.heads)
    activation(encoder.activation)
    return WhisperConfig(encoder, decoder, config["num_mel_bins"], config["vocab_size"])


_OWN = ("layers", "attention_heads", "ffn_dim", "layerdrop")


def _fixed(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    return jnp.asarray(sinusoids(*shape), dtype)


class WhisperEncoder(nn.Module):
    """The encoder in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "mean" over all positions, silence at the end included.
        dtype: of the computation; parameters are float32.
    """

    config: WhisperConfig
    pooling: str = "mean"
    dtype: Any = jnp.float32
    beside = ()

    def setup(self) -> None:
        """Declare convolutions, positions, layers and the last norm."""
        side = self.config.encoder
        self.conv1, self.conv2 = (
            nn.Conv(side.width, (3,), (stride,), padding=((1, 1),), dtype=self.dtype)
            for stride in (1, 2)
        )
        self.embed_positions = nn.Embed(side.positions, side.width, embedding_init=_fixed)
        self.layers = whisper_layers(side, self.dtype)
        self.layer_norm = layer_norm(EPSILON, self.dtype)
        self.dropout = Dropout(side.dropout)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.encoder.layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the positions of the spectrogram, (n, frames / 2, dim)."""
        features = _features(batch, self.config).swapaxes(1, 2).astype(self.dtype)
        gelu = activation("gelu")
        hidden = gelu(self.conv2(gelu(self.conv1(features)))).astype(jnp.float32)
        places = jax.lax.stop_gradient(self.embed_positions.embedding)  # fixed sines and cosines
        hidden = (hidden + places[None]).astype(self.dtype)
        return self.dropout(hidden) if live else hidden

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index` (n, positions, dim)."""
        return self.layers(str(index), hidden, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" and "pooled"."""
        tokens = self.layer_norm(hidden)
        return {"tokens": tokens, "pooled": pool({"tokens": tokens}, {}, "mean")}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


class _Decoder(nn.Module):
    config: WhisperConfig
    dtype: Any

    def setup(self) -> None:
        side = self.config.decoder
        init = nn.initializers.normal(side.scale)
        self.embed_tokens = nn.Embed(self.config.vocabulary, side.width, embedding_init=init)
        self.embed_positions = nn.Embed(side.positions, side.width, embedding_init=init)
        self.layers = whisper_layers(side, self.dtype, decoder=True)
        self.layer_norm = layer_norm(EPSILON, self.dtype)
        self.dropout = Dropout(side.dropout)

    def start(self, ids: jax.Array, live: bool) -> jax.Array:
        # Looked up and summed in float32 whatever the dtype: gradients are sums over all rows.
        places = self.embed_positions.embedding[None, : ids.shape[1]]
        hidden = (self.embed_tokens(ids) + places).astype(self.dtype)
        return self.dropout(hidden) if live else hidden

    def layer(self, index: int, hidden: jax.Array, encoded: Any, mask: Any, live: bool) -> Any:
        return self.layers(str(index), hidden, live, encoded, mask)

    def end(self, hidden: jax.Array) -> jax.Array:
        return self.layer_norm(hidden)


class Whisper(nn.Module):
    """Encoder and decoder in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "last" (the decoder's last real token) or "mean" (over its
            real tokens).
        dtype: of the computation; parameters are float32.
    """

    config: WhisperConfig
    pooling: str = "last"
    dtype: Any = jnp.float32
    beside = ("decoder_attention_mask",)

    def setup(self) -> None:
        """Declare both sides."""
        self.encoder = WhisperEncoder(self.config, dtype=self.dtype)
        self.decoder = _Decoder(self.config, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks: the encoder's, then the decoder's."""
        return self.config.encoder.layers + self.config.decoder.layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the beginnings of both streams, (n, positions + tokens, dim)."""
        ids = _ids(batch, self.config.decoder.positions)
        return pack(self.encoder.stem(batch, live), self.decoder.start(ids, live))

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return both streams after layer `index` of the encoder, or of the decoder behind it."""
        encoded, decoded = self._streams(hidden)
        depth = self.config.encoder.layers
        if index >= depth:
            decoded = self.decoder.layer(index - depth, decoded, encoded, _mask(batch), live)
        else:
            encoded = self.encoder.block(index, encoded, batch, live)
            if index == depth - 1:
                encoded = self.encoder.top(encoded, batch, live)["tokens"]
        return pack(encoded, decoded)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" (the decoder's), "encoded" (the encoder's) and "pooled"."""
        encoded, decoded = self._streams(hidden)
        out = {"tokens": self.decoder.end(decoded), "encoded": encoded}
        mask = _mask(batch)
        if mask is not None:
            out["token_mask"] = mask
        return {**out, "pooled": pool(out, {}, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)

    def _streams(self, hidden: jax.Array) -> tuple[jax.Array, ...]:
        side = self.config.encoder
        return unpack(hidden, (side.positions, -1), (side.width, side.width))


def _mask(batch: Batch) -> jax.Array | None:
    mask = batch.get("decoder_attention_mask")
    return None if mask is None else jnp.asarray(mask).astype(bool)


def _features(batch: Batch, config: WhisperConfig) -> jax.Array:
    """Return `batch["input_features"]` (n, mels, frames), checked.

    Raises:
        ValueError: there are none, or of another size than the checkpoint was trained on.
    """
    there: Any = batch["input_features"].shape if "input_features" in batch else sorted(batch)
    wanted = (config.mels, 2 * config.encoder.positions)
    if "input_features" not in batch or tuple(there[1:]) != wanted:
        raise ValueError(
            f"this Whisper reads 'input_features' of (n, {wanted[0]}, {wanted[1]}), mels by "
            f"frames; the batch has {there}; make batches with backbone.inputs(recordings), which "
            "pads them to that length"
        )
    return jnp.asarray(batch["input_features"])


def _ids(batch: Batch, positions: int) -> jax.Array:
    """Return `batch["decoder_input_ids"]` (n, tokens), checked.

    Raises:
        ValueError: there are none, or more tokens than positions.
    """
    there: Any = batch["decoder_input_ids"].shape if "decoder_input_ids" in batch else sorted(batch)
    if "decoder_input_ids" not in batch or len(there) != 2 or there[1] > positions:
        raise ValueError(
            f"Whisper's decoder reads 'decoder_input_ids' of (n, tokens), {positions} tokens at "
            f"most; the batch has {there}; add the tokens so far, the decoder's start token first, "
            'or load the encoder alone: load_backbone(name, family="whisper_encoder")'
        )
    return jnp.asarray(batch["decoder_input_ids"])


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Whisper:
    return Whisper(whisper_config(config), pooling, dtype)


def _make_encoder(
    config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32
) -> WhisperEncoder:
    return WhisperEncoder(whisper_config(config), pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    depth = config["encoder_layers"]
    sides = [("encoder", i, i) for i in range(depth)]
    sides += [("decoder", i, depth + i) for i in range(config["decoder_layers"])]
    blocks = ((rf"{side}/layers/{i}/.*", f"block_{block}") for side, i, block in sides)
    stem = r"encoder/conv\d/.*|(encoder|decoder)/embed_(positions|tokens)/.*"
    last = ("encoder/layer_norm/.*", f"block_{depth - 1}")
    return ((stem, "stem"), *blocks, last, ("decoder/layer_norm/.*", "top"))


def _encoder_groups(config: Mapping[str, Any], pooling: str) -> Rules:
    blocks = ((rf"layers/{i}/.*", f"block_{i}") for i in range(config["encoder_layers"]))
    return ((r"conv\d/.*|embed_positions/.*", "stem"), *blocks, ("layer_norm/.*", "top"))


def _encoder_example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    shape = (1, config["num_mel_bins"], 2 * config["max_source_positions"])
    return {"input_features": jnp.zeros(shape)}


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    ids = jnp.zeros((1, min(4, config["max_target_positions"])), jnp.int32)
    text = {"decoder_input_ids": ids, "decoder_attention_mask": jnp.ones_like(ids)}
    return {**_encoder_example(config), **text}


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a whole Whisper's config, which an encoder's is too."""
    from jtl.models.stated import full_config

    return full_config(WHISPER, config)


WHISPER = Family(
    model_type="whisper",
    modality="audio",
    make=_make,
    groups=_groups,
    poolings=("last", "mean"),
    dim=lambda config: config["d_model"],
    example=_example,
    rules=((r"(encoder/conv\d)/kernel", r"\1.weight", "conv"),),
    aliases=((r"^model[./]", ""),),
    ignored=(r"(proj_out|lm_head|projector|classifier)[./].*", "layer_weights"),
    class_name="WhisperModel",
    prefix="model",
    table="decoder/embed_tokens/embedding",
    heads={"causal_lm": causal_lm("WhisperForConditionalGeneration", at="proj_out")},
)
WHISPER_ENCODER = WHISPER._replace(
    model_type="whisper_encoder",
    make=_make_encoder,
    groups=_encoder_groups,
    poolings=("mean",),
    example=_encoder_example,
    rules=((r"(conv\d)/kernel", r"\1.weight", "conv"),),
    aliases=((r"^(model[./])?encoder[./]", ""),),
    ignored=(r"(model[./])?(decoder|proj_out|lm_head|projector|classifier)[./].*", "layer_weights"),
    class_name="WhisperEncoder",
    prefix="encoder",
    table="",
    heads={"classification": projected("WhisperForAudioClassification", "mean")},
    complete=_complete,
)
