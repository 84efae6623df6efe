"""SAM's image encoder: a ViT on a map, with windows, relative positions and a neck.

The names are those of transformers' SamVisionModel below `vision_encoder`. Stages: "stem" is
patches and positions, "block_i" is `layers/i`, "top" the neck. A border's activations are a map
(n, height, width, dim). The .pth files of its authors (`image_encoder.blocks.0.attn.qkv`) are read
too, whole or the encoder alone; `SIZES` has the configs of the three that are published.

Reference: Kirillov et al. 2023, arXiv:2304.02643; Li et al. 2022, arXiv:2203.16527 (ViTDet).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jtl.models.backbone import Batch, Family, Out, Rules, run_stages
from jtl.models.heads import pool
from jtl.models.layers import Dropout, activation, attention, layer_norm, pixels
from jtl.models.layers.decomposed import decomposed_bias, resized_rows
from jtl.models.layers.interpolate import interpolate_positions
from jtl.models.layers.maps import flat
from jtl.models.layers.nest import Nest
from jtl.models.layers.patches import grid, pair
from jtl.models.layers.pointwise import pointwise
from jtl.models.layers.vit_encoder import check_heads, dense
from jtl.models.layers.windows import cut_windows, join_windows
from jtl.models.resize import channels_of
from jtl.weights.checkpoint import Checkpoint
from jtl.weights.layouts import renamed

POOLINGS = ("mean",)
_NECK_EPSILON = 1e-6

# {name of the published file: fields of its config}
SIZES: dict[str, dict[str, Any]] = {
    "vit_b": dict(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        global_attn_indexes=[2, 5, 8, 11],
    ),
    "vit_l": dict(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        global_attn_indexes=[5, 11, 17, 23],
    ),
    "vit_h": dict(
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=16,
        global_attn_indexes=[7, 15, 23, 31],
    ),
}


@dataclasses.dataclass(frozen=True)
class SamConfig:
    """The fields of `config.json` that the model reads, under their names there.

    `image_size` and `patch_size` are (height, width).
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    mlp_dim: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    output_channels: int
    window_size: int
    global_attn_indexes: tuple[int, ...]
    num_channels: int
    qkv_bias: bool
    use_abs_pos: bool
    use_rel_pos: bool
    hidden_act: str
    layer_norm_eps: float
    attention_dropout: float
    initializer_range: float

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = grid(self.image_size, self.patch_size)
        return rows, columns


def sam_config(config: Mapping[str, Any]) -> SamConfig:
    """Return the fields that the model reads, checked.

    Args:
        config: the dict of a vision config, whole; other fields are left alone.

    Raises:
        ValueError: the heads do not divide the width, the image has no patch, a global layer is
            not there, or an activation is not known.
    """
    own = {field.name: config[field.name] for field in dataclasses.fields(SamConfig)}
    for name in ("image_size", "patch_size"):
        own[name] = pair(own[name], name)
    own["global_attn_indexes"] = tuple(own["global_attn_indexes"])
    made = SamConfig(**own)
    outside = [i for i in made.global_attn_indexes if not 0 <= i < made.num_hidden_layers]
    if outside or made.window_size < 0:
        raise ValueError(
            f"global_attn_indexes={made.global_attn_indexes} and window_size={made.window_size} "
            f"of {made.num_hidden_layers} layers do not fit; give indexes from 0 to "
            f"{made.num_hidden_layers - 1}, and a window of 1 or more (0 for none)"
        )
    check_heads(made.hidden_size, made.num_attention_heads)
    grid(made.image_size, made.patch_size)
    activation(made.hidden_act)
    return made


class PatchEmbed(nn.Module):
    """A convolution whose stride is its size: `projection`; the result stays a map."""

    config: SamConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Return (n, rows, columns, dim)."""
        size = self.config.patch_size
        init = nn.initializers.normal(self.config.initializer_range)
        conv = nn.Conv(
            *(self.config.hidden_size, size, size, "VALID"),
            dtype=self.dtype,
            kernel_init=init,
            name="projection",
        )
        return conv(images)


class _Attention(nn.Module):
    """Attention of all places of a map; tables are for maps of `grid`, others are interpolated."""

    config: SamConfig
    grid: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, maps: jax.Array, live: bool) -> jax.Array:
        config, (n, height, width, dim) = self.config, maps.shape
        heads, scale = config.num_attention_heads, config.initializer_range
        fused = dense(3 * dim, scale, self.dtype, "qkv", config.qkv_bias)(flat(maps))
        fused = fused.reshape(n, height * width, 3, heads, dim // heads)
        query, key, value = (fused[:, :, i] for i in range(3))
        bias = None
        if config.use_rel_pos:
            rows, columns = (
                self.param(name, nn.initializers.zeros, (2 * side - 1, dim // heads))
                for name, side in zip(("rel_pos_h", "rel_pos_w"), self.grid, strict=True)
            )
            bias = decomposed_bias(query, rows, columns, height, width)
        rate = config.attention_dropout
        drop = Dropout(rate, deterministic=False) if live and rate else None
        inner = attention(query, key, value, bias=bias, dropout=drop)
        return dense(dim, scale, self.dtype, "proj")(inner.reshape(n, height, width, dim))


class _MLP(nn.Module):
    config: SamConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        config = self.config
        scale = config.initializer_range
        hidden = dense(config.mlp_dim, scale, self.dtype, "lin1")(hidden)
        hidden = activation(config.hidden_act)(hidden)
        return dense(config.hidden_size, scale, self.dtype, "lin2")(hidden)


class Layer(nn.Module):
    """A layer on a map, with attention inside windows or, with window 0, over all places.

    Attributes:
        config: sizes and rates.
        window: side of the windows. Maps that they do not divide get zeros at the right and the
            bottom, which are attended to, as in the published networks.
        dtype: of the computation; parameters are float32.
    """

    config: SamConfig
    window: int
    dtype: Any

    def setup(self) -> None:
        """Declare the parts."""
        side = (self.window, self.window) if self.window else self.config.grid
        self.layer_norm1 = layer_norm(self.config.layer_norm_eps, self.dtype)
        self.attn = _Attention(self.config, side, self.dtype)
        self.layer_norm2 = layer_norm(self.config.layer_norm_eps, self.dtype)
        self.mlp = _MLP(self.config, self.dtype)

    def __call__(self, hidden: jax.Array, live: bool) -> jax.Array:
        """Return a map of the shape of `hidden`."""
        inner = self.layer_norm1(hidden)
        inner = self._in_windows(inner, live) if self.window else self.attn(inner, live)
        hidden = hidden + inner
        return hidden + self.mlp(self.layer_norm2(hidden))

    def _in_windows(self, maps: jax.Array, live: bool) -> jax.Array:
        size, (height, width, dim) = self.window, maps.shape[1:]
        down, across = -height % size, -width % size
        maps = jnp.pad(maps, ((0, 0), (0, down), (0, across), (0, 0)))
        windows = cut_windows(maps, size).reshape(-1, size, size, dim)
        windows = flat(self.attn(windows, live))
        return join_windows(windows, height + down, width + across)[:, :height, :width]


class Neck(nn.Module):
    """Two convolutions without bias, a LayerNorm over the channels behind each."""

    config: SamConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Return (n, rows, columns, output_channels)."""
        init = nn.initializers.normal(self.config.initializer_range)
        for i, side in ((1, 1), (2, 3)):
            hidden = nn.Conv(
                self.config.output_channels,
                (side, side),
                padding=side // 2,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=init,
                conv_general_dilated=pointwise,
                name=f"conv{i}",
            )(hidden)
            hidden = layer_norm(_NECK_EPSILON, self.dtype, name=f"layer_norm{i}")(hidden)
        return hidden


def layers(config: SamConfig, dtype: Any) -> Nest:
    """Return all layers, each called by its number: `layers(config, dtype)("0", maps, live)`."""
    wide = config.global_attn_indexes
    windows = [0 if i in wide else config.window_size for i in range(config.num_hidden_layers)]
    return Nest(
        tuple((str(i), functools.partial(Layer, config, w, dtype)) for i, w in enumerate(windows))
    )


class Sam(nn.Module):
    """SAM's image encoder in stages; see `models/backbone.py` for the contract.

    `out` has "map" (n, rows, columns, output_channels) beside "tokens", its places row by row, and
    "pooled", their mean.

    Attributes:
        config: sizes and rates.
        pooling: "mean".
        dtype: of the computation; parameters are float32.
    """

    config: SamConfig
    pooling: str = "mean"
    dtype: Any = jnp.float32
    beside = ()

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        config = self.config
        self.patch_embed = PatchEmbed(config, self.dtype)
        if config.use_abs_pos:
            shape = (1, *config.grid, config.hidden_size)
            self.pos_embed = self.param("pos_embed", nn.initializers.zeros, shape)
        self.layers = layers(config, self.dtype)
        self.neck = Neck(config, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, rows, columns, dim)."""
        images = pixels(batch, self.config.num_channels, self.config.image_size)
        hidden = self.patch_embed(images.astype(self.dtype))
        if not self.config.use_abs_pos:
            return hidden
        return (hidden.astype(jnp.float32) + self.pos_embed).astype(self.dtype)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index`, (n, rows, columns, dim)."""
        return self.layers(str(index), hidden, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "map", "tokens" and "pooled"."""
        return from_map(self.neck(hidden))

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def from_map(maps: jax.Array) -> Out:
    """Return "map", its places as "tokens", and their mean as "pooled"."""
    tokens = flat(maps)
    return {"map": maps, "tokens": tokens, "pooled": pool({"tokens": tokens}, {}, "mean")}


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Sam:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not known to SAM; give one of {POOLINGS}")
    return Sam(sam_config(config), pooling, dtype)


def groups(config: Mapping[str, Any], pooling: str) -> Rules:
    """Return (regex, label) rules in order of depth."""
    blocks = ((rf"layers/{i}/.*", f"block_{i}") for i in range(config["num_hidden_layers"]))
    return (("patch_embed/.*", "stem"), ("pos_embed", "stem"), *blocks, ("neck/.*", "top"))


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    made = sam_config(config)
    return {"pixel_values": jnp.zeros((1, *made.image_size, made.num_channels))}


def _resize(
    params: Mapping[str, Any], config: Mapping[str, Any], size: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Interpolate the positions, and the relative ones of the layers without windows."""
    changed = {**config, "image_size": list(size)}
    old, new = sam_config(config).grid, sam_config(changed).grid
    flat_params: Any = flatten_dict(params, sep="/")
    if "pos_embed" in flat_params:
        table = flat_params["pos_embed"]
        rows = interpolate_positions(table.reshape(1, -1, table.shape[-1]), old, new)
        flat_params["pos_embed"] = rows.reshape(1, *new, -1)
    wide = config["global_attn_indexes"] if config["window_size"] else None
    for i in range(config["num_hidden_layers"]) if wide is None else wide:
        for name, side in zip(("rel_pos_h", "rel_pos_w"), new, strict=True):
            path = f"layers/{i}/attn/{name}"
            if path in flat_params:
                flat_params[path] = resized_rows(flat_params[path], 2 * side - 1)
    return unflatten_dict(flat_params, sep="/"), changed


# The authors' names.
_PUBLISHED = (
    (r"patch_embed\.proj\.(.*)", r"patch_embed.projection.\1"),
    (r"(pos_embed)", r"\1"),
    (r"blocks\.(\d+)\.norm([12])\.(.*)", r"layers.\1.layer_norm\2.\3"),
    (r"blocks\.(\d+)\.(attn\..*|mlp\.lin[12]\..*)", r"layers.\1.\2"),
    (r"neck\.0\.(.*)", r"neck.conv1.\1"),
    (r"neck\.1\.(.*)", r"neck.layer_norm1.\1"),
    (r"neck\.2\.(.*)", r"neck.conv2.\1"),
    (r"neck\.3\.(.*)", r"neck.layer_norm2.\1"),
)


def published(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Return a file of the authors, or of CellViT, under transformers' names.

    Another checkpoint comes back as it is.
    """
    first = next((n for n in checkpoint.names if n.endswith("patch_embed.proj.weight")), None)
    if first is None:
        return checkpoint
    prefix = first.removesuffix("patch_embed.proj.weight").replace(".", r"\.")
    return renamed(
        checkpoint,
        [(prefix + pattern, f"vision_encoder.{template}") for pattern, template in _PUBLISHED],
    )


RULES = (
    (r"(patch_embed/projection|neck/conv\d)/kernel", r"vision_encoder.\1.weight", "conv"),
    (r"((?:layers/\d+/(?:attn|mlp))/\w+)/kernel", r"vision_encoder.\1.weight", "dense"),
    (r"((?:layers/\d+|neck)/layer_norm\d)/scale", r"vision_encoder.\1.weight", "same"),
    (r"((?:patch_embed|layers|neck)/.*|pos_embed)", r"vision_encoder.\1", "same"),
)

SAM_VISION = Family(
    model_type="sam_vision_model",
    modality="image",
    make=_make,
    groups=groups,
    poolings=POOLINGS,
    dim=lambda config: config["output_channels"],
    example=_example,
    rules=RULES,
    ignored=(r"(prompt_encoder|mask_decoder|shared_image_embedding)[.].*", r"pixel_(mean|std)"),
    class_name="SamVisionModel",
    prefix="",
    layout=published,
    part="vision_config",
    resize=_resize,
    channels=channels_of("patch_embed/projection/kernel"),
)
