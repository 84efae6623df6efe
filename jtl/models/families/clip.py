"""CLIP: an image tower and a text tower whose projections meet in one space.

Three families read one checkpoint: "clip" both towers, "clip_vision_model" and "clip_text_model"
one of them. The tree of parameters is that of transformers' FlaxCLIPModel. Stages of the pair:
"stem" is both embeddings, "block_i" a layer of each tower, aligned from the top
(`layers/two_towers.py`), "top" the final norms, the projections and the temperature.

A batch of the pair may hold images alone or texts alone; the other tower then does not run. `out`
has "image_embeds" and "text_embeds" (n, projection_dim), not normalised, for what is there,
"text_tokens" beside "tokens", which are the image's (the text's where there are no images), and
"logit_scale", the logarithm of the inverse temperature.

Reference: Radford et al. 2021, arXiv:2103.00020.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import UNUSED, Batch, Family, Out, PretrainedHead, Rules, run_stages
from jtl.models.families import open_clip
from jtl.models.heads import pool
from jtl.models.heads.contrastive import Contrastive
from jtl.models.layers import flat_dot, two_towers
from jtl.models.layers.clip_towers import (
    ClipTextConfig,
    ClipVisionConfig,
    ClipVisionTower,
    TextTower,
    at,
    end_of_text,
    sides,
    text_config,
    vision_config,
)
from jtl.models.resize import Changed, channels_of, positions_of

POOLINGS = ("image", "text")
VISION_POOLINGS = ("pooler", "projection", "cls", "mean")
TEXT_POOLINGS = ("pooler", "projection")


def _projection(width: int, dtype: Any) -> nn.Dense:
    init = nn.initializers.normal(0.02)
    return nn.Dense(width, use_bias=False, dtype=dtype, kernel_init=init, dot_general=flat_dot)


class Clip(nn.Module):
    """Both towers in stages; see `models/backbone.py` for the contract, the file's head for `out`.

    Attributes:
        vision: sizes of the image tower.
        text: sizes of the text tower.
        projection_dim: width of the shared space.
        logit_scale_init_value: where the logarithm of the inverse temperature starts.
        pooling: what `out["pooled"]` is: the embedding of the "image" or of the "text"; where the
            batch does not have it, that of the other.
        dtype: of the computation; parameters are float32.
    """

    vision: ClipVisionConfig
    text: ClipTextConfig
    projection_dim: int
    logit_scale_init_value: float = 2.6592
    pooling: str = "image"
    dtype: Any = jnp.float32

    beside = ("attention_mask", "input_ids")

    def setup(self) -> None:
        """Declare the towers, the projections and the temperature."""
        self.vision_model = ClipVisionTower(self.vision, self.dtype)
        self.text_model = TextTower(self.text, dtype=self.dtype)
        self.visual_projection = _projection(self.projection_dim, self.dtype)
        self.text_projection = _projection(self.projection_dim, self.dtype)
        start = nn.initializers.constant(self.logit_scale_init_value)
        self.logit_scale = self.param("logit_scale", start, ())

    @property
    def blocks(self) -> int:
        """Number of blocks: the layers of the deeper tower."""
        return max(self.vision.num_hidden_layers, self.text.num_hidden_layers)

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings of images and texts (n, image tokens + text tokens, dim)."""
        return two_towers.joint_stem(self.vision_model, self.text_model, batch, live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return what both towers' layers of block `index` make of it."""
        towers = (self.vision_model, self.text_model)
        return two_towers.joint_block(*towers, index, hidden, batch, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return the outputs that the file's head describes."""
        widths = (self.vision.hidden_size, self.text.hidden_size)
        images, texts = two_towers.streams(hidden, batch, widths)
        out: Out = {"logit_scale": self.logit_scale}
        if texts is not None:
            tokens = self.text_model.final(texts)
            end = end_of_text(jnp.asarray(batch["input_ids"]), self.text.eos_token_id)
            out |= {"tokens": tokens, "text_tokens": tokens}
            out["text_embeds"] = self.text_projection(at(tokens, end))
        if images is not None:
            embeds = self.visual_projection(self.vision_model.pooled(images))
            out |= {"tokens": images, "image_embeds": embeds}
        return {**out, "pooled": two_towers.pooled_side(out, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


class ClipVision(nn.Module):
    """The image tower alone, in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "pooler" (the first token behind a LayerNorm), its
            "projection" into the shared space, "cls" (the first token) or "mean" (over patches).
        dtype: of the computation; parameters are float32.
    """

    config: ClipVisionConfig
    pooling: str = "pooler"
    dtype: Any = jnp.float32

    beside = ()

    def setup(self) -> None:
        """Declare the tower, and the projection where it is read."""
        self.vision_model = ClipVisionTower(self.config, self.dtype)
        if self.pooling == "projection":
            self.visual_projection = _projection(self.config.projection_dim, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, 1 + patches, dim)."""
        return self.vision_model.stem(batch, live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index` (n, 1 + patches, dim)."""
        return self.vision_model.layer(index, hidden, batch, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" and "pooled"; the norm's weights exist under every pooling."""
        if self.pooling in ("pooler", "projection") or self.is_initializing():
            pooled = self.vision_model.pooled(hidden)
            if self.pooling == "projection":
                pooled = self.visual_projection(pooled)
            if self.pooling in ("pooler", "projection"):
                return {"tokens": hidden, "pooled": pooled}
        read = hidden[:, 1:] if self.pooling == "mean" else hidden
        return {"tokens": hidden, "pooled": pool({"tokens": read}, {}, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


class ClipText(nn.Module):
    """The text tower alone, in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "pooler" (the token at the end of the text) or its
            "projection" into the shared space.
        dtype: of the computation; parameters are float32.
    """

    config: ClipTextConfig
    pooling: str = "pooler"
    dtype: Any = jnp.float32

    beside = ("attention_mask", "input_ids")

    def setup(self) -> None:
        """Declare the tower, and the projection where it is read."""
        self.text_model = TextTower(self.config, dtype=self.dtype)
        if self.pooling == "projection":
            self.text_projection = _projection(self.config.projection_dim, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, length, dim)."""
        return self.text_model.stem(batch, live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index` (n, length, dim)."""
        return self.text_model.layer(index, hidden, batch, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" and "pooled"."""
        tokens = self.text_model.final(hidden)
        ids = jnp.asarray(batch["input_ids"])
        pooled = at(tokens, end_of_text(ids, self.config.eos_token_id))
        projected = self.text_projection(pooled) if self.pooling == "projection" else pooled
        return {"tokens": tokens, "pooled": projected}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def clip_parts(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the configs of both towers; what the older `*_config_dict` states stands over."""
    names = ("vision_config", "text_config")
    return {name: {**config.get(name, {}), **(config.get(f"{name}_dict") or {})} for name in names}


def _part(name: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return a tower's config from that of the pair, whose shared space is wide as the pair says.

    The tower's own `projection_dim` is read where it stands alone, or in a model of another kind.
    """

    def own(config: Mapping[str, Any]) -> dict[str, Any]:
        tower = clip_parts(config)[name]
        if config.get("model_type") != "clip":
            return tower
        return {**tower, "projection_dim": config.get("projection_dim", 512)}

    return own


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Clip:
    parts = clip_parts(config)
    return Clip(
        vision_config(parts["vision_config"]),
        text_config(parts["text_config"]),
        config["projection_dim"],
        config.get("logit_scale_init_value", 2.6592),
        pooling,
        dtype,
    )


_VISION, _TEXT = "vision_model/encoder/layers/", "text_model/encoder/layers/"
_TOPS = (r"vision_model/post_layernorm/.*", r"text_model/final_layer_norm/.*")


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    parts = clip_parts(config)
    depths = [(_VISION, parts["vision_config"]), (_TEXT, parts["text_config"])]
    layers = [(prefix, part["num_hidden_layers"]) for prefix, part in depths]
    return (
        (r"(vision_model/(embeddings|pre_layrnorm)|text_model/embeddings)/.*", "stem"),
        *two_towers.block_rules(layers),
        *((rule, "top") for rule in (*_TOPS, r"(visual|text)_projection/.*", "logit_scale")),
    )


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    parts = clip_parts(config)
    return {**_vision_example(parts["vision_config"]), **_text_example(parts["text_config"])}


def _vision_groups(config: Mapping[str, Any], pooling: str) -> Rules:
    top = "top" if pooling in ("pooler", "projection") else UNUSED
    return (
        (r"vision_model/(embeddings|pre_layrnorm)/.*", "stem"),
        *two_towers.block_rules([(_VISION, config["num_hidden_layers"])]),
        (_TOPS[0], top),
        *((("visual_projection/.*", "top"),) if pooling == "projection" else ()),
    )


def _text_groups(config: Mapping[str, Any], pooling: str) -> Rules:
    return (
        (r"text_model/embeddings/.*", "stem"),
        *two_towers.block_rules([(_TEXT, config["num_hidden_layers"])]),
        (_TOPS[1], "top"),
        *((("text_projection/.*", "top"),) if pooling == "projection" else ()),
    )


def _vision_example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    made = vision_config(config)
    return {"pixel_values": jnp.zeros((1, *sides(made.image_size), made.num_channels))}


def _text_example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    ids = jnp.zeros((1, min(4, config["max_position_embeddings"])), jnp.int32)
    return {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}


def _tower_dim(config: Mapping[str, Any], pooling: str) -> int:
    return config["projection_dim" if pooling == "projection" else "hidden_size"]


def _vision_make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> ClipVision:
    return ClipVision(vision_config(config), pooling, dtype)


def _text_make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> ClipText:
    return ClipText(text_config(config), pooling, dtype)


def _of_pair(change: Callable[..., Changed]) -> Callable[..., Changed]:
    """Return a change of images where the older `vision_config_dict` stands over nothing."""

    def changed(params: Mapping[str, Any], config: Mapping[str, Any], *new: Any) -> Changed:
        older = {f"{name}_dict": None for name in ("vision_config", "text_config")}
        return change(params, {**config, **clip_parts(config), **older}, *new)

    return changed


def _contrastive(config: Mapping[str, Any], backbone: Any) -> Contrastive:
    return Contrastive()


_CONV = ((r"(vision_model/embeddings/patch_embedding)/kernel", r"\1.weight", "conv"),)
# An image tower alone is stored without a name of its own, or under that of what contains it.
_VISION_ALIASES = (
    (r"^(model[.])?vision_tower[.](vision_model[.])?", "vision_model."),
    (r"^(embeddings|encoder|pre_layrnorm|post_layernorm)[.]", r"vision_model.\1."),
)

_POSITIONS = "vision_model/embeddings/position_embedding/embedding"
_KERNEL = "vision_model/embeddings/patch_embedding/kernel"

CLIP = Family(
    model_type="clip",
    modality="image_text",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["projection_dim"],
    example=_example,
    rules=_CONV,
    layout=open_clip.layout,
    class_name="CLIPModel",
    prefix="",
    table="text_model/embeddings/token_embedding/embedding",
    heads={"contrastive": PretrainedHead("CLIPModel", Contrastive, _contrastive, ())},
    resize=_of_pair(positions_of(_POSITIONS, part="vision_config")),
    channels=_of_pair(channels_of(_KERNEL, part="vision_config")),
)
CLIP_VISION = Family(
    model_type="clip_vision_model",
    modality="image",
    make=_vision_make,
    groups=_vision_groups,
    poolings=VISION_POOLINGS,
    dim=lambda config: config["hidden_size"],
    dims=_tower_dim,
    example=_vision_example,
    rules=_CONV,
    aliases=_VISION_ALIASES,
    ignored=(
        r"(text_model|text_projection|visual_projection|logit_scale|classifier)([.].*)?",
        r"(model[.])?(language_model|multi_modal_projector|lm_head)[.].*",
    ),
    layout=open_clip.layout,
    class_name="CLIPVisionModel",
    part="vision_config",
    resize=positions_of(_POSITIONS),
    channels=channels_of(_KERNEL),
    part_config=_part("vision_config"),
)
CLIP_TEXT = Family(
    model_type="clip_text_model",
    modality="text",
    make=_text_make,
    groups=_text_groups,
    poolings=TEXT_POOLINGS,
    dim=lambda config: config["hidden_size"],
    dims=_tower_dim,
    example=_text_example,
    aliases=((r"^(embeddings|encoder|final_layer_norm)[.]", r"text_model.\1."),),
    ignored=(r"(vision_model|text_projection|visual_projection|logit_scale)([.].*)?",),
    layout=open_clip.layout,
    class_name="CLIPTextModel",
    part="text_config",
    part_config=_part("text_config"),
    table="text_model/embeddings/token_embedding/embedding",
)
