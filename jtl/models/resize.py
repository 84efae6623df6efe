"""A checkpoint for other images than it was trained on: another size, other channels.

A family says which leaf changes: `Family.resize` for the positions, `Family.channels` for the first
convolution. `load_backbone(name, image_size=, channels=)` calls them once, when the weights are
read; what comes out is a backbone of that size like any other.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jtl.models.layers.channels import adapt_channels
from jtl.models.layers.interpolate import interpolate_positions
from jtl.models.layers.patches import grid, pair

Changed = tuple[dict[str, Any], dict[str, Any]]
Resize = Callable[[Mapping[str, Any], Mapping[str, Any], tuple[int, int]], Changed]
Channels = Callable[[Mapping[str, Any], Mapping[str, Any], int, str], Changed]


def positions_of(path: str, *, part: str = "", antialias: bool = False) -> Resize:
    """Return a family's `resize`: the position table at `path` is interpolated.

    Args:
        path: of the table (1, tokens before the patches + patches, dim), or one without its first
            axis.
        part: the field of the config that has the sizes ("vision_config"), "" where it is itself.
        antialias: see `layers.interpolate_positions`.
    """

    def resize(
        params: Mapping[str, Any], config: Mapping[str, Any], size: tuple[int, int]
    ) -> Changed:
        own = config[part] if part else config
        patch = pair(own["patch_size"], "patch_size")
        old: Any = grid(pair(own["image_size"], "image_size"), patch)
        new: Any = grid(size, patch)
        flat: Any = flatten_dict(params, sep="/")
        table = flat[path]
        made = interpolate_positions(
            table.reshape(1, *table.shape[-2:]), old, new, antialias=antialias
        )
        flat[path] = made.reshape(*table.shape[:-2], *made.shape[1:])
        return unflatten_dict(flat, sep="/"), _with(config, part, image_size=_stated(size))

    return resize


def any_size(
    params: Mapping[str, Any], config: Mapping[str, Any], size: tuple[int, int]
) -> Changed:
    """Change the stated size alone: the `resize` of a family whose weights take images of any."""
    return dict(params), {**config, "image_size": _stated(size)}


def channels_of(*paths: str, part: str = "") -> Channels:
    """Return a family's `channels`: the kernels at `paths` read another number of channels.

    Args:
        paths: of the kernels.
        part: as for `positions_of`.
    """

    def change(
        params: Mapping[str, Any], config: Mapping[str, Any], channels: int, new: str
    ) -> Changed:
        flat: Any = flatten_dict(params, sep="/")
        flat |= {path: adapt_channels(flat[path], channels, new) for path in paths}
        return unflatten_dict(flat, sep="/"), _with(config, part, num_channels=channels)

    return change


def adapted(
    row: Any,
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    new_channels: str = "repeat",
    place: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> Changed:
    """Return params and config for images of another size and of other channels.

    Args:
        row: the `Family`.
        params: as they were read.
        config: of the checkpoint.
        image_size: (height, width), or one number for both; None leaves it.
        channels: None leaves them.
        new_channels: see `layers.adapt_channels`.
        place: puts what has changed onto its devices.

    Raises:
        ValueError: the family has no positions that can be interpolated, or no channels.
    """
    before = flatten_dict(params, sep="/")
    changed, stated = dict(params), dict(config)
    if image_size is not None:
        _has(row, "resize", "image_size")
        changed, stated = row.resize(changed, stated, pair(image_size, "image_size"))
    if channels is not None:
        _has(row, "channels", "channels")
        changed, stated = row.channels(changed, stated, channels, new_channels)
    flat = flatten_dict(changed, sep="/")
    if place is not None:
        new = [path for path, leaf in flat.items() if leaf is not before[path]]
        flat |= {path: place(path, np.asarray(flat[path])) for path in new}
    return unflatten_dict(flat, sep="/"), stated


def _has(row: Any, field: str, option: str) -> None:
    if getattr(row, field) is None:
        raise ValueError(
            f"{option}= is given and {row.model_type} has nothing to adapt: its weights are bound "
            f"to what they were trained on; leave {option}= out, or make the images fit"
        )


def _with(config: Mapping[str, Any], part: str, **fields: Any) -> dict[str, Any]:
    """Return a config with fields changed, in one of its parts where that is named."""
    return {**config, part: {**config[part], **fields}} if part else {**config, **fields}


def _stated(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)
