"""Swin: attention inside windows that shift from layer to layer, over maps that get smaller.

The names are those of transformers' SwinModel; checkpoints in the names of the authors
(`layers.0.blocks.0.attn.qkv`) and of timm are read too. Stages: "stem" is the patches, "block_i"
the i-th layer over all of `encoder/layers/*/blocks/*`, "top" the final LayerNorm. The merging of
patches at the end of a stage belongs to the stage's last block, under whose stage its names lie.

Reference: Liu et al. 2021, arXiv:2103.14030.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch, Family, Out, Rules, run_stages
from jtl.models.heads import pool
from jtl.models.heads.pretrained import classification
from jtl.models.layers import Dropout, activation, flat_dot, layer_norm, pixels
from jtl.models.layers.maps import flat
from jtl.models.layers.nest import Nest
from jtl.models.layers.stated import one_for_each_stage, places, stated
from jtl.models.layers.stochastic_depth import StochasticDepth, growing_rates
from jtl.models.layers.window_attention import WindowAttention
from jtl.models.layers.windows import padded
from jtl.models.resize import any_size, channels_of
from jtl.weights.checkpoint import Checkpoint
from jtl.weights.layouts import renamed, split

POOLINGS = ("mean",)
_EPSILON = 1e-5  # of the norms of patches and of merging; the config has that of the others


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """The fields of `config.json` that the network reads, under their names there.

    `drop_path_rate` is the rate of stochastic depth in the last layer; it grows evenly from 0 in
    the first, and is over both branches, as the authors have it.
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int = 7
    patch_size: int | tuple[int, int] = 4
    image_size: int | tuple[int, int] = 224
    num_channels: int = 3
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_absolute_embeddings: bool = False

    @property
    def patch(self) -> tuple[int, int]:
        """(height, width) of a patch."""
        size = self.patch_size
        return (size, size) if isinstance(size, int) else size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches of an image of the config's size."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return height // self.patch[0], width // self.patch[1]


def swin_config(config: Mapping[str, Any]) -> SwinConfig:
    """Return the fields that the network reads, checked.

    Args:
        config: the dict of `config.json`; other fields are left alone.

    Raises:
        ValueError: a size is missing, sizes do not fit together, or an activation is not known.

    >>> swin_config(dict(embed_dim=8, depths=[1, 1], num_heads=[2, 4])).grid
    (56, 56)
    """
    made = stated(SwinConfig, config, "Swin")
    one_for_each_stage("Swin", depths=made.depths, num_heads=made.num_heads)
    widths = tuple(made.embed_dim * 2**stage for stage in range(len(made.depths)))
    if any(width % heads for width, heads in zip(widths, made.num_heads, strict=True)):
        raise ValueError(
            f"num_heads={made.num_heads} do not divide the widths {widths} of the stages; "
            "give numbers of heads that do"
        )
    activation(made.hidden_act)
    return made


def _dense(width: int, config: SwinConfig, dtype: Any, name: str, bias: bool = True) -> nn.Dense:
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(
        width, use_bias=bias, dtype=dtype, kernel_init=init, dot_general=flat_dot, name=name
    )


class _Patches(nn.Module):
    config: SwinConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        config = self.config
        return nn.Conv(
            config.embed_dim,
            config.patch,
            strides=config.patch,
            padding="VALID",
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(config.initializer_range),
            name="projection",
        )(padded(images, *config.patch))


class _Embeddings(nn.Module):
    """Patches, LayerNorm, positions where the config has them, dropout."""

    config: SwinConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array, live: bool) -> jax.Array:
        config = self.config
        hidden = _Patches(config, self.dtype, name="patch_embeddings")(images)
        hidden = layer_norm(_EPSILON, self.dtype, name="norm")(hidden)
        if config.use_absolute_embeddings:
            rows, columns = config.grid
            if hidden.shape[1:3] != (rows, columns):
                raise ValueError(
                    f"the images have {hidden.shape[1:3]} patches; the model has positions for "
                    f"{(rows, columns)}; resize the images, or take a checkpoint of their size"
                )
            init, shape = nn.initializers.zeros, (1, rows * columns, config.embed_dim)
            table = self.param("position_embeddings", init, shape)
            # Added in float32 whatever the dtype: their gradients are sums over all rows.
            hidden = hidden.astype(jnp.float32) + table.reshape(1, rows, columns, -1)
            hidden = hidden.astype(self.dtype)
        return Dropout(config.hidden_dropout_prob, deterministic=not live)(hidden)


class _Output(nn.Module):
    config: SwinConfig
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, inner: jax.Array, live: bool) -> jax.Array:
        inner = _dense(self.width, self.config, self.dtype, "dense")(inner)
        return Dropout(self.config.hidden_dropout_prob, deterministic=not live)(inner)


class _Attention(nn.Module):
    config: SwinConfig
    heads: int
    shift: int
    dtype: Any

    @nn.compact
    def __call__(self, maps: jax.Array, live: bool) -> jax.Array:
        config = self.config
        inner = WindowAttention(
            self.heads,
            config.window_size,
            self.shift,
            dropout=config.attention_probs_dropout_prob,
            bias=config.qkv_bias,
            scale=config.initializer_range,
            dtype=self.dtype,
            name="self",
        )(maps, live)
        return _Output(config, maps.shape[-1], self.dtype, name="output")(inner, live)


class _Intermediate(nn.Module):
    config: SwinConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        width = int(self.config.mlp_ratio * hidden.shape[-1])
        wide = _dense(width, self.config, self.dtype, "dense")(hidden)
        return activation(self.config.hidden_act)(wide)


class _Layer(nn.Module):
    """Attention, then MLP, each behind a LayerNorm and added to the stream."""

    config: SwinConfig
    heads: int
    shift: int
    rate: float
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, live: bool) -> jax.Array:
        config, dtype, dim = self.config, self.dtype, hidden.shape[-1]
        drop = StochasticDepth(self.rate)
        inner = layer_norm(config.layer_norm_eps, dtype, name="layernorm_before")(hidden)
        attended = _Attention(config, self.heads, self.shift, dtype, name="attention")(inner, live)
        hidden = hidden + drop(attended, live)
        inner = layer_norm(config.layer_norm_eps, dtype, name="layernorm_after")(hidden)
        inner = _Intermediate(config, dtype, name="intermediate")(inner)
        inner = _Output(config, dim, dtype, name="output")(inner, live)
        return hidden + drop(inner, live)


class _Merging(nn.Module):
    """Four neighbours to one place of twice the width; odd sides are padded."""

    config: SwinConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        dim, whole = hidden.shape[-1], padded(hidden, 2, 2)
        four = [whole[:, row::2, column::2] for column in range(2) for row in range(2)]
        joined = layer_norm(_EPSILON, self.dtype, name="norm")(jnp.concatenate(four, -1))
        return _dense(2 * dim, self.config, self.dtype, "reduction", bias=False)(joined)


class Swin(nn.Module):
    """Swin in stages; see `models/backbone.py` for the contract.

    A border's activations are maps (n, height, width, channels); "tokens" are the places of the
    last map, "pooled" is their mean. Images may have any size that no map makes smaller than a
    window.

    Attributes:
        config: sizes and rates.
        pooling: "mean".
        dtype: of the computation; parameters are float32.
    """

    config: SwinConfig
    pooling: str = "mean"
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        config = self.config
        stages = range(len(config.depths) - 1)
        merging = functools.partial(_Merging, config, self.dtype)
        self.embeddings = _Embeddings(config, self.dtype)
        self.encoder = Nest((*self._layers(), *((_merging(stage), merging) for stage in stages)))
        self.layernorm = layer_norm(config.layer_norm_eps, self.dtype)

    def _layers(self) -> tuple[tuple[str, Any], ...]:
        config, made = self.config, []
        rates = growing_rates(config.drop_path_rate, self.blocks)
        for rate, (stage, layer) in zip(rates, places(config.depths), strict=True):
            own = (config.num_heads[stage], layer % 2 * (config.window_size // 2), rate)
            made.append((_path(stage, layer), functools.partial(_Layer, config, *own, self.dtype)))
        return tuple(made)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return sum(self.config.depths)

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the map of patches."""
        images = pixels(batch, self.config.num_channels)
        return self.embeddings(images.astype(self.dtype), live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the map after layer `index`, merged where it is the last of its stage."""
        depths = self.config.depths
        stage, layer = places(depths)[index]
        hidden = self.encoder(_path(stage, layer), hidden, live)
        if layer == depths[stage] - 1 and stage < len(depths) - 1:
            hidden = self.encoder(_merging(stage), hidden)
        return hidden

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" (n, height * width, dim) and "pooled" (n, dim)."""
        tokens = self.layernorm(flat(hidden))
        return {"tokens": tokens, "pooled": pool({"tokens": tokens}, {}, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _path(stage: int, layer: int) -> str:
    return f"layers/{stage}/blocks/{layer}"


def _merging(stage: int) -> str:
    return f"layers/{stage}/downsample"


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Swin:
    return Swin(swin_config(config), pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    depths, blocks = config["depths"], []
    for i, (stage, layer) in enumerate(places(tuple(depths))):
        blocks.append((f"encoder/{_path(stage, layer)}/.*", f"block_{i}"))
        if layer == depths[stage] - 1 and stage < len(depths) - 1:
            blocks.append((f"encoder/{_merging(stage)}/.*", f"block_{i}"))
    return (("embeddings/.*", "stem"), *blocks, ("layernorm/.*", "top"))


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    made = swin_config(config)
    sides = tuple(own * patch for own, patch in zip(made.grid, made.patch, strict=True))
    return {"pixel_values": jnp.zeros((1, *sides, made.num_channels))}


_AT = r"encoder.layers.\1.blocks.\2."
_BLOCK = r"layers[.](\d+)[.]blocks[.](\d+)[.]"
# The authors' names, which are timm's but for the place of merging and the head.
_FOREIGN = (
    (r"patch_embed[.]proj[.](.*)", r"embeddings.patch_embeddings.projection.\1"),
    (r"patch_embed[.]norm[.](.*)", r"embeddings.norm.\1"),
    ("absolute_pos_embed", "embeddings.position_embeddings"),
    (_BLOCK + r"(?:attn_mask|attn[.]relative_position_index)", None),
    (_BLOCK + r"norm1[.](.*)", _AT + r"layernorm_before.\3"),
    (_BLOCK + r"norm2[.](.*)", _AT + r"layernorm_after.\3"),
    (_BLOCK + r"attn[.]((?:query|key|value)[.].*)", _AT + r"attention.self.\3"),
    (_BLOCK + r"attn[.](relative_position_bias_table)", _AT + r"attention.self.\3"),
    (_BLOCK + r"attn[.]proj[.](.*)", _AT + r"attention.output.dense.\3"),
    (_BLOCK + r"mlp[.]fc1[.](.*)", _AT + r"intermediate.dense.\3"),
    (_BLOCK + r"mlp[.]fc2[.](.*)", _AT + r"output.dense.\3"),
    (r"norm[.](.*)", r"layernorm.\1"),
    (r"head[.](?:fc[.])?(weight|bias)", r"classifier.\1"),
)


def _layout(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Bring the authors' names and timm's to transformers'."""
    if "patch_embed.proj.weight" not in checkpoint.names:
        return checkpoint
    later = "layers.0.downsample.norm.weight" not in checkpoint.names  # timm's, a stage on
    merging = (
        r"layers[.](\d+)[.]downsample[.](.*)",
        lambda m: f"encoder.layers.{int(m[1]) - later}.downsample.{m[2]}",
    )
    parts = tuple(rf"\1.attn.{name}.\2" for name in ("query", "key", "value"))
    checkpoint = split(checkpoint, r"(layers[.].*)[.]attn[.]qkv[.](.*)", parts)
    return renamed(checkpoint, (merging, *_FOREIGN))


SWIN = Family(
    model_type="swin",
    modality="image",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["embed_dim"] * 2 ** (len(config["depths"]) - 1),
    example=_example,
    resize=any_size,
    channels=channels_of("embeddings/patch_embeddings/projection/kernel"),
    rules=((r"(.*/projection)/kernel", r"\1.weight", "conv"),),
    aliases=(
        (r"^swin[.]", ""),
        # The names that transformers 5 has in memory, to those of its files.
        (r"[.]attention[.]q_proj[.]", ".attention.self.query."),
        (r"[.]attention[.]k_proj[.]", ".attention.self.key."),
        (r"[.]attention[.]v_proj[.]", ".attention.self.value."),
        (r"[.]attention[.]o_proj[.]", ".attention.output.dense."),
        (r"[.]attention[.]relative_position_bias[.]", ".attention.self."),
        (r"[.]mlp[.]fc1[.]", ".intermediate.dense."),
        (r"[.]mlp[.]fc2[.]", ".output.dense."),
    ),
    ignored=(
        r".*relative_position_index",
        r"embeddings[.]mask_token",
        r"(classifier|decoder)[.].*",
    ),
    layout=_layout,
    class_name="SwinModel",
    heads={"classification": classification("SwinForImageClassification", "mean")},
)
