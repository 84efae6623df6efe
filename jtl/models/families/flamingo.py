"""IDEFICS, an open Flamingo: a decoder of words that reads images by gated cross-attention.

Stages: "stem" is the embeddings of patches and of words, then a block for each layer of the image
tower, one block for the resampler where there is one, then a block for each layer of the decoder
with the cross-attention that comes before it; "top" is the decoder's last norm. The tower's own
last norm is read by nothing and is "unused". Names are those of transformers' PyTorch model.

A batch has `input_ids`, `attention_mask`, `pixel_values` (n, images, height, width, channels), or
(n, height, width, channels) for one image each, and `image_attention_mask` (n, length, images):
which images a token reads. Without it each token reads all images of its row; a token that reads
none gets nothing added by the cross-attention. A batch of texts alone has no images; the tower then
does not run. Positions are counted from the first real token, unless "position_ids" says other
ones. The config's freeze flags are about the training that was and are not read: here labels and
phases say what moves.

Reference: Alayrac et al. 2022, arXiv:2204.14198 (Flamingo); Laurençon et al. 2023, arXiv:2306.16527
(IDEFICS).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import UNUSED, Batch, Family, Out, PretrainedHead, Rules, run_stages
from jtl.models.families.llama import DecoderConfig, DecoderLayers, decoder_config
from jtl.models.heads import pool
from jtl.models.heads.decoupled import Decoupled
from jtl.models.layers import RMSNorm, two_towers
from jtl.models.layers.clip_towers import ClipVisionConfig, ClipVisionTower, vision_config
from jtl.models.layers.decoupled_embedding import DecoupledEmbedding
from jtl.models.layers.gated_cross_attention import (
    GatedCrossAttention,
    Seen,
    image_before,
    seen_tokens,
)
from jtl.models.layers.nest import Nest
from jtl.models.layers.patches import pair
from jtl.models.layers.resampler import Resampler
from jtl.models.layers.token_embeddings import token_ids
from jtl.models.resize import positions_of

POOLINGS = ("last", "mean")
_STARTS = ("zeros", "ones", "normal", "gaussian", "random")


@dataclasses.dataclass(frozen=True)
class FlamingoConfig:
    """What the model reads of its config.

    Attributes:
        vision: sizes of the image tower.
        text: sizes of the decoder.
        resampler: fields of `layers.resampler.Resampler`, None where words read all patches.
        cross: fields of `layers.gated_cross_attention.GatedCrossAttention`.
        every: a cross-attention for so many layers of the decoder.
        first: before which of them it stands.
        additional: rows of the second word embedding.
        whole: whether the token of the whole image is read beside those of its patches.
        image_token: which word stands for an image, so that a word reads the last image before it;
            None has the batch say what a word reads.
        counted: whether positions are counted from the first real token.
    """

    vision: ClipVisionConfig
    text: DecoderConfig
    resampler: tuple[tuple[str, Any], ...] | None
    cross: tuple[tuple[str, Any], ...]
    every: int = 1
    first: int = 0
    additional: int = 0
    whole: bool = True
    image_token: int | None = None
    counted: bool = True

    @property
    def before(self) -> int:
        """Number of blocks before those of the decoder."""
        return self.vision.num_hidden_layers + (self.resampler is not None)

    @property
    def crossed(self) -> tuple[int, ...]:
        """Layers of the decoder that have a cross-attention before them."""
        return tuple(range(self.first, self.text.num_hidden_layers, self.every))


def idefics_config(config: Mapping[str, Any]) -> FlamingoConfig:
    """Return what the model reads, checked.

    Raises:
        ValueError: a size of a tower is missing or does not fit, the layers of the decoder are no
            multiple of `cross_layer_interval`, the kind or start of the gates is not known, or the
            head is tied to an embedding in two tables.
    """
    rate = float(config.get("dropout") or 0.0)
    text = decoder_config({**config, "attention_dropout": rate, "residual_dropout": rate})
    stated = dict(config["vision_config"])
    stated["hidden_size"] = stated.get("embed_dim", stated.get("hidden_size"))
    every, layers = int(config.get("cross_layer_interval", 1)), text.num_hidden_layers
    if every < 1 or layers % every:
        raise ValueError(
            f"cross_layer_interval is {every} and the decoder has {layers} layers; there is one "
            "cross-attention for each interval of layers; give a divisor of their number"
        )
    additional = int(config.get("additional_vocab_size") or 0)
    if additional and config.get("tie_word_embeddings"):
        raise ValueError(
            f"the config has tie_word_embeddings=True and {additional} additional tokens; a tied "
            "head reads one table of words here; set tie_word_embeddings to False and give the "
            "checkpoint its lm_head, or additional_vocab_size to 0"
        )
    return FlamingoConfig(
        vision=vision_config({"hidden_act": "gelu", **stated}),
        text=text,
        resampler=_resampler(config),
        cross=(
            ("heads", text.num_attention_heads),
            ("size", text.head_dim),
            ("inner", text.intermediate_size),
            ("act", text.hidden_act),
            ("query_norm", bool(config.get("qk_layer_norms"))),
            ("epsilon", text.epsilon),
            ("dropout", rate),
            ("scale", text.initializer_range),
            *_gates(config),
        ),
        every=every,
        additional=additional,
    )


def _resampler(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...] | None:
    if not config.get("use_resampler"):
        return None
    stated = config.get("perceiver_config") or {}
    return (
        ("latents", int(stated.get("resampler_n_latents", 64))),
        ("depth", int(stated.get("resampler_depth", 6))),
        ("heads", int(stated.get("resampler_n_heads", 16))),
        ("size", int(stated.get("resampler_head_dim", 96))),
        ("query_norm", bool(stated.get("qk_layer_norms_perceiver"))),
        ("scale", float(config.get("initializer_range", 0.02))),
    )


def _gates(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    kind, start = config.get("alpha_type", "float"), config.get("alpha_initializer", "zeros")
    if kind not in ("float", "vector") or start not in _STARTS:
        raise ValueError(
            f"alpha_type is {kind!r} and alpha_initializer {start!r}; gates are 'float' or "
            f"'vector' and begin as one of {_STARTS}; correct config.json"
        )
    spread = float(config.get("alphas_initializer_range") or 0.0)
    return (
        ("vector", kind == "vector"),
        ("start", 1.0 if start == "ones" else 0.0),
        ("deviation", 0.0 if start in ("zeros", "ones") else spread),
    )


class Flamingo(nn.Module):
    """A decoder with gated cross-attention in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes of the towers and what joins them.
        pooling: what `out["pooled"]` is: "last" (the last real token) or "mean" (over
            `attention_mask`).
        dtype: of the computation; parameters are float32.
    """

    config: FlamingoConfig
    pooling: str = "last"
    dtype: Any = jnp.float32

    beside = ("attention_mask", "image_attention_mask", "input_ids", "position_ids")

    def setup(self) -> None:
        """Declare the image tower, the resampler, the cross-attentions and the decoder."""
        config, text = self.config, self.config.text
        self.vision_model = ClipVisionTower(config.vision, self.dtype)
        if config.resampler is not None:
            self.perceiver_resampler = Resampler(**dict(config.resampler), dtype=self.dtype)
        self.embed_tokens = DecoupledEmbedding(
            text.vocab_size, config.additional, text.hidden_size, text.initializer_range
        )
        fields = dict(config.cross)

        def cross(name: str) -> GatedCrossAttention:
            return GatedCrossAttention(**fields, dtype=self.dtype, name=name)

        places = range(len(config.crossed))
        self.gated_cross_attn_layers = Nest(tuple((str(i), cross) for i in places))
        self.layers = DecoderLayers(text, self.dtype)
        self.norm = RMSNorm(text.epsilon, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.before + self.config.text.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings of patches and words (n, images patches + length, dim)."""
        words = self.embed_tokens(token_ids(batch)).astype(self.dtype)
        if "pixel_values" not in batch:
            _no_images(batch)
            return words
        images = _one_by_one(batch, len(words))
        patches = self.vision_model.stem({"pixel_values": images})
        return two_towers.joint(patches.reshape(len(words), -1, patches.shape[-1]), words)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of a layer of the tower, of the resampler, or of the decoder."""
        images, words = self._streams(hidden, batch)
        if index >= self.config.before:
            assert words is not None, "token_ids in the stem has seen to it"
            words = self._decoded(index - self.config.before, images, words, batch, live)
            return two_towers.joint(images, words)
        if images is None:
            return hidden
        rows, patches = len(images), self.config.vision.positions
        images = images.reshape(-1, patches, images.shape[-1])
        if self.is_initializing() and index == 0:  # what is stored and not read
            self.vision_model.pooled(images)
        if index < self.config.vision.num_hidden_layers:
            images = self.vision_model.layer(index, images, batch, live)
        else:
            images = self.perceiver_resampler(images if self.config.whole else images[:, 1:])
        return two_towers.joint(images.reshape(rows, -1, images.shape[-1]), words)

    def _streams(self, hidden: jax.Array, batch: Batch) -> tuple[Any, Any]:
        widths = (self.config.vision.hidden_size, self.config.text.hidden_size)
        return two_towers.streams(hidden, batch, widths)

    def _decoded(self, layer: int, images: Any, words: Any, batch: Batch, live: bool) -> jax.Array:
        """Return the words after a layer of the decoder and the cross-attention before it."""
        config = self.config
        if layer in config.crossed:
            name = str(config.crossed.index(layer))
            seen = None if images is None else self._seen(images, words, batch)
            words = self.gated_cross_attn_layers(name, words, images, seen, live)
        counted = positions_of_real(batch) if config.counted else {}
        return self.layers(layer, words, {**batch, **counted}, live)

    def _seen(self, images: jax.Array, words: jax.Array, batch: Batch) -> Seen | None:
        resampler = self.config.resampler
        each = self.config.vision.positions if resampler is None else dict(resampler)["latents"]
        mask: Any = batch.get("image_attention_mask")
        count = images.shape[1] // each
        if mask is None and self.config.image_token is not None:
            mask = image_before(jnp.asarray(batch["input_ids"]), self.config.image_token, count)
        if mask is None:
            return None
        wanted = (*words.shape[:2], count)
        if mask.shape != wanted:
            raise ValueError(
                f"'image_attention_mask' has shape {mask.shape}; the batch has {wanted} (n, "
                "length, images); give each token a number for each image of its row"
            )
        return seen_tokens(jnp.asarray(mask).astype(bool), each)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens", after the last norm, and "pooled"."""
        tokens = self.norm(self._streams(hidden, batch)[1])
        return {"tokens": tokens, "pooled": pool({"tokens": tokens}, batch, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _one_by_one(batch: Batch, rows: int) -> jax.Array:
    """Return the images (n images, height, width, channels), those of a row behind each other."""
    values = jnp.asarray(batch["pixel_values"])
    if values.ndim not in (4, 5) or len(values) != rows:
        raise ValueError(
            f"'pixel_values' has shape {values.shape} for {rows} texts; it must hold (n, images, "
            "height, width, channels), or (n, height, width, channels) for one image each; pad "
            "rows with fewer images and leave the padding out in 'image_attention_mask'"
        )
    return values.reshape(-1, *values.shape[-3:])


def _no_images(batch: Batch) -> None:
    if batch.get("image_attention_mask") is not None:
        raise ValueError(
            f"the batch has 'image_attention_mask' and no 'pixel_values'; it has {sorted(batch)}; "
            "give the images, or leave the mask out for texts alone"
        )


def positions_of_real(batch: Batch) -> dict[str, jax.Array]:
    """Return positions from the first real token, 1 at padding, where the batch has none.

    >>> positions_of_real({"attention_mask": jnp.array([[0, 0, 1, 1]])})["position_ids"].tolist()
    [[1, 1, 0, 1]]
    """
    if batch.get("position_ids") is not None or batch.get("attention_mask") is None:
        return {}
    mask = jnp.asarray(batch["attention_mask"]).astype(jnp.int32)
    return {"position_ids": jnp.where(mask == 0, 1, jnp.cumsum(mask, axis=1) - 1)}


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Flamingo:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not known to idefics; give one of {POOLINGS}")
    return Flamingo(idefics_config(config), pooling, dtype)


def stage_groups(made: FlamingoConfig) -> Rules:
    """Return the rules of the stages of a model, (regex, label)."""
    depth, before = made.vision.num_hidden_layers, made.before
    resampler = () if made.resampler is None else (("perceiver_resampler/.*", f"block_{depth}"),)
    layers = range(made.text.num_hidden_layers)
    return (
        (r"(vision_model/(embeddings|pre_layrnorm)|embed_tokens)/.*", "stem"),
        *((rf"vision_model/encoder/layers/{i}/.*", f"block_{i}") for i in range(depth)),
        *resampler,
        *(
            (rf"gated_cross_attn_layers/{i}/.*", f"block_{before + layer}")
            for i, layer in enumerate(made.crossed)
        ),
        *((rf"layers/{i}/.*", f"block_{before + i}") for i in layers),
        ("norm/.*", "top"),
        ("vision_model/post_layernorm/.*", UNUSED),
    )


def small_batch(made: FlamingoConfig) -> dict[str, jax.Array]:
    """Return one row of a few words with one image that each of them reads."""
    ids = jnp.zeros((1, 4), jnp.int32)
    size = pair(made.vision.image_size, "image_size")
    images = jnp.zeros((1, 1, *size, made.vision.num_channels))
    seen = jnp.ones((1, 4, 1), jnp.int32)
    mask = jnp.ones_like(ids)
    return dict(input_ids=ids, attention_mask=mask, pixel_values=images, image_attention_mask=seen)


def _causal_lm(config: Mapping[str, Any], backbone: Any) -> Decoupled:
    return Decoupled(
        vocabulary=config["vocab_size"],
        additional=config.get("additional_vocab_size") or 0,
        tied=bool(config.get("tie_word_embeddings")),
    )


RULES = (("(vision_model/embeddings/patch_embedding)/kernel", r"\1.weight", "conv"),)
_POSITIONS = "vision_model/embeddings/position_embedding/embedding"

IDEFICS = Family(
    model_type="idefics",
    modality="image_text",
    make=_make,
    groups=lambda config, pooling: stage_groups(idefics_config(config)),
    poolings=POOLINGS,
    dim=lambda config: config["hidden_size"],
    example=lambda config: small_batch(idefics_config(config)),
    rules=RULES,
    aliases=((r"^model[.]", ""),),
    ignored=(
        r".*rotary_emb[.]inv_freq",
        r"vision_model[.]embeddings[.]position_ids",
        r"lm_head[.].*",
    ),
    class_name="IdeficsModel",
    prefix="model",
    table="embed_tokens/embedding",
    heads={
        "causal_lm": PretrainedHead(
            "IdeficsForVisionText2Text",
            Decoupled,
            _causal_lm,
            (
                ("kernel", "lm_head.weight", "dense"),
                ("additional_fc/kernel", "lm_head.additional_fc.weight", "dense"),
            ),
            stated=lambda head: {"tie_word_embeddings": head.tied},
        )
    },
    resize=positions_of(_POSITIONS, part="vision_config"),
)
