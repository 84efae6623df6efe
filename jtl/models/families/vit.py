"""ViT: patches, encoder, final LayerNorm, pooler.

The tree of parameters is that of transformers' FlaxViTModel. Stages: "stem" is patches, CLS token
and positions, "block_i" is `encoder/layer/i`, "top" is the final LayerNorm, and the pooler where
it is read.

Reference: Dosovitskiy et al. 2020, arXiv:2010.11929; stochastic depth: Huang et al. 2016,
arXiv:1603.09382.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import UNUSED, Batch, Family, Out, Rules, run_stages
from jtl.models.heads import pool
from jtl.models.heads.pretrained import classification
from jtl.models.layers import Dropout, SelfAttention, activation, flat_dot, layer_norm, pixels

POOLINGS = ("cls", "mean", "pooler")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The fields of `config.json` that the encoder reads, under their names there.

    `image_size` and `patch_size` are (height, width). `drop_path_rate` is the rate of stochastic
    depth in the last block; it grows evenly from 0 in the first one. transformers' ViT has none.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int = 3
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.0
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pooler_act: str = "tanh"
    pooler_output_size: int | None = None

    @property
    def patches(self) -> int:
        """Number of patches; what is left of an image at its right and lower edge is not read."""
        (height, width), (high, wide) = self.image_size, self.patch_size
        return (height // high) * (width // wide)


def vit_config(config: Mapping[str, Any]) -> ViTConfig:
    """Return the fields that the encoder reads, checked.

    Args:
        config: the dict of `config.json`; other fields are left alone.

    Raises:
        ValueError: a size is missing, the heads do not divide the width, the image has no patch,
            or an activation is not known.

    >>> sizes = dict(hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
    >>> vit_config(dict(sizes, intermediate_size=8, image_size=[8, 12], patch_size=4)).patches
    6
    """
    fields = dataclasses.fields(ViTConfig)
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [name for name in needed if config.get(name) is None]
    if missing:
        raise ValueError(
            f"the ViT config lacks {missing}; it has {sorted(config)}; "
            "add them, or correct model_type if the checkpoint is no ViT"
        )
    own = {f.name: config[f.name] for f in fields if config.get(f.name) is not None}
    for name in ("image_size", "patch_size"):
        own[name] = _pair(own[name], name)
    made = ViTConfig(**own)
    if made.hidden_size % made.num_attention_heads:
        raise ValueError(
            f"num_attention_heads={made.num_attention_heads} does not divide "
            f"hidden_size={made.hidden_size}; give a number of heads that does"
        )
    if made.patches < 1:
        raise ValueError(
            f"image_size={made.image_size} has no patch of patch_size={made.patch_size}; "
            "give larger images or smaller patches"
        )
    activation(made.hidden_act)
    activation(made.pooler_act)
    return made


def _pair(value: Any, name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"{name} is {value!r}; give one whole number, or (height, width)")
    return pair


def _dense(width: int, config: ViTConfig, dtype: Any, name: str = "dense") -> nn.Dense:
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(width, dtype=dtype, kernel_init=init, dot_general=flat_dot, name=name)


class _Patches(nn.Module):
    """One convolution whose stride is its size: each patch to one vector."""

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        config = self.config
        maps = nn.Conv(
            config.hidden_size,
            config.patch_size,
            strides=config.patch_size,
            padding="VALID",
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(config.initializer_range),
            name="projection",
        )(images)
        return maps.reshape(maps.shape[0], -1, maps.shape[-1])


class _Embeddings(nn.Module):
    """CLS token before the patches, positions added, dropout."""

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array, live: bool) -> jax.Array:
        config, width = self.config, self.config.hidden_size
        init = nn.initializers.truncated_normal(config.initializer_range)
        first = self.param("cls_token", init, (1, 1, width))
        places = self.param("position_embeddings", init, (1, config.patches + 1, width))
        hidden = _Patches(config, self.dtype, name="patch_embeddings")(images)
        first = jnp.broadcast_to(first, (hidden.shape[0], 1, width))
        # Added in float32 whatever the dtype: their gradients are sums over all rows.
        hidden = jnp.concatenate([first, hidden.astype(jnp.float32)], axis=1) + places
        hidden = hidden.astype(self.dtype)
        return Dropout(config.hidden_dropout_prob, deterministic=not live)(hidden)


class _Output(nn.Module):
    """Dense layer and dropout; the caller adds the residual stream."""

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, inner: jax.Array, live: bool) -> jax.Array:
        inner = _dense(self.config.hidden_size, self.config, self.dtype)(inner)
        return Dropout(self.config.hidden_dropout_prob, deterministic=not live)(inner)


class _Attention(nn.Module):
    config: ViTConfig
    dtype: Any

    def setup(self) -> None:
        config = self.config
        self.attention = SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            dropout=config.attention_probs_dropout_prob,
            bias=config.qkv_bias,
            scale=config.initializer_range,
            dtype=self.dtype,
        )
        self.output = _Output(config, self.dtype)

    def __call__(self, hidden: jax.Array, live: bool) -> jax.Array:
        return self.output(self.attention(hidden, None, live), live)


class _Intermediate(nn.Module):
    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        wide = _dense(self.config.intermediate_size, self.config, self.dtype)(hidden)
        return activation(self.config.hidden_act)(wide)


class _Layer(nn.Module):
    """Attention, then MLP, each behind a LayerNorm and added to the residual stream."""

    config: ViTConfig
    drop_path: float
    dtype: Any

    def setup(self) -> None:
        self.attention = _Attention(self.config, self.dtype)
        self.intermediate = _Intermediate(self.config, self.dtype)
        self.output = _Output(self.config, self.dtype)
        self.layernorm_before = layer_norm(self.config.layer_norm_eps, self.dtype)
        self.layernorm_after = layer_norm(self.config.layer_norm_eps, self.dtype)
        self.drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2))

    def __call__(self, hidden: jax.Array, live: bool) -> jax.Array:
        inner = self.attention(self.layernorm_before(hidden), live)
        hidden = hidden + self.drop(inner, deterministic=not live)
        inner = self.output(self.intermediate(self.layernorm_after(hidden)), live)
        return hidden + self.drop(inner, deterministic=not live)


class _Layers(nn.Module):
    """The layers under the names "0", "1", ... as in the checkpoints."""

    config: ViTConfig
    dtype: Any

    def setup(self) -> None:
        count = self.config.num_hidden_layers
        rates = [self.config.drop_path_rate * i / max(count - 1, 1) for i in range(count)]
        self.layers = [
            _Layer(self.config, rate, self.dtype, name=str(i)) for i, rate in enumerate(rates)
        ]

    def __call__(self, index: int, hidden: jax.Array, live: bool) -> jax.Array:
        return self.layers[index](hidden, live)


class _Encoder(nn.Module):
    config: ViTConfig
    dtype: Any

    def setup(self) -> None:
        self.layer = _Layers(self.config, self.dtype)

    def __call__(self, index: int, hidden: jax.Array, live: bool) -> jax.Array:
        return self.layer(index, hidden, live)


class _Pooler(nn.Module):
    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        width = self.config.pooler_output_size or self.config.hidden_size
        pooled = _dense(width, self.config, self.dtype)(tokens[:, 0])
        return activation(self.config.pooler_act)(pooled)


class ViT(nn.Module):
    """The ViT encoder in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "cls" (the first token), "mean" (of the patches, without
            the CLS token) or "pooler" (a dense layer and tanh on the first token).
        dtype: of the computation; parameters are float32.
    """

    config: ViTConfig
    pooling: str = "cls"
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        self.embeddings = _Embeddings(self.config, self.dtype)
        self.encoder = _Encoder(self.config, self.dtype)
        self.layernorm = layer_norm(self.config.layer_norm_eps, self.dtype)
        self.pooler = _Pooler(self.config, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, 1 + patches, dim)."""
        images = pixels(batch, self.config.num_channels, self.config.image_size)
        return self.embeddings(images.astype(self.dtype), live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index` (n, 1 + patches, dim)."""
        return self.encoder(index, hidden, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" and "pooled"; the pooler's weights exist under every pooling."""
        tokens = self.layernorm(hidden)
        if self.pooling == "pooler" or self.is_initializing():
            pooled = self.pooler(tokens)
            if self.pooling == "pooler":
                return {"tokens": tokens, "pooled": pooled}
        read = tokens[:, 1:] if self.pooling == "mean" else tokens
        return {"tokens": tokens, "pooled": pool({"tokens": read}, {}, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> ViT:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not known to ViT; give one of {POOLINGS}")
    made = vit_config(config)
    if pooling == "pooler" and made.pooler_output_size not in (None, made.hidden_size):
        raise ValueError(
            f"the pooler has width {made.pooler_output_size}, the tokens {made.hidden_size}; "
            "features have one width here; take pooling='cls' or 'mean'"
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
_ALIASES = (
    (r"^vit[.]", ""),
    (r"^layers[.](\d+)[.]", r"encoder.layer.\1."),
    (r"[.]attention[.]q_proj[.]", ".attention.attention.query."),
    (r"[.]attention[.]k_proj[.]", ".attention.attention.key."),
    (r"[.]attention[.]v_proj[.]", ".attention.attention.value."),
    (r"[.]attention[.]o_proj[.]", ".attention.output.dense."),
    (r"[.]mlp[.]fc1[.]", ".intermediate.dense."),
    (r"[.]mlp[.]fc2[.]", ".output.dense."),
)

VIT = Family(
    model_type="vit",
    modality="image",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_size"],
    example=_example,
    rules=((r"(embeddings/patch_embeddings/projection)/kernel", r"\1.weight", "conv"),),
    aliases=_ALIASES,
    optional=("pooler/.*",),
    ignored=(r"embeddings[.]mask_token", r"(classifier|decoder)[.].*"),
    class_name="ViTModel",
    heads={"classification": classification("ViTForImageClassification", "cls")},
)
