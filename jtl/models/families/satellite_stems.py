"""The stems of satellite images: groups of bands, dated frames, tubelets; and their config.

Each is called with the batch and gives (n, 1 + patches, dim), a CLS token first.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch
from jtl.models.layers import pixels
from jtl.models.layers.interpolate import interpolate_positions
from jtl.models.layers.patches import Patches, grid, pair
from jtl.models.layers.sincos import sincos, sincos_2d, sincos_3d
from jtl.models.layers.vit_encoder import check_heads


@dataclasses.dataclass(frozen=True)
class SatelliteConfig:
    """The fields of a config that the models read.

    Attributes:
        kind: the `model_type`.
        patch_size: (height, width); of "prithvi" (frames, height, width).
        channel_groups: of "satmae", places of the bands in each group.
        channel_embed: of "satmae", width of the embedding of the group beside that of the place.
        time_embed: of "satmae_temporal", width of the embedding of the date beside it.
        coords_encoding: of "prithvi", what it reads of "time" and "location".
        coords_scale_learn: whether it has learned how much these weigh.
    """

    kind: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    mlp_ratio: float
    image_size: tuple[int, int]
    patch_size: tuple[int, ...]
    num_channels: int
    num_frames: int = 1
    channel_groups: tuple[tuple[int, ...], ...] = ()
    channel_embed: int = 0
    time_embed: int = 0
    coords_encoding: tuple[str, ...] = ()
    coords_scale_learn: bool = False
    layer_norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02


def satellite_config(config: Mapping[str, Any]) -> SatelliteConfig:
    """Return the fields that the models read, checked.

    Args:
        config: whole, as `Family.complete` gives it; other fields are left alone.

    Raises:
        ValueError: heads do not divide the width, an image has no patch, a group has a band that is
            not there, or an encoding is not known.
    """
    names = {field.name for field in dataclasses.fields(SatelliteConfig)}
    own = {name: value for name, value in config.items() if name in names}
    own["image_size"] = pair(own["image_size"], "image_size")
    own["mlp_ratio"] = float(own["mlp_ratio"])
    patch = own["patch_size"]
    time = tuple(patch[:-2]) if isinstance(patch, list | tuple) else ()
    time = time or ((1,) if config["model_type"] == "prithvi" else ())
    sides = pair(patch[-2:] if isinstance(patch, list | tuple) else patch, "patch_size")
    own["patch_size"] = (*time, *sides)
    groups = own.pop("channel_groups", ())
    own["channel_groups"] = tuple(tuple(group) for group in groups)
    own["coords_encoding"] = tuple(own.get("coords_encoding", ()))
    made = SatelliteConfig(kind=config["model_type"], **own)
    check_heads(made.hidden_size, made.num_attention_heads)
    grid(made.image_size, made.patch_size[-2:])
    absent = [band for group in groups for band in group if not 0 <= band < made.num_channels]
    if absent or (made.kind == "satmae" and not groups):
        raise ValueError(
            f"channel_groups={made.channel_groups} name bands {absent} that are not among the "
            f"{made.num_channels} of num_channels; give groups of places from 0"
        )
    unknown = set(made.coords_encoding) - {"time", "location"}
    if unknown or ("time" in made.coords_encoding and made.patch_size[0] != 1):
        raise ValueError(
            f"coords_encoding={made.coords_encoding} with patch_size={made.patch_size}; known are "
            "'time', for patches of one frame, and 'location'; correct the config"
        )
    return made


class Grouped(nn.Module):
    """SatMAE's groups of bands, one after another; beside its place a patch has its group."""

    config: SatelliteConfig
    dtype: Any

    @nn.compact
    def __call__(self, batch: Batch) -> jax.Array:
        """Return (n, 1 + patches, dim)."""
        config = self.config
        width, beside, groups = config.hidden_size, config.channel_embed, config.channel_groups
        images = pixels(batch, config.num_channels, config.image_size).astype(self.dtype)
        parts = [
            _patches(config, self.dtype, f"patch_embed_{i}")(
                jnp.take(images, jnp.asarray(group), axis=-1)
            )
            for i, group in enumerate(groups)
        ]
        places = _places(self, config, width - beside)
        channels = sincos(jnp.arange(len(groups)).astype(jnp.float32), beside)[None]
        channels = self.param("channel_embed", lambda key: channels)
        first = self.param("channel_cls_embed", nn.initializers.zeros, (1, 1, beside))
        both = [_side_by_side(places[:, 1:], channels[:, i : i + 1]) for i in range(len(groups))]
        rows = [part.astype(jnp.float32) + own for part, own in zip(parts, both, strict=True)]
        first = jnp.concatenate([places[:, :1], first], axis=-1)
        return _behind_cls(self, config, first, rows).astype(self.dtype)


class Dated(nn.Module):
    """SatMAE's frames, one after another; beside its place a patch has the date of its frame."""

    config: SatelliteConfig
    dtype: Any

    @nn.compact
    def __call__(self, batch: Batch) -> jax.Array:
        """Return (n, 1 + patches, dim)."""
        config = self.config
        images = _frames(batch, config, config.image_size).astype(self.dtype)
        count = images.shape[1]
        dates = _column(batch, "timestamps", (len(images), count, 3))
        places = _places(self, config, config.hidden_size - config.time_embed)
        each = config.time_embed // 3
        made = [sincos(dates[:, :, i], each) for i in range(3)]
        dated = jnp.concatenate(made, axis=-1)  # (n, frames, time_embed)
        embed = _patches(config, self.dtype, "patch_embed")
        rows = [
            embed(images[:, i]).astype(jnp.float32)
            + _side_by_side(places[:, 1:], dated[:, i : i + 1])
            for i in range(count)
        ]
        first = jnp.concatenate([places[:, :1], jnp.zeros((1, 1, config.time_embed))], axis=-1)
        return _behind_cls(self, config, first, rows).astype(self.dtype)


class Tubelets(nn.Module):
    """Prithvi's patches of some frames, with fixed positions; dates and place are added."""

    config: SatelliteConfig
    dtype: Any

    @nn.compact
    def __call__(self, batch: Batch) -> jax.Array:
        """Return (n, 1 + patches, dim)."""
        config, width = self.config, self.config.hidden_size
        images = _frames(batch, config, None).astype(self.dtype)
        frames, *found = grid(images.shape[1:4], config.patch_size)
        hidden = _patches(config, self.dtype, "patch_embed")(images).astype(jnp.float32)
        hidden = hidden + _tubelet_places(config, frames, (found[0], found[1]))
        if "time" in config.coords_encoding and "temporal_coords" in batch:
            dates = _column(batch, "temporal_coords", (len(images), frames, 2))
            coded = _coded(dates, width) * self._weight("temporal_embed_enc")
            hidden = hidden + jnp.repeat(coded, hidden.shape[1] // frames, axis=1)
        if "location" in config.coords_encoding and "location_coords" in batch:
            where = _column(batch, "location_coords", (len(images), 2))
            hidden = hidden + _coded(where[:, None], width) * self._weight("location_embed_enc")
        return _behind_cls(self, config, jnp.zeros((1, 1, width)), [hidden]).astype(self.dtype)

    def _weight(self, name: str) -> jax.Array:
        if not self.config.coords_scale_learn:
            return jnp.ones((1, 1, 1))
        return _Weight(name=name)()


class _Weight(nn.Module):
    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("scale", nn.initializers.constant(0.1), (1,))[None, None]


def _patches(config: SatelliteConfig, dtype: Any, name: str) -> Patches:
    return Patches(
        config.hidden_size,
        config.patch_size,
        config.initializer_range,
        at="proj",
        dtype=dtype,
        name=name,
    )


def _places(module: nn.Module, config: SatelliteConfig, width: int) -> jax.Array:
    """Return the leaf of MAE's positions, (1, 1 + patches, width)."""
    rows, columns = grid(config.image_size, config.patch_size)
    return module.param("pos_embed", lambda key: jnp.asarray(sincos_2d(rows, columns, width))[None])


def _tubelet_places(config: SatelliteConfig, frames: int, new: tuple[int, int]) -> jax.Array:
    """Return the positions (1, patches, dim) of any number of frames, and of any size."""
    rows, columns = grid(config.image_size, config.patch_size[1:])
    table = sincos_3d(frames, rows, columns, config.hidden_size, before=0)
    each = jnp.asarray(table).reshape(frames, 1, rows * columns, -1)
    old = (rows, columns)
    made = [interpolate_positions(one, old, new, align_corners=True) for one in each]
    return jnp.concatenate(made, axis=1)


def _side_by_side(places: jax.Array, other: jax.Array) -> jax.Array:
    """Return places (1, patches, a) beside one vector for each row (n, 1, b)."""
    shape = (len(other), places.shape[1])
    parts = [jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in (places, other)]
    return jnp.concatenate(parts, axis=-1)


def _behind_cls(
    module: nn.Module, config: SatelliteConfig, first: jax.Array, rows: list[jax.Array]
) -> jax.Array:
    init = nn.initializers.normal(config.initializer_range)
    token = module.param("cls_token", init, (1, 1, config.hidden_size)) + first
    return jnp.concatenate([jnp.broadcast_to(token, (len(rows[0]), *token.shape[1:])), *rows], 1)


def _coded(pairs: jax.Array, width: int) -> jax.Array:
    """Return the two numbers of each pair side by side: (n, count, 2) to (n, count, width)."""
    half = width // 2
    parts = [sincos(pairs[:, :, 0], half), sincos(pairs[:, :, 1], width - half)]
    return jnp.concatenate(parts, axis=-1)


def _frames(batch: Batch, config: SatelliteConfig, size: tuple[int, int] | None) -> jax.Array:
    """Return the images (n, frames, height, width, channels), checked."""
    values = jnp.asarray(batch["pixel_values"]) if "pixel_values" in batch else jnp.zeros(())
    if values.ndim == 4 and config.num_frames == 1:
        values = values[:, None]
    if values.ndim != 5 and "pixel_values" in batch:
        raise ValueError(
            f"'pixel_values' has shape {values.shape}; the model reads {config.num_frames} frames "
            "in (n, frames, height, width, channels); stack them along a second axis"
        )
    flat = {"pixel_values": values.reshape(-1, *values.shape[2:])} if values.ndim == 5 else batch
    return pixels(flat, config.num_channels, size).reshape(values.shape)


def _column(batch: Batch, name: str, shape: tuple[int, ...]) -> jax.Array:
    there = batch[name].shape if name in batch else f"no such column, only {sorted(batch)}"
    if name not in batch or there != shape:
        raise ValueError(f"{name!r} must be of shape {shape}; the batch has {there}; add it")
    return jnp.asarray(batch[name]).astype(jnp.float32)
