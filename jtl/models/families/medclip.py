"""MedCLIP: chest X-rays, by a ResNet or by Swin, beside the texts of Bio_ClinicalBERT.

The published files are a bare `pytorch_model.bin` each: `load_backbone(file, family="medclip")` for
the one with ResNet-50, and with `config={"vision_config": {"model_type": "swin"}}` for the one with
Swin tiny, which its authors call MedCLIP-ViT. Stages and outputs are CLIP's (`families/clip.py`):
block i runs a layer of the image's network and a layer of BERT, aligned from the top. A text's
embedding is the projection of a mean over all its places, padding too, of the hidden states after
the first, the second and the last layer; so the first two means travel with the hidden array as
one place more. Images are square.

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

from jtl.models.backbone import UNUSED, Batch, Family, Out, Rules, run_stages, stage_labels
from jtl.models.families.bert import BERT, Bert
from jtl.models.families.resnet import RESNET, ResNet, ResNetConfig, resnet_config
from jtl.models.families.swin import SWIN, Swin, SwinConfig, swin_config
from jtl.models.families.torchvision_names import resnet_rules
from jtl.models.layers import flat_dot, pixels, two_towers, unpack
from jtl.models.layers.maps import flat
from jtl.models.layers.post_norm import EncoderConfig
from jtl.models.layers.stated import places
from jtl.weights.checkpoint import Checkpoint

POOLINGS = ("image", "text")
# ResNet-50, Swin tiny and Bio_ClinicalBERT.
_VISION: dict[str, dict[str, Any]] = {
    "resnet": {
        "embedding_size": 64,
        "hidden_sizes": [256, 512, 1024, 2048],
        "depths": [3, 4, 6, 3],
        "layer_type": "bottleneck",
        "num_channels": 3,
    },
    "swin": {
        "embed_dim": 96,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "num_channels": 3,
    },
}
# What an image's projection is called: torchvision's classifier is replaced by it.
_PROJECTION = {"resnet": "fc", "swin": "projection_head"}
_TEXT = {"vocab_size": 28996}
_TOP_SCALE = 4.6052  # the inverse temperature is kept from 1 to 100


@dataclasses.dataclass(frozen=True)
class MedClipConfig:
    """Sizes of both towers, of the images, and of the space that they share."""

    vision: ResNetConfig | SwinConfig
    text: EncoderConfig
    image_size: int = 224
    projection_dim: int = 512

    @property
    def kind(self) -> str:
        """The image's network, by its `model_type`."""
        return "swin" if isinstance(self.vision, SwinConfig) else "resnet"

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of an image's map before the first layer and after each of them."""
        if isinstance(self.vision, ResNetConfig):
            sizes = self.vision.hidden_sizes
            after = (sizes[stage] for stage, _ in places(self.vision.depths))
            return self.vision.embedding_size, *after
        depths, first = self.vision.depths, self.vision.embed_dim
        # The last layer of a stage merges patches, which doubles the width.
        after = (
            first * 2 ** min(stage + (layer == depths[stage] - 1), len(depths) - 1)
            for stage, layer in places(depths)
        )
        return first, *after


def _projection(width: int, dtype: Any, name: str | None = None) -> nn.Dense:
    options: Any = dict(kernel_init=nn.initializers.normal(0.02), dot_general=flat_dot)
    return nn.Dense(width, use_bias=False, dtype=dtype, name=name, **options)


class _Vision(nn.Module):
    config: MedClipConfig
    dtype: Any
    axis_name: str | None

    def setup(self) -> None:
        if isinstance(self.config.vision, SwinConfig):
            self.model = Swin(self.config.vision, "mean", self.dtype)
        else:
            self.model = ResNet(self.config.vision, "mean", self.dtype, self.axis_name)
        self.projection = _projection(
            self.config.projection_dim, self.dtype, _PROJECTION[self.config.kind]
        )

    def stem(self, batch: Batch, live: bool) -> jax.Array:
        side = self.config.image_size
        pixels(batch, self.config.vision.num_channels, (side, side))
        return flat(self.model.stem(batch, live))

    def layer(self, index: int, hidden: jax.Array, batch: Batch, live: bool) -> jax.Array:
        return flat(self.model.block(index, _square(hidden), batch, live))

    def top(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = self.model.top(_square(hidden), {})
        return out["tokens"], self.projection(out["pooled"])


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
        done = two_towers.layer_of(index, self.blocks, self._depths[0])
        width = self.config.widths[max(done, 0)]
        length = batch["input_ids"].shape[1] + 1 if "input_ids" in batch else 0
        images, texts = unpack(hidden, (-1, length), (width, self.config.text.hidden_size))
        return images if images.shape[1] else None, texts if length else None

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _kind(config: Mapping[str, Any]) -> str:
    kind = config.get("vision_config", {}).get("model_type", "resnet")
    if kind not in _VISION:
        raise ValueError(
            f"vision_config of MedCLIP states model_type {kind!r}; its images are read by one of "
            f"{sorted(_VISION)}; state one of them"
        )
    return kind


def _config(config: Mapping[str, Any]) -> MedClipConfig:
    text = BERT.make(config["text_config"], "mean", jnp.float32)
    make = swin_config if _kind(config) == "swin" else resnet_config
    vision = make(config["vision_config"])
    return MedClipConfig(vision, text.config, config["image_size"], config["projection_dim"])


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> MedClip:
    return MedClip(_config(config), pooling, dtype)


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the published model under what is stated."""
    from transformers import BertConfig

    kind, text = _kind(config), {**_TEXT, **config.get("text_config", {})}
    text = {name: value for name, value in text.items() if name != "model_type"}
    whole = json.loads(BertConfig(**text).to_json_string(use_diff=False))
    return {
        "image_size": config.get("image_size", 224),
        "projection_dim": config.get("projection_dim", 512),
        "vision_config": {
            "model_type": kind,
            **_VISION[kind],
            **config.get("vision_config", {}),
        },
        "text_config": {**whole, **text},
    }


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    made = _config(config)
    depths = sum(made.vision.depths), made.text.num_hidden_layers
    towers = ("vision_model", "text_model")
    inner = (
        {"resnet": RESNET, "swin": SWIN}[made.kind].groups(config["vision_config"], "mean"),
        BERT.groups(config["text_config"], "mean"),
    )
    rules = [
        (f"{tower}/model/(?:{rule})", _label(label, max(depths), depth))
        for tower, part, depth in zip(towers, inner, depths, strict=True)
        for rule, label in part
    ]
    order = (*stage_labels(max(depths)), UNUSED)
    tops = ((r"(vision|text)_model/(projection_head|fc)/.*", "top"), ("logit_scale", "top"))
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


def _checked(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Return the checkpoint, refused where its images are read by the other network."""
    swin = "vision_model.projection_head.weight" in checkpoint.names
    if swin != (_kind(config) == "swin") and any(
        name.startswith("vision_model.") for name in checkpoint.names
    ):
        found = "swin" if swin else "resnet"
        raise ValueError(
            f"the images of this MedCLIP are read by {found!r} and the config states "
            f"{_kind(config)!r}; give config={{'vision_config': {{'model_type': {found!r}}}}}"
        )
    return checkpoint


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
        ("vision_model/fc/kernel", "vision_model.model.fc.weight", "dense"),
        (r"(vision_model/model/.*/projection)/kernel", r"\1.weight", "conv"),
    ),
    aliases=(("[.]gamma$", ".weight"), ("[.]beta$", ".bias")),
    ignored=(r"(.*[.])?(num_batches_tracked|position_ids|relative_position_index)",),
    layout=_checked,
    table="text_model/model/embeddings/word_embeddings/embedding",
    complete=_complete,
)
