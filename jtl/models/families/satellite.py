"""SatMAE and Prithvi-EO: ViTs for images of many bands, and for series of images.

"satmae" has the bands in groups, each with a convolution of its own; "satmae_temporal" has frames
with the year, month and hour at which they were taken; "prithvi" (1.0 and 2.0) has tubelets of a
few frames, and may read dates and places. They differ in the stem; blocks and top are ViT's. The
leaves have the names that the authors' files have, but for `embeddings/` before those of the stem.

| column | shape | read by |
|---|---|---|
| `pixel_values` | (n, height, width, channels) | satmae; prithvi, of one frame |
| `pixel_values` | (n, frames, height, width, channels) | satmae_temporal; prithvi |
| `timestamps` | (n, frames, 3): year - 2002, month - 1, hour | satmae_temporal |
| `temporal_coords` | (n, frames, 2): year, day of the year from 0 | prithvi "time", where given |
| `location_coords` | (n, 2): latitude, longitude | prithvi "location", where given |

Reference: Cong et al. 2022, arXiv:2207.08051; Jakubik et al. 2023, arXiv:2310.18660; Szwarcman et
al. 2024, arXiv:2412.02732.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch, Family, Out, Rules, run_stages
from jtl.models.families.satellite_stems import (
    Dated,
    Grouped,
    SatelliteConfig,
    Tubelets,
    satellite_config,
)
from jtl.models.heads import pool
from jtl.models.layers import layer_norm
from jtl.models.layers.patches import pair
from jtl.models.layers.timm_block import TimmBlock
from jtl.models.layers.vit_encoder import drop_path_rates
from jtl.models.resize import channels_of, positions_of
from jtl.weights.checkpoint import Checkpoint
from jtl.weights.layouts import renamed

POOLINGS = ("cls", "mean", "mean_norm")
# The published sizes: SatMAE's ViT-L of Sentinel-2 and of fMoW's series, and Prithvi-EO 1.0.
_SATMAE = dict(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, mlp_ratio=4.0, image_size=96,
    patch_size=8, num_channels=10, channel_groups=[[0, 1, 2, 6], [3, 4, 5, 7], [8, 9]],
    channel_embed=256, layer_norm_eps=1e-6,
)  # fmt: skip
_TEMPORAL = dict(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, mlp_ratio=4.0, image_size=224,
    patch_size=16, num_channels=3, num_frames=3, time_embed=384, layer_norm_eps=1e-6,
)  # fmt: skip
# Means and deviations of fMoW-Sentinel's bands B2 to B8, B8A, B11, B12, and of fMoW's colours.
_SENTINEL = (
    (1184.3824625, 1120.77120066, 1136.26026392, 1263.73947144, 1645.40315151, 1846.87040806,
     1762.59530783, 1972.62420416, 1732.16362238, 1247.91870117),
    (650.2842772, 712.12507725, 965.23119807, 948.9819932, 1108.06650639, 1258.36394548,
     1233.1492281, 1364.38688993, 1310.36996126, 1087.6020813),
)  # fmt: skip
_FMOW = (
    (0.4182007312774658, 0.4214799106121063, 0.3991275727748871),
    (0.28774282336235046, 0.27541765570640564, 0.2764017581939697),
)
_PRITHVI = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, mlp_ratio=4.0, image_size=224,
    patch_size=[1, 16, 16], num_channels=6, num_frames=3, coords_encoding=[],
    coords_scale_learn=False, layer_norm_eps=1e-5,
)  # fmt: skip


class _Blocks(nn.Module):
    config: SatelliteConfig
    dtype: Any

    def setup(self) -> None:
        config = self.config
        rates = drop_path_rates(config.drop_path_rate, config.num_hidden_layers)
        wide = int(config.hidden_size * config.mlp_ratio)
        own = (config.hidden_size, config.num_attention_heads, wide, config.layer_norm_eps)
        self.layers = [
            TimmBlock(*own, rate, config.initializer_range, self.dtype, name=str(i))
            for i, rate in enumerate(rates)
        ]

    def __call__(self, index: int, hidden: jax.Array, live: bool) -> jax.Array:
        return self.layers[index](hidden, live)


_STEMS = {"satmae": Grouped, "satmae_temporal": Dated, "prithvi": Tubelets}


class Satellite(nn.Module):
    """SatMAE or Prithvi in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes, and which of the models it is.
        pooling: what `out["pooled"]` is: "cls" (the first token), "mean" (of the patches) or
            "mean_norm" (the final LayerNorm on the mean of the patches before it, as SatMAE
            fine-tunes; "tokens" then are without it).
        dtype: of the computation; parameters are float32.
    """

    config: SatelliteConfig
    pooling: str = "cls"
    dtype: Any = jnp.float32
    beside = ()

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        self.embeddings = _STEMS[self.config.kind](self.config, self.dtype)
        self.layers = _Blocks(self.config, self.dtype, name="blocks")
        self.norm = layer_norm(self.config.layer_norm_eps, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, 1 + groups or frames * patches, dim)."""
        return self.embeddings(batch)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index`, of the shape of `hidden`."""
        return self.layers(index, hidden, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" and "pooled"."""
        if self.pooling == "mean_norm":
            pooled = self.norm(pool({"tokens": hidden[:, 1:]}, {}, "mean"))
            return {"tokens": hidden, "pooled": pooled}
        tokens = self.norm(hidden)
        read = tokens[:, 1:] if self.pooling == "mean" else tokens
        return {"tokens": tokens, "pooled": pool({"tokens": read}, {}, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Satellite:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not known here; give one of {POOLINGS}")
    return Satellite(satellite_config(config), pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    layers = range(config["num_hidden_layers"])
    blocks = ((rf"blocks/{i}/.*", f"block_{i}") for i in layers)
    return (("embeddings/.*", "stem"), *blocks, ("norm/.*", "top"))


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    made = satellite_config(config)
    frames = () if made.kind == "satmae" else (made.num_frames,)
    columns: dict[str, tuple[int, ...]] = {
        "pixel_values": (1, *frames, *made.image_size, made.num_channels)
    }
    if made.kind == "satmae_temporal":
        columns["timestamps"] = (1, made.num_frames, 3)
    if "time" in made.coords_encoding:
        columns["temporal_coords"] = (1, made.num_frames, 2)
    if "location" in made.coords_encoding:
        columns["location_coords"] = (1, 2)
    return {name: jnp.zeros(shape) for name, shape in columns.items()}


def _published(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Return the encoder of the authors' files; Prithvi 1.0's older ones have it without prefix."""
    before = r"(?:module\.)?(?:encoder\.)?"
    rules: list[Any] = [
        (r"(?:module\.)?(?:decoder.*|mask_token|\w+_embed_dec\..*)", None),
        (rf"{before}fc_norm\.(.*)", r"norm.\1"),
    ]
    if config["model_type"] == "prithvi":
        rules.append((rf"{before}pos_embed", None))  # fixed: computed for the frames at hand
        if not config["coords_scale_learn"]:
            rules.append((rf"{before}\w+_embed_enc\.scale", None))  # ones
    return renamed(checkpoint, [*rules, (rf"{before}(.*)", r"\1")])


def prithvi_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of a folder of Prithvi-EO, None where it is of something else.

    Args:
        config: the dict of its `config.json`: `architecture` and `pretrained_cfg`.

    >>> stated = {"architecture": "prithvi_eo_v2_300", "pretrained_cfg": {"embed_dim": 1024}}
    >>> prithvi_config(stated)["hidden_size"]
    1024
    """
    if not str(config.get("architecture", "")).startswith("prithvi"):
        return None
    theirs = {
        "embed_dim": "hidden_size",
        "depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "img_size": "image_size",
        "in_chans": "num_channels",
    }
    stated: dict[str, Any] = config.get("pretrained_cfg") or {}
    return {"model_type": "prithvi", **{theirs.get(k, k): v for k, v in stated.items()}}


def _sentinel(config: Mapping[str, Any]) -> Any:
    """Return the preprocessing of SatMAE's Sentinel-2 weights; None for other bands than theirs.

    A band is cut to two deviations about its mean and has 256 steps, as in the authors' code.
    """
    from jtl.data.bands import band_inputs

    if any(config[name] != _SATMAE[name] for name in ("num_channels", "channel_groups")):
        return None
    low = [mean - 2 * std for mean, std in zip(*_SENTINEL, strict=True)]
    span = [4 * std for std in _SENTINEL[1]]
    size = pair(config["image_size"], "image_size")
    return band_inputs(size, mean=low, std=span, steps=255)


def _aerial(config: Mapping[str, Any]) -> Any:
    """Return the preprocessing of fMoW's series of colour images, in bytes."""
    from jtl.data.bands import band_inputs

    if config["num_channels"] != 3:
        return None
    mean, std = ([255 * value for value in values] for values in _FMOW)
    return band_inputs(pair(config["image_size"], "image_size"), mean=mean, std=std)


def _stated_bands(config: Mapping[str, Any]) -> Any:
    """Return the preprocessing that the config of Prithvi states, None where it states none."""
    from jtl.data.bands import band_inputs

    if any(len(config.get(name) or ()) != config["num_channels"] for name in ("mean", "std")):
        return None
    mean, std = ([float(value) for value in config[name]] for name in ("mean", "std"))
    return band_inputs(None, mean=mean, std=std)  # it takes images of any size


def _completed(defaults: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    return lambda config: {**defaults, **config}


_KERNELS = (
    (r"embeddings/patch_embed_(\d+)/proj/kernel", r"patch_embed.\1.proj.weight", "conv"),
    (r"embeddings/patch_embed_(\d+)/(.*)", r"patch_embed.\1.\2", "same"),
    (r"embeddings/(.*)/kernel", r"\1.weight", "conv"),
    (r"embeddings/(.*)", r"\1", "same"),
)

SATMAE = Family(
    model_type="satmae",
    modality="image",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_size"],
    example=_example,
    rules=_KERNELS,
    ignored=(r"head[.].*",),
    prefix="",
    layout=_published,
    complete=_completed(_SATMAE),
    resize=positions_of("embeddings/pos_embed"),
    inputs=_sentinel,
)

SATMAE_TEMPORAL = SATMAE._replace(
    model_type="satmae_temporal",
    complete=_completed(_TEMPORAL),
    channels=channels_of("embeddings/patch_embed/proj/kernel"),
    inputs=_aerial,
)

PRITHVI = SATMAE_TEMPORAL._replace(
    model_type="prithvi", complete=_completed(_PRITHVI), resize=None, inputs=_stated_bands
)
