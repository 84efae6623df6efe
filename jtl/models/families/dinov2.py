"""DINOv2, with and without register tokens: ViT with layer scale, for images of any size.

The names are those of transformers' Dinov2Model. Stages: "stem" is patches, tokens and positions,
"block_i" is `encoder/layer/i`, "top" the final LayerNorm. The positions are interpolated for the
size of the images at hand, so that no size is bound to the weights. The files of its authors
(`blocks.0.attn.qkv.weight`, which timm has too) are read as well.

Reference: Oquab et al. 2023, arXiv:2304.07193; registers: Darcet et al. 2023, arXiv:2309.16588;
RAD-DINO: Perez-Garcia et al. 2024, arXiv:2401.10815.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch, Family, Out, Rules, run_stages
from jtl.models.families.vit import ALIASES, KERNEL
from jtl.models.heads import pool
from jtl.models.heads.pretrained import classification
from jtl.models.layers import activation, layer_norm, pixels
from jtl.models.layers.dropout import Dropout
from jtl.models.layers.interpolate import interpolate_positions
from jtl.models.layers.patches import Patches, grid, pair
from jtl.models.layers.vit_encoder import Attention, EncoderConfig, check_heads, dense
from jtl.models.resize import channels_of, positions_of
from jtl.weights.checkpoint import Checkpoint
from jtl.weights.layouts import joined, renamed, split

POOLINGS = ("cls", "mean", "cls_mean")


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """The fields of `config.json` that the model reads, under their names there."""

    encoder: EncoderConfig
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int = 3
    layerscale_value: float = 1.0
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    num_register_tokens: int = 0


def dinov2_config(config: Mapping[str, Any]) -> Dinov2Config:
    """Return the fields that the model reads, checked.

    Args:
        config: the dict of `config.json`, whole; other fields are left alone.

    Raises:
        ValueError: the heads do not divide the width, the image has no patch, or an activation is
            not known.
    """
    names = {field.name for field in dataclasses.fields(EncoderConfig)}
    inner = {name: config[name] for name in names if name in config}
    inner["intermediate_size"] = int(config["hidden_size"] * config["mlp_ratio"])
    registers = config["model_type"] == "dinov2_with_registers"
    made = Dinov2Config(
        EncoderConfig(**inner),
        pair(config["image_size"], "image_size"),
        pair(config["patch_size"], "patch_size"),
        config["num_channels"],
        config["layerscale_value"],
        config["use_swiglu_ffn"],
        registers or config["use_mask_token"],
        config["num_register_tokens"] if registers else 0,
    )
    check_heads(made.encoder.hidden_size, made.encoder.num_attention_heads)
    grid(made.image_size, made.patch_size)
    activation(made.encoder.hidden_act)
    return made


class _Embeddings(nn.Module):
    config: Dinov2Config
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array, live: bool) -> jax.Array:
        config, inner = self.config, self.config.encoder
        width, scale = inner.hidden_size, inner.initializer_range
        init = nn.initializers.truncated_normal(scale)
        sides = (config.image_size, images.shape[1:3])
        old, new = ((h, w) for h, w in (grid(size, config.patch_size) for size in sides))
        first = self.param("cls_token", init, (1, 1, width))
        places = self.param("position_embeddings", init, (1, old[0] * old[1] + 1, width))
        if config.use_mask_token:
            self.param("mask_token", nn.initializers.zeros, (1, width))
        patches = Patches(
            width, config.patch_size, scale, dtype=self.dtype, name="patch_embeddings"
        )(images)
        many = config.num_register_tokens
        places = interpolate_positions(places, old, new, antialias=many > 0)
        # Added in float32 whatever the dtype: their gradients are sums over all rows.
        first = first + places[:, :1]
        if many:
            registers = self.param("register_tokens", nn.initializers.zeros, (1, many, width))
            first = jnp.concatenate([first, registers], axis=1)
        first = jnp.broadcast_to(first, (patches.shape[0], *first.shape[1:]))
        hidden = patches.astype(jnp.float32) + places[:, 1:]
        hidden = jnp.concatenate([first, hidden], axis=1).astype(self.dtype)
        return Dropout(inner.hidden_dropout_prob, deterministic=not live)(hidden)


class _LayerScale(nn.Module):
    """Each channel times a learned number.

    Reference: Touvron et al. 2021, arXiv:2103.17239.
    """

    start: float

    @nn.compact
    def __call__(self, inner: jax.Array) -> jax.Array:
        scale = self.param("lambda1", nn.initializers.constant(self.start), (inner.shape[-1],))
        return inner * scale.astype(inner.dtype)[None, None]


class _MLP(nn.Module):
    """Two dense layers, or SwiGLU's three, of which two lie in one.

    Reference: Shazeer 2020, arXiv:2002.05202.
    """

    config: Dinov2Config
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        inner = self.config.encoder
        scale, wide = inner.initializer_range, inner.intermediate_size
        if self.config.use_swiglu_ffn:
            wide = (int(wide * 2 / 3) + 7) // 8 * 8
            both = dense(2 * wide, scale, self.dtype, "weights_in")(hidden)
            gate, up = jnp.split(both, 2, axis=-1)
            return dense(inner.hidden_size, scale, self.dtype, "weights_out")(
                jax.nn.silu(gate) * up
            )
        hidden = activation(inner.hidden_act)(dense(wide, scale, self.dtype, "fc1")(hidden))
        return dense(inner.hidden_size, scale, self.dtype, "fc2")(hidden)


class _Layer(nn.Module):
    config: Dinov2Config
    dtype: Any

    def setup(self) -> None:
        inner, start = self.config.encoder, self.config.layerscale_value
        self.norm1 = layer_norm(inner.layer_norm_eps, self.dtype)
        self.attention = Attention(dataclasses.replace(inner, hidden_dropout_prob=0.0), self.dtype)
        self.layer_scale1 = _LayerScale(start)
        self.norm2 = layer_norm(inner.layer_norm_eps, self.dtype)
        self.mlp = _MLP(self.config, self.dtype)
        self.layer_scale2 = _LayerScale(start)
        self.drop = nn.Dropout(inner.drop_path_rate, broadcast_dims=(1, 2))

    def __call__(self, hidden: jax.Array, live: bool) -> jax.Array:
        inner = self.layer_scale1(self.attention(self.norm1(hidden), live))
        hidden = hidden + self.drop(inner, deterministic=not live)
        inner = self.layer_scale2(self.mlp(self.norm2(hidden)))
        return hidden + self.drop(inner, deterministic=not live)


class _Layers(nn.Module):
    config: Dinov2Config
    dtype: Any

    def setup(self) -> None:
        count = range(self.config.encoder.num_hidden_layers)
        self.layers = [_Layer(self.config, self.dtype, name=str(i)) for i in count]

    def __call__(self, index: int, hidden: jax.Array, live: bool) -> jax.Array:
        return self.layers[index](hidden, live)


class _Encoder(nn.Module):
    config: Dinov2Config
    dtype: Any

    def setup(self) -> None:
        self.layer = _Layers(self.config, self.dtype)

    def __call__(self, index: int, hidden: jax.Array, live: bool) -> jax.Array:
        return self.layer(index, hidden, live)


class Dinov2(nn.Module):
    """DINOv2 in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "cls" (the first token), "mean" (of the patches, without
            CLS token and registers), or "cls_mean" (the two behind one another, twice as wide, as
            linear probes read them).
        dtype: of the computation; parameters are float32.
    """

    config: Dinov2Config
    pooling: str = "cls"
    dtype: Any = jnp.float32
    beside = ()

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        self.embeddings = _Embeddings(self.config, self.dtype)
        self.encoder = _Encoder(self.config, self.dtype)
        self.layernorm = layer_norm(self.config.encoder.layer_norm_eps, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.encoder.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, 1 + registers + patches, dim) of images of any size."""
        images = pixels(batch, self.config.num_channels)
        return self.embeddings(images.astype(self.dtype), live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index`, of the shape of `hidden`."""
        return self.encoder(index, hidden, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" (the registers among them) and "pooled"."""
        tokens = self.layernorm(hidden)
        patches = tokens[:, 1 + self.config.num_register_tokens :]
        parts = {"cls": tokens[:, 0], "mean": pool({"tokens": patches}, {}, "mean")}
        pooled = [parts[name] for name in self.pooling.split("_")]
        return {"tokens": tokens, "pooled": jnp.concatenate(pooled, axis=-1)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Dinov2:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not known to DINOv2; give one of {POOLINGS}")
    return Dinov2(dinov2_config(config), pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    layers = range(config["num_hidden_layers"])
    blocks = ((rf"encoder/layer/{i}/.*", f"block_{i}") for i in layers)
    unused = (("embeddings/mask_token", "unused"),)
    return (*unused, ("embeddings/.*", "stem"), *blocks, ("layernorm/.*", "top"))


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    made = dinov2_config(config)
    return {"pixel_values": jnp.zeros((1, *made.image_size, made.num_channels))}


_ORIGINAL = (
    (r"patch_embed\.proj\.(.*)", r"embeddings.patch_embeddings.projection.\1"),
    (r"(cls_token|mask_token|register_tokens)", r"embeddings.\1"),
    (r"reg_token", "embeddings.register_tokens"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"norm\.(.*)", r"layernorm.\1"),
    (
        r"blocks\.(\d+)\.attn\.(query|key|value)\.(.*)",
        r"encoder.layer.\1.attention.attention.\2.\3",
    ),
    (r"blocks\.(\d+)\.attn\.proj\.(.*)", r"encoder.layer.\1.attention.output.dense.\2"),
    (r"blocks\.(\d+)\.ls([12])\.gamma", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (r"blocks\.(\d+)\.mlp\.w12\.(.*)", r"encoder.layer.\1.mlp.weights_in.\2"),
    (r"blocks\.(\d+)\.mlp\.w3\.(.*)", r"encoder.layer.\1.mlp.weights_out.\2"),
    (r"blocks\.(\d+)\.(norm[12]|mlp\.fc[12])\.(.*)", r"encoder.layer.\1.\2.\3"),
)


def _published(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Return the authors' files, and what transformers 5 has in memory, under its files' names."""
    if any(re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", name) for name in checkpoint.names):
        parts = tuple(rf"\1.attn.{name}.\2" for name in ("query", "key", "value"))
        checkpoint = renamed(split(checkpoint, r"(.*)\.attn\.qkv\.(.*)", parts), _ORIGINAL)
    pieces = (r"(.*)\.mlp\.gate_proj\.(.*)", r"(.*)\.mlp\.up_proj\.(.*)")
    checkpoint = joined(checkpoint, pieces, r"\1.mlp.weights_in.\2")
    return renamed(checkpoint, [(r"(.*)\.mlp\.down_proj\.(.*)", r"\1.mlp.weights_out.\2")])


DINOV2 = Family(
    model_type="dinov2",
    modality="image",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_size"],
    dims=lambda config, pooling: config["hidden_size"] * (2 if pooling == "cls_mean" else 1),
    example=_example,
    rules=((r"(embeddings/patch_embeddings/projection)/kernel", r"\1.weight", "conv"),),
    aliases=((r"^dinov2(_with_registers)?[.]", ""), *ALIASES[2:6]),
    ignored=(r"(classifier|head)[.].*",),
    optional=("embeddings/mask_token",),
    class_name="Dinov2Model",
    heads={"classification": classification("Dinov2ForImageClassification", "cls_mean")},
    layout=_published,
    resize=positions_of("embeddings/position_embeddings"),
    channels=channels_of(KERNEL),
)

DINOV2_WITH_REGISTERS = DINOV2._replace(
    model_type="dinov2_with_registers",
    class_name="Dinov2WithRegistersModel",
    heads={
        "classification": classification("Dinov2WithRegistersForImageClassification", "cls_mean")
    },
    resize=positions_of("embeddings/position_embeddings", antialias=True),
)
