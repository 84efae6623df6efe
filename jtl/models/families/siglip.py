"""SigLIP: two towers trained by a sigmoid for each pair, images pooled by attention.

Three families read one checkpoint: "siglip" both towers, "siglip_vision_model" and
"siglip_text_model" one of them. Stages, batches and outputs are CLIP's (`families/clip.py`), with
"logit_bias" (1,) beside "logit_scale" (1,). A text is read at its last place, which is padding: pad
to the full length, as `backbone.inputs` of the pair does, and give no attention mask. For the text
tower alone that is `inputs(texts, length=inputs.max_length)`.

Reference: Zhai et al. 2023, arXiv:2303.15343; the pooling: Lee et al. 2018, arXiv:1810.00825.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import UNUSED, Batch, Family, Out, PretrainedHead, Rules, run_stages
from jtl.models.heads import pool
from jtl.models.heads.contrastive import Contrastive
from jtl.models.layers import two_towers
from jtl.models.layers.clip_towers import TextTower, sides, vision_config
from jtl.models.layers.siglip_tower import SiglipVisionConfig, SiglipVisionTower
from jtl.models.layers.tower import tower_fields
from jtl.models.resize import channels_of, positions_of

POOLINGS = ("image", "text")
VISION_POOLINGS = ("pooler", "mean")
TEXT_POOLINGS = ("pooler",)


@dataclasses.dataclass(frozen=True)
class SiglipTextConfig:
    """The fields of `text_config` that the tower reads, under their names there."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    projection_size: int | None = None
    hidden_act: str = "gelu_pytorch_tanh"
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02


class Siglip(nn.Module):
    """Both towers in stages; see `models/backbone.py` for the contract.

    Attributes:
        vision: sizes of the image tower.
        text: sizes of the text tower.
        pooling: what `out["pooled"]` is: the embedding of the "image" or of the "text"; where the
            batch does not have it, that of the other.
        dtype: of the computation; parameters are float32.
    """

    vision: SiglipVisionConfig
    text: SiglipTextConfig
    pooling: str = "image"
    dtype: Any = jnp.float32

    beside = ("attention_mask", "input_ids")

    def setup(self) -> None:
        """Declare the towers, the temperature and the bias."""
        self.vision_model = SiglipVisionTower(self.vision, self.dtype)
        self.text_model = _text_tower(self.text, self.dtype)
        # The initial values of the paper: a temperature of 10, and few pairs among all pairings.
        start = nn.initializers.constant(jnp.log(10.0))
        self.logit_scale = self.param("logit_scale", start, (1,))
        self.logit_bias = self.param("logit_bias", nn.initializers.constant(-10.0), (1,))

    @property
    def blocks(self) -> int:
        """Number of blocks: the layers of the deeper tower."""
        return max(self.vision.num_hidden_layers, self.text.num_hidden_layers)

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings of images and texts (n, patches + text tokens, dim)."""
        return two_towers.joint_stem(self.vision_model, self.text_model, batch, live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return what both towers' layers of block `index` make of it."""
        towers = (self.vision_model, self.text_model)
        return two_towers.joint_block(*towers, index, hidden, batch, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return the outputs that the file's head describes."""
        widths = (self.vision.hidden_size, self.text.hidden_size)
        images, texts = two_towers.streams(hidden, batch, widths)
        out: Out = {"logit_scale": self.logit_scale, "logit_bias": self.logit_bias}
        if texts is not None:
            tokens = self.text_model.final(texts)
            out |= {"tokens": tokens, "text_tokens": tokens}
            out["text_embeds"] = self.text_model.projected(tokens[:, -1])
        if images is not None:
            tokens = self.vision_model.final(images)
            out |= {"tokens": tokens, "image_embeds": self.vision_model.pooled(tokens)}
        return {**out, "pooled": two_towers.pooled_side(out, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


class SiglipVision(nn.Module):
    """The image tower alone, in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "pooler" (by attention) or "mean" (over patches).
        dtype: of the computation; parameters are float32.
    """

    config: SiglipVisionConfig
    pooling: str = "pooler"
    dtype: Any = jnp.float32

    beside = ()

    def setup(self) -> None:
        """Declare the tower."""
        self.vision_model = SiglipVisionTower(self.config, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, patches, dim)."""
        return self.vision_model.stem(batch, live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index` (n, patches, dim)."""
        return self.vision_model.layer(index, hidden, batch, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" and "pooled"; the pooling's weights exist under every pooling."""
        tokens = self.vision_model.final(hidden)
        mean = pool({"tokens": tokens}, {}, "mean")
        if self.pooling == "pooler" or (self.is_initializing() and self.config.vision_use_head):
            pooled = self.vision_model.pooled(tokens)
            return {"tokens": tokens, "pooled": pooled if self.pooling == "pooler" else mean}
        return {"tokens": tokens, "pooled": mean}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


class SiglipText(nn.Module):
    """The text tower alone, in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        dtype: of the computation; parameters are float32.
    """

    config: SiglipTextConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the tower."""
        self.text_model = _text_tower(self.config, self.dtype)

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
        """Return "tokens", and "pooled" (n, projection_size), read at the last place."""
        tokens = self.text_model.final(hidden)
        return {"tokens": tokens, "pooled": self.text_model.projected(tokens[:, -1])}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _text_tower(config: SiglipTextConfig, dtype: Any) -> TextTower:
    width = config.projection_size or config.hidden_size
    return TextTower(config, causal=False, projection=width, dtype=dtype)


def _vision(config: Mapping[str, Any], pooling: str) -> SiglipVisionConfig:
    made = vision_config(config, SiglipVisionConfig)
    if pooling != "mean" and not made.vision_use_head:
        raise ValueError(
            "the image tower has vision_use_head=False, so no pooling of its own; load it as "
            "'siglip_vision_model' with pooling='mean'"
        )
    return made


def _text(config: Mapping[str, Any]) -> SiglipTextConfig:
    return tower_fields(SiglipTextConfig, config, "the text tower")


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Siglip:
    vision, text = _vision(config["vision_config"], "pooler"), _text(config["text_config"])
    return Siglip(vision, text, pooling, dtype)


def _make_vision(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> SiglipVision:
    return SiglipVision(_vision(config, pooling), pooling, dtype)


def _make_text(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> SiglipText:
    return SiglipText(_text(config), dtype)


_LAYERS = {side: f"{side}_model/encoder/layers/" for side in ("vision", "text")}
_STEM = (r"(vision|text)_model/embeddings/.*", "stem")
_NORMS = (r"(vision_model/post_layernorm|text_model/(final_layer_norm|head))/.*", "top")


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    depths = [(_LAYERS[s], config[f"{s}_config"]["num_hidden_layers"]) for s in ("vision", "text")]
    tops = (("vision_model/head/.*", "top"), ("logit_(scale|bias)", "top"))
    return (_STEM, *two_towers.block_rules(depths), _NORMS, *tops)


def _vision_groups(config: Mapping[str, Any], pooling: str) -> Rules:
    blocks = two_towers.block_rules([(_LAYERS["vision"], config["num_hidden_layers"])])
    if not config.get("vision_use_head", True):
        return (_STEM, *blocks, _NORMS)
    return (
        _STEM,
        *blocks,
        _NORMS,
        ("vision_model/head/.*", "top" if pooling == "pooler" else UNUSED),
    )


def _text_groups(config: Mapping[str, Any], pooling: str) -> Rules:
    depth = config["num_hidden_layers"]
    return (_STEM, *two_towers.block_rules([(_LAYERS["text"], depth)]), _NORMS)


def _vision_example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    made = vision_config(config, SiglipVisionConfig)
    return {"pixel_values": jnp.zeros((1, *sides(made.image_size), made.num_channels))}


def _text_example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    return {"input_ids": jnp.zeros((1, min(4, config["max_position_embeddings"])), jnp.int32)}


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    return {**_vision_example(config["vision_config"]), **_text_example(config["text_config"])}


def _text_dim(config: Mapping[str, Any]) -> int:
    return config.get("projection_size") or config["hidden_size"]


_VISION_RULES = (
    (r"(vision_model/embeddings/patch_embedding)/kernel", r"\1.weight", "conv"),
    (r"(vision_model/head/attention/in_proj)/kernel", r"\1_weight", "dense"),
    (r"(vision_model/head/attention/in_proj)/bias", r"\1_bias", "same"),
)
_POSITIONS = "vision_model/embeddings/position_embedding/embedding"
_KERNEL = "vision_model/embeddings/patch_embedding/kernel"

SIGLIP = Family(
    model_type="siglip",
    modality="image_text",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["vision_config"]["hidden_size"],
    dims=lambda config, pooling: (
        config["vision_config"]["hidden_size"]
        if pooling == "image"
        else _text_dim(config["text_config"])
    ),
    example=_example,
    rules=_VISION_RULES,
    class_name="SiglipModel",
    prefix="",
    table="text_model/embeddings/token_embedding/embedding",
    heads={
        "contrastive": PretrainedHead(
            "SiglipModel", Contrastive, lambda config, backbone: Contrastive(), ()
        )
    },
    resize=positions_of(_POSITIONS, part="vision_config"),
    channels=channels_of(_KERNEL, part="vision_config"),
)
SIGLIP_VISION = Family(
    model_type="siglip_vision_model",
    modality="image",
    make=_make_vision,
    groups=_vision_groups,
    poolings=VISION_POOLINGS,
    dim=lambda config: config["hidden_size"],
    example=_vision_example,
    rules=_VISION_RULES,
    aliases=((r"^(embeddings|encoder|post_layernorm|head)[.]", r"vision_model.\1."),),
    ignored=(r"(text_model|logit_scale|logit_bias|classifier)([.].*)?",),
    class_name="SiglipVisionModel",
    part="vision_config",
    resize=positions_of(_POSITIONS),
    channels=channels_of(_KERNEL),
)
SIGLIP_TEXT = Family(
    model_type="siglip_text_model",
    modality="text",
    make=_make_text,
    groups=_text_groups,
    poolings=TEXT_POOLINGS,
    dim=_text_dim,
    example=_text_example,
    aliases=((r"^(embeddings|encoder|final_layer_norm|head)[.]", r"text_model.\1."),),
    ignored=(r"(vision_model|logit_scale|logit_bias)([.].*)?",),
    class_name="SiglipTextModel",
    part="text_config",
    table="text_model/embeddings/token_embedding/embedding",
)
