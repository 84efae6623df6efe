"""MedCLIP with a ResNet: chest X-rays beside the texts of Bio_ClinicalBERT.

The published file is a bare `pytorch_model.bin`: `load_backbone(file, family="medclip")`. Stages
and outputs are CLIP's (`families/clip.py`): block i runs a residual layer and a layer of BERT,
aligned from the top. A text's embedding is the projection of a mean over all its places, padding
too, of the hidden states after the first, the second and the last layer; so the first two means
travel with the hidden array as one place more. Images are square.

Reference: Wang et al. 2022, arXiv:2210.10163.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import UNUSED, Batch, Family, Out, Rules, run_stages
from jtl.models.families.bert import BERT, Bert
from jtl.models.families.resnet import RESNET, ResNet, ResNetConfig, resnet_config
from jtl.models.families.torchvision_names import resnet_rules
from jtl.models.layers import flat_dot, pixels, two_towers, unpack
from jtl.models.layers.maps import flat
from jtl.models.layers.post_norm import EncoderConfig

POOLINGS = ("image", "text")
# ResNet-50 and Bio_ClinicalBERT.
_VISION = {
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck",
    "num_channels": 3,
}
_TEXT = {"vocab_size": 28996}
_TOP_SCALE = 4.6052  # the inverse temperature is kept from 1 to 100


@dataclasses.dataclass(frozen=True)
class MedClipConfig:
    """Sizes of both towers, of the images, and of the space that they share."""

    vision: ResNetConfig
    text: EncoderConfig
    image_size: int = 224
    projection_dim: int = 512


def _projection(width: int, dtype: Any) -> nn.Dense:
    init = nn.initializers.normal(0.02)
    return nn.Dense(width, use_bias=False, dtype=dtype, kernel_init=init, dot_general=flat_dot)


class _Vision(nn.Module):
    config: MedClipConfig
    dtype: Any
    axis_name: str | None

    def setup(self) -> None:
        self.model = ResNet(self.config.vision, "mean", self.dtype, self.axis_name)
        self.projection_head = _projection(self.config.projection_dim, self.dtype)

    def stem(self, batch: Batch, live: bool) -> jax.Array:
        side = self.config.image_size
        pixels(batch, self.config.vision.num_channels, (side, side))
        return flat(self.model.stem(batch, live))

    def layer(self, index: int, hidden: jax.Array, batch: Batch, live: bool) -> jax.Array:
        return flat(self.model.block(index, _square(hidden), batch, live))

    def top(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = self.model.top(_square(hidden), {})
        return out["tokens"], self.projection_head(out["pooled"])


def _square(tokens: jax.Array) -> jax.Array:
    side = math.isqrt(tokens.shape[1])
    return tokens.reshape(tokens.shape[0], side, side, -1)


class _Text(nn.Module):
    """BERT with one place more, in which the means of the first two layers are added up."""

    config: MedClipConfig
    dtype: Any

    def setup(self) -> None:
        self.model = Bert(self.config.text, "mean", self.dtype)
        self.projection_head = _projection(self.config.projection_dim, self.dtype)

    def stem(self, batch: Batch, live: bool) -> jax.Array:
        hidden = self.model.stem(batch, live)
        return jnp.concatenate([hidden, jnp.zeros_like(hidden[:, :1])], axis=1)

    def layer(self, index: int, hidden: jax.Array, batch: Batch, live: bool) -> jax.Array:
        words, means = hidden[:, :-1], hidden[:, -1:]
        words = self.model.block(index, words, batch, live)
        if index < 2:
            means = means + jnp.mean(words, axis=1, keepdims=True, dtype=jnp.float32)
        return jnp.concatenate([words, means.astype(words.dtype)], axis=1)

    def top(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        words, means = hidden[:, :-1], hidden[:, -1]
        if self.is_initializing():  # the pooler is stored and not read
            self.model.top(words, {})
        last = jnp.mean(words, axis=1, dtype=jnp.float32)
        mean = (means.astype(jnp.float32) + last) / 3
        return words, self.projection_head(mean.astype(self.dtype))


class MedClip(nn.Module):
    """Both towers in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes of the towers.
        pooling: what `out["pooled"]` is: the embedding of the "image" or of the "text"; where the
            batch does not have it, that of the other.
        dtype: of the computation; parameters and statistics are float32.
        axis_name: axis of devices over which BatchNorm takes its moments; None for one program.
    """

    config: MedClipConfig
    pooling: str = "image"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    beside = ("attention_mask", "input_ids")

    def setup(self) -> None:
        """Declare the towers and the temperature."""
        self.vision_model = _Vision(self.config, self.dtype, self.axis_name)
        self.text_model = _Text(self.config, self.dtype)
        start = nn.initializers.constant(math.log(1 / 0.07))
        self.logit_scale = self.param("logit_scale", start, ())

    @property
    def _depths(self) -> tuple[int, int]:
        return sum(self.config.vision.depths), self.config.text.num_hidden_layers

    @property
    def blocks(self) -> int:
        """Number of blocks: the layers of the deeper tower."""
        return max(self._depths)

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings of images and texts (n, places of the map + length + 1, dim)."""
        return two_towers.joint_stem(self.vision_model, self.text_model, batch, live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return what both towers' layers of block `index` make of it."""
        made = []
        towers = (self.vision_model, self.text_model)
        both = zip(towers, self._streams(index, hidden, batch), self._depths, strict=True)
        for tower, stream, depth in both:
            layer = two_towers.layer_of(index, self.blocks, depth)
            if stream is not None and layer >= 0:
                stream = tower.layer(layer, stream, batch, live)
            made.append(stream)
        return two_towers.joint(*made)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return the outputs of `families/clip.py`."""
        images, texts = self._streams(self.blocks, hidden, batch)
        # The authors clamp the stored value itself, so that its gradient passes.
        scale = self.logit_scale
        kept = scale + jax.lax.stop_gradient(jnp.clip(scale, 0.0, _TOP_SCALE) - scale)
        out: Out = {"logit_scale": kept}
        if texts is not None:
            tokens, out["text_embeds"] = self.text_model.top(texts)
            out |= {"tokens": tokens, "text_tokens": tokens}
        if images is not None:
            out["tokens"], out["image_embeds"] = self.vision_model.top(images)
        return {**out, "pooled": two_towers.pooled_side(out, self.pooling)}

    def _streams(
        self, index: int, hidden: jax.Array, batch: Batch
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """Return the streams that enter block `index`; the image's widths differ by stage."""
        config = self.config.vision
        done = two_towers.layer_of(index, self.blocks, self._depths[0])
        widths = [
            width
            for width, n in zip(config.hidden_sizes, config.depths, strict=True)
            for _ in range(n)
        ]
        width = widths[done - 1] if done > 0 else config.embedding_size
        length = batch["input_ids"].shape[1] + 1 if "input_ids" in batch else 0
        images, texts = unpack(hidden, (-1, length), (width, self.config.text.hidden_size))
        return images if images.shape[1] else None, texts if length else None

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _config(config: Mapping[str, Any]) -> MedClipConfig:
    text = BERT.make(config["text_config"], "mean", jnp.float32)
    vision = resnet_config(config["vision_config"])
    return MedClipConfig(vision, text.config, config["image_size"], config["projection_dim"])


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> MedClip:
    return MedClip(_config(config), pooling, dtype)


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the published model under what is stated."""
    from transformers import BertConfig

    text = {**_TEXT, **config.get("text_config", {})}
    text = {name: value for name, value in text.items() if name != "model_type"}
    whole = json.loads(BertConfig(**text).to_json_string(use_diff=False))
    return {
        "image_size": config.get("image_size", 224),
        "projection_dim": config.get("projection_dim", 512),
        "vision_config": {**_VISION, **config.get("vision_config", {})},
        "text_config": {**whole, **text},
    }


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    made = _config(config)
    depths = sum(made.vision.depths), made.text.num_hidden_layers
    towers = ("vision_model", "text_model")
    inner = (
        RESNET.groups(config["vision_config"], "mean"),
        BERT.groups(config["text_config"], "mean"),
    )
    rules = [
        (f"{tower}/model/(?:{rule})", _label(label, max(depths), depth))
        for tower, part, depth in zip(towers, inner, depths, strict=True)
        for rule, label in part
    ]
    order = ["stem", *(f"block_{i}" for i in range(max(depths))), UNUSED]
    tops = ((r"(vision|text)_model/projection_head/.*", "top"), ("logit_scale", "top"))
    return (*sorted(rules, key=lambda rule: order.index(rule[1])), *tops)


def _label(label: str, blocks: int, depth: int) -> str:
    """Return the label in the pair of a label of one tower."""
    if not label.startswith("block_"):
        return label
    return f"block_{int(label.removeprefix('block_')) + blocks - depth}"


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    side = config["image_size"]
    images = jnp.zeros((1, side, side, config["vision_config"]["num_channels"]))
    return {"pixel_values": images, **BERT.example(config["text_config"])}


MEDCLIP = Family(
    model_type="medclip",
    modality="image_text",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["projection_dim"],
    example=_example,
    rules=(
        *resnet_rules("vision_model/model", "vision_model.model"),
        ("vision_model/projection_head/kernel", "vision_model.model.fc.weight", "dense"),
    ),
    aliases=(("[.]gamma$", ".weight"), ("[.]beta$", ".bias")),
    ignored=(r"(.*[.])?(num_batches_tracked|position_ids)",),
    table="text_model/model/embeddings/word_embeddings/embedding",
    complete=_complete,
)
