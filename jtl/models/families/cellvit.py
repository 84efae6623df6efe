"""CellViT's encoders, a DINO ViT ("cellvit") and SAM's ("cellvit_sam"), with the depths read above.

The decoder of nuclei maps is a head, `heads.CellDecoder`; it reads the outputs of four layers. So
that a border's column holds all that is read above it, `hidden` is the stream with the outputs of
those layers behind it along its positions (along the rows of SAM's maps), and the top gives them
as `out["skips"]` (n, 4, positions, dim), without the CLS token. The decoder reads the image too,
which stays in the batch (`beside`).

CellViT's own files are read as they are, see `cellvit_files.py`.

Reference: Hörst et al. 2023, arXiv:2306.15350; ViT-256: Chen et al. 2022, arXiv:2206.02647.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import (
    Backbone,
    Batch,
    Family,
    Out,
    PretrainedHead,
    Rules,
    run_stages,
)
from jtl.models.families import cellvit_files, sam
from jtl.models.heads import CellDecoder, Linear, pool
from jtl.models.layers import Dropout, layer_norm, pixels
from jtl.models.layers.interpolate import interpolate_positions
from jtl.models.layers.maps import flat
from jtl.models.layers.patches import Patches, grid, pair
from jtl.models.layers.vit_encoder import Encoder, EncoderConfig, check_heads
from jtl.models.resize import channels_of

POOLINGS = ("cls", "mean")


@dataclasses.dataclass(frozen=True)
class CellViTConfig:
    """What the ViT reads: sizes of its layers, and after which of them depths are taken."""

    encoder: EncoderConfig
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int
    extract_layers: tuple[int, ...]


def cellvit_config(config: Mapping[str, Any]) -> CellViTConfig:
    """Return the fields that the ViT reads, checked.

    Args:
        config: whole; other fields are left alone.

    Raises:
        ValueError: the heads do not divide the width, the image has no patch, or the depths are not
            four layers in rising order.
    """
    names = {field.name for field in dataclasses.fields(EncoderConfig)}
    inner = {name: config[name] for name in names if name in config}
    inner["intermediate_size"] = int(config["hidden_size"] * config["mlp_ratio"])
    made = CellViTConfig(
        EncoderConfig(**inner),
        pair(config["image_size"], "image_size"),
        pair(config["patch_size"], "patch_size"),
        config["num_channels"],
        depths(config),
    )
    check_heads(made.encoder.hidden_size, made.encoder.num_attention_heads)
    grid(made.image_size, made.patch_size)
    return made


def depths(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return after how many layers each of the four depths is taken.

    Raises:
        ValueError: they are not four in rising order, of the layers that there are.

    >>> depths({"num_hidden_layers": 12, "extract_layers": [3, 6, 9, 12]})
    (3, 6, 9, 12)
    """
    layers, found = config["num_hidden_layers"], tuple(config["extract_layers"])
    rising = all(a < b for a, b in zip((0, *found), (*found, layers + 1), strict=True))
    if len(found) != 4 or not rising:
        raise ValueError(
            f"extract_layers={found} of {layers} layers; CellViT's decoder reads four depths; give "
            "four numbers of layers in rising order"
        )
    return found


def _held(taken: tuple[int, ...], done: int) -> int:
    """Return how many streams lie in `hidden` where `done` layers are finished."""
    return 1 + sum(layer < done for layer in taken)


def _parts(hidden: jax.Array, taken: tuple[int, ...], done: int) -> list[jax.Array]:
    """Return the stream, and all depths up to `done` layers."""
    parts = jnp.split(hidden, _held(taken, done), axis=1)
    return [*parts, parts[0]] if done in taken else parts


class CellViT(nn.Module):
    """The ViT in stages; see `models/backbone.py` for the contract, the file's head for `hidden`.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "cls" (the first token, which the classifier of tissues
            reads) or "mean" (of the patches).
        dtype: of the computation; parameters are float32.
    """

    config: CellViTConfig
    pooling: str = "cls"
    dtype: Any = jnp.float32
    beside = ("pixel_values",)

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        self.embeddings = _Embeddings(self.config, self.dtype)
        self.encoder = Encoder(self.config.encoder, self.dtype)
        self.layernorm = layer_norm(self.config.encoder.layer_norm_eps, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.encoder.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, 1 + patches, dim) of images of any size."""
        images = pixels(batch, self.config.num_channels)
        return self.embeddings(images.astype(self.dtype), live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index`, and the depths so far behind it."""
        first, *rest = _parts(hidden, self.config.extract_layers, index)
        return jnp.concatenate([self.encoder(index, first, live), *rest], axis=1)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens", "pooled" and "skips"."""
        first, *rest = _parts(hidden, self.config.extract_layers, self.blocks)
        tokens = self.layernorm(first)
        read = tokens[:, 1:] if self.pooling == "mean" else tokens
        pooled = pool({"tokens": read}, {}, self.pooling)
        skips = jnp.stack([depth[:, 1:] for depth in rest], axis=1)
        return {"tokens": tokens, "pooled": pooled, "skips": skips}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


class _Embeddings(nn.Module):
    """The CLS token and the patches; positions are interpolated as DINO's code does."""

    config: CellViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array, live: bool) -> jax.Array:
        config, inner = self.config, self.config.encoder
        width, scale = inner.hidden_size, inner.initializer_range
        init = nn.initializers.truncated_normal(scale)
        old: Any
        new: Any
        old, new = (grid(s, config.patch_size) for s in (config.image_size, images.shape[1:3]))
        first = self.param("cls_token", init, (1, 1, width))
        places = self.param("position_embeddings", init, (1, old[0] * old[1] + 1, width))
        places = interpolate_positions(places, old, new, offset=0.1)
        patches = Patches(
            width, config.patch_size, scale, dtype=self.dtype, name="patch_embeddings"
        )(images)
        hidden = patches.astype(jnp.float32) + places[:, 1:]
        first = jnp.broadcast_to(first + places[:, :1], (hidden.shape[0], 1, width))
        hidden = jnp.concatenate([first, hidden], axis=1).astype(self.dtype)
        return Dropout(inner.hidden_dropout_prob, deterministic=not live)(hidden)


class CellViTSam(nn.Module):
    """SAM's encoder in stages, as `CellViT`, for images up to the size of its position table.

    Attributes:
        config: sizes and rates.
        extract_layers: after how many layers each depth is taken.
        pooling: "mean", of the neck's map, which the classifier of tissues reads.
        dtype: of the computation; parameters are float32.
    """

    config: sam.SamConfig
    extract_layers: tuple[int, ...]
    pooling: str = "mean"
    dtype: Any = jnp.float32
    beside = ("pixel_values",)

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        config = self.config
        self.patch_embed = sam.PatchEmbed(config, self.dtype)
        shape = (1, *config.grid, config.hidden_size)
        self.pos_embed = self.param("pos_embed", nn.initializers.zeros, shape)
        self.layers = sam.layers(config, self.dtype)
        self.neck = sam.Neck(config, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, rows, columns, dim); smaller images get the first positions."""
        images = pixels(batch, self.config.num_channels)
        hidden = self.patch_embed(images.astype(self.dtype))
        rows, columns = hidden.shape[1:3]
        if rows > self.config.grid[0] or columns > self.config.grid[1]:
            raise ValueError(
                f"the images are {images.shape[1:3]} (height, width); the model has positions up "
                f"to {self.config.image_size}; cut them into tiles of that size"
            )
        places = self.pos_embed[:, :rows, :columns]
        return (hidden.astype(jnp.float32) + places).astype(self.dtype)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index`, and the depths so far below it."""
        first, *rest = _parts(hidden, self.extract_layers, index)
        return jnp.concatenate([self.layers(str(index), first, live), *rest], axis=1)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "map", "tokens", "pooled" and "skips"."""
        first, *rest = _parts(hidden, self.extract_layers, self.blocks)
        skips = jnp.stack([flat(depth) for depth in rest], axis=1)
        return {**sam.from_map(self.neck(first)), "skips": skips}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> CellViT:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not known to CellViT; give one of {POOLINGS}")
    return CellViT(cellvit_config(config), pooling, dtype)


def _make_sam(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> CellViTSam:
    if pooling != "mean" or not config["use_abs_pos"]:
        raise ValueError(
            f"pooling is {pooling!r} and use_abs_pos {config['use_abs_pos']}; CellViT on SAM has "
            "the mean of the neck's map and positions; take pooling='mean', or sam_vision_model"
        )
    return CellViTSam(sam.sam_config(config), depths(config), pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    layers = range(config["num_hidden_layers"])
    blocks = ((rf"encoder/layer/{i}/.*", f"block_{i}") for i in layers)
    return (("embeddings/.*", "stem"), *blocks, ("layernorm/.*", "top"))


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return the smallest image that has two patches each way: any size will do."""
    height, width = pair(config["patch_size"], "patch_size")
    return {"pixel_values": jnp.zeros((1, 2 * height, 2 * width, config["num_channels"]))}


def _decoder(config: Mapping[str, Any], backbone: Backbone) -> CellDecoder:
    widths = config["decoder_widths"]
    return CellDecoder(
        classes=config["num_nuclei_classes"],
        base=config["decoder_base"],
        widths=None if widths is None else tuple(widths),
        regression=config["regression_loss"],
    )


def _stated(head: CellDecoder) -> dict[str, Any]:
    return {
        "num_nuclei_classes": head.classes,
        "decoder_base": head.base,
        "decoder_widths": head.widths,
        "regression_loss": head.regression,
    }


def _tissue(config: Mapping[str, Any], backbone: Backbone) -> Linear:
    return Linear(outputs=config["num_tissue_classes"])


_BRANCH = r"\w+_decoder"
DECODER_RULES = (
    (
        rf"(decoder[123]/\d/block/0|{_BRANCH}/bottleneck_upsampler|{_BRANCH}/decoder3_upsampler/3|"
        rf"{_BRANCH}/decoder[12]_upsampler/2)/kernel",
        r"\1.weight",
        "transposed_conv",
    ),
    (r"(.*)/kernel", r"\1.weight", "conv"),
)


def _heads(pooling: str) -> dict[str, PretrainedHead]:
    return {
        "cell_maps": PretrainedHead(
            "CellViT", CellDecoder, _decoder, DECODER_RULES, stated=_stated
        ),
        "tissue": PretrainedHead(
            "CellViTTissue",
            Linear,
            _tissue,
            (),
            pooling,
            fields={"bias": True},
            stated=lambda head: {"num_tissue_classes": head.outputs},
        ),
    }


_HEADS_NAMES = r"(decoder[0-3]|\w+_decoder|classifier)[.].*"

CELLVIT = Family(
    model_type="cellvit",
    modality="image",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_size"],
    example=_example,
    rules=((r"(embeddings/patch_embeddings/projection)/kernel", r"\1.weight", "conv"),),
    ignored=(_HEADS_NAMES,),
    prefix="",
    heads=_heads("cls"),
    layout=cellvit_files.layout,
    complete=cellvit_files.complete,
    channels=channels_of("embeddings/patch_embeddings/projection/kernel"),
)

CELLVIT_SAM = Family(
    model_type="cellvit_sam",
    modality="image",
    make=_make_sam,
    groups=sam.groups,
    poolings=("mean",),
    dim=lambda config: config["output_channels"],
    example=_example,
    rules=sam.RULES,
    ignored=(_HEADS_NAMES, *sam.SAM_VISION.ignored),
    prefix="",
    heads=_heads("mean"),
    layout=cellvit_files.layout_sam,
    complete=cellvit_files.complete_sam,
    channels=channels_of("patch_embed/projection/kernel"),
)
