"""ViT and DeiT: patches, encoder, final LayerNorm, pooler.

The tree of parameters is that of transformers' FlaxViTModel; DeiT's has a distillation token beside
the CLS token. Stages: "stem" is patches, tokens and positions, "block_i" is `encoder/layer/i`,
"top" is the final LayerNorm, and the pooler where it is read. timm's checkpoints, the .pth files of
DINO, DeiT and MAE and the .npz files of ViT's authors are read too, see `vit_layouts.py`.

Reference: Dosovitskiy et al. 2020, arXiv:2010.11929; Touvron et al. 2020, arXiv:2012.12877.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import UNUSED, Batch, Family, Out, Rules, run_stages
from jtl.models.families.vit_layouts import published
from jtl.models.heads import pool
from jtl.models.heads.pretrained import classification, distilled
from jtl.models.layers import Dropout, activation, layer_norm, pixels
from jtl.models.layers.patches import Patches, grid, pair
from jtl.models.layers.sincos import sincos_2d
from jtl.models.layers.vit_encoder import Encoder, EncoderConfig, check_heads, dense
from jtl.models.resize import channels_of, positions_of

POOLINGS = ("cls", "mean", "mean_norm", "pooler")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The fields of `config.json` that the model reads, under their names there.

    `image_size` and `patch_size` are (height, width). `pre_norm` is a LayerNorm on the embeddings,
    which timm's CLIP has. `tokens` is the number of tokens before the patches: 1, with DeiT's 2.
    `sincos` has the positions begin as MAE's fixed sines and cosines.
    """

    encoder: EncoderConfig
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int = 3
    pooler_act: str = "tanh"
    pooler_output_size: int | None = None
    pre_norm: bool = False
    tokens: int = 1
    sincos: bool = False

    @property
    def patches(self) -> int:
        """Number of patches; what is left of an image at its right and lower edge is not read."""
        rows, columns = grid(self.image_size, self.patch_size)
        return rows * columns


def vit_config(config: Mapping[str, Any]) -> ViTConfig:
    """Return the fields that the model reads, checked.

    Args:
        config: the dict of `config.json`; other fields are left alone.

    Raises:
        ValueError: a size is missing, the heads do not divide the width, the image has no patch,
            or an activation is not known.

    >>> sizes = dict(hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
    >>> vit_config(dict(sizes, intermediate_size=8, image_size=[8, 12], patch_size=4)).patches
    6
    """
    fields = [*dataclasses.fields(EncoderConfig), *dataclasses.fields(ViTConfig)[1:-2]]
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [name for name in needed if config.get(name) is None]
    if missing:
        raise ValueError(
            f"the ViT config lacks {missing}; it has {sorted(config)}; "
            "add them, or correct model_type if the checkpoint is no ViT"
        )
    own = {f.name: config[f.name] for f in fields if config.get(f.name) is not None}
    inner = {f.name: own.pop(f.name) for f in dataclasses.fields(EncoderConfig) if f.name in own}
    for name in ("image_size", "patch_size"):
        own[name] = pair(own[name], name)
    kind = config.get("model_type")
    tokens = 2 if kind == "deit" else 1
    made = ViTConfig(EncoderConfig(**inner), tokens=tokens, sincos=kind == "vit_mae", **own)
    check_heads(made.encoder.hidden_size, made.encoder.num_attention_heads)
    grid(made.image_size, made.patch_size)
    activation(made.encoder.hidden_act)
    activation(made.pooler_act)
    return made


class Embeddings(nn.Module):
    """Tokens before the patches, positions added, dropout.

    Attributes:
        config: sizes.
        dtype: of the computation; parameters are float32.
    """

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array, live: bool, keep: jax.Array | None = None) -> jax.Array:
        """Return (n, tokens + patches, dim), of the patches `keep` (n, kept) where it is given."""
        config, inner = self.config, self.config.encoder
        width, scale = inner.hidden_size, inner.initializer_range
        init = nn.initializers.truncated_normal(scale)
        names = ("cls_token", "distillation_token")[: config.tokens]
        first = jnp.concatenate([self.param(name, init, (1, 1, width)) for name in names], axis=1)
        shape = (1, config.patches + config.tokens, width)
        places = self.param("position_embeddings", self._fixed if config.sincos else init, shape)
        if keep is not None:  # while patches are hidden the positions do not learn
            places = jax.lax.stop_gradient(places)
        patches = Patches(
            width, config.patch_size, scale, dtype=self.dtype, name="patch_embeddings"
        )(images)
        # Added in float32 whatever the dtype: their gradients are sums over all rows.
        hidden = patches.astype(jnp.float32) + places[:, config.tokens :]
        if keep is not None:
            hidden = jnp.take_along_axis(hidden, keep[:, :, None], axis=1)
        first = first + places[:, : config.tokens]
        first = jnp.broadcast_to(first, (hidden.shape[0], *first.shape[1:]))
        hidden = jnp.concatenate([first, hidden], axis=1).astype(self.dtype)
        hidden = Dropout(inner.hidden_dropout_prob, deterministic=not live)(hidden)
        if config.pre_norm:
            hidden = layer_norm(inner.layer_norm_eps, self.dtype, name="norm_pre")(hidden)
        return hidden

    def _fixed(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        rows, columns = grid(self.config.image_size, self.config.patch_size)
        return jnp.asarray(sincos_2d(rows, columns, shape[-1], before=self.config.tokens))[None]


class _Pooler(nn.Module):
    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        inner = self.config.encoder
        width = self.config.pooler_output_size or inner.hidden_size
        pooled = dense(width, inner.initializer_range, self.dtype)(tokens[:, 0])
        return activation(self.config.pooler_act)(pooled)


class ViT(nn.Module):
    """The ViT in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "cls" (the first token), "mean" (of the patches, without
            the tokens before them), "mean_norm" (the final LayerNorm on the mean of the patches
            before it, as MAE fine-tunes; "tokens" then are without it), "pooler" (a dense layer and
            tanh on the first token), or, for DeiT, "distilled" (the mean of its two tokens).
        dtype: of the computation; parameters are float32.
    """

    config: ViTConfig
    pooling: str = "cls"
    dtype: Any = jnp.float32
    beside = ()

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        self.embeddings = Embeddings(self.config, self.dtype)
        self.encoder = Encoder(self.config.encoder, self.dtype)
        self.layernorm = layer_norm(self.config.encoder.layer_norm_eps, self.dtype)
        self.pooler = _Pooler(self.config, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.encoder.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, tokens + patches, dim)."""
        images = pixels(batch, self.config.num_channels, self.config.image_size)
        return self.embeddings(images.astype(self.dtype), live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index` (n, tokens + patches, dim)."""
        return self.encoder(index, hidden, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" and "pooled"; the pooler's weights exist under every pooling."""
        first = self.config.tokens
        if self.pooling == "mean_norm" and not self.is_initializing():
            pooled = self.layernorm(pool({"tokens": hidden[:, first:]}, {}, "mean"))
            return {"tokens": hidden, "pooled": pooled}
        tokens = self.layernorm(hidden)
        if self.pooling == "pooler" or self.is_initializing():
            pooled = self.pooler(tokens)
            if self.pooling == "pooler":
                return {"tokens": tokens, "pooled": pooled}
        read = {"mean": tokens[:, first:], "distilled": tokens[:, :2]}.get(self.pooling, tokens)
        how = "cls" if self.pooling in ("cls", "mean_norm") else "mean"
        return {"tokens": tokens, "pooled": pool({"tokens": read}, {}, how)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> ViT:
    made = vit_config(config)
    poolings = (*POOLINGS, "distilled") if made.tokens == 2 else POOLINGS
    if pooling not in poolings:
        raise ValueError(f"pooling {pooling!r} is not known to ViT; give one of {poolings}")
    if pooling == "pooler" and made.pooler_output_size not in (None, made.encoder.hidden_size):
        raise ValueError(
            f"the pooler has width {made.pooler_output_size}, the tokens "
            f"{made.encoder.hidden_size}; features have one width here; "
            "take pooling='cls' or 'mean'"
        )
    return ViT(made, pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    layers = range(config["num_hidden_layers"])
    blocks = ((rf"encoder/layer/{i}/.*", f"block_{i}") for i in layers)
    pooler = "top" if pooling == "pooler" else UNUSED
    return (("embeddings/.*", "stem"), *blocks, ("layernorm/.*", "top"), ("pooler/.*", pooler))


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    made = vit_config(config)
    return {"pixel_values": jnp.zeros((1, *made.image_size, made.num_channels))}


# The second to the last bring the names that transformers 5 has in memory to those of its files.
ALIASES = (
    (r"^(vit|deit)[.]", ""),
    (r"^layers[.](\d+)[.]", r"encoder.layer.\1."),
    (r"[.]attention[.]q_proj[.]", ".attention.attention.query."),
    (r"[.]attention[.]k_proj[.]", ".attention.attention.key."),
    (r"[.]attention[.]v_proj[.]", ".attention.attention.value."),
    (r"[.]attention[.]o_proj[.]", ".attention.output.dense."),
    (r"[.]mlp[.]fc1[.]", ".intermediate.dense."),
    (r"[.]mlp[.]fc2[.]", ".output.dense."),
)
KERNEL = "embeddings/patch_embeddings/projection/kernel"

VIT = Family(
    model_type="vit",
    modality="image",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_size"],
    example=_example,
    rules=((r"(embeddings/patch_embeddings/projection)/kernel", r"\1.weight", "conv"),),
    aliases=ALIASES,
    optional=("pooler/.*",),
    ignored=(r"embeddings[.]mask_token", r"(\w*classifier|decoder)[.].*"),
    class_name="ViTModel",
    heads={"classification": classification("ViTForImageClassification", "cls")},
    layout=published,
    resize=positions_of("embeddings/position_embeddings"),
    channels=channels_of(KERNEL),
)

DEIT = VIT._replace(
    model_type="deit",
    poolings=(*POOLINGS, "distilled"),
    class_name="DeiTModel",
    heads={
        "classification": classification("DeiTForImageClassification", "cls"),
        "distilled_classification": distilled("DeiTForImageClassificationWithTeacher"),
    },
)
