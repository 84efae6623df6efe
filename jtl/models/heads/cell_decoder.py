"""CellViT's decoder: from four depths of an encoder and the image to maps of cell nuclei.

Each branch goes up from the last depth to the size of the image, and meets the other depths and the
image itself on its way. The names are those of CellViT's files.

Reference: Hörst et al. 2023, arXiv:2306.15350; UNETR: Hatamizadeh et al. 2021, arXiv:2103.10504.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.layers.dropout import Dropout
from jtl.models.layers.maps import real_rows
from jtl.models.layers.norms import BatchNorm
from jtl.models.layers.pointwise import pointwise

# What the branches share runs once here and once for each of the three branches in CellViT's code:
# its running statistics then move three times by 0.1.
_SHARED_MOMENTUM = 1 - 0.9**3


class CellMaps(NamedTuple):
    """The maps of `CellDecoder`, each (n, height, width, channels).

    Attributes:
        binary: logits of background and nucleus.
        hv: horizontal and vertical distance of each place to the centre of its nucleus.
        types: logits of each type of nucleus, background among them.
        regression: two more channels, None where the decoder has none.
    """

    binary: jax.Array
    hv: jax.Array
    types: jax.Array
    regression: jax.Array | None


def cell_maps(values: jax.Array, *, regression: bool = False) -> CellMaps:
    """Return the maps that the channels of `CellDecoder` are.

    Args:
        values: (n, height, width, channels).
        regression: whether the decoder was made with it.

    >>> maps = cell_maps(jnp.arange(7.0).reshape(1, 1, 1, 7))
    >>> maps.binary.ravel().tolist(), maps.hv.ravel().tolist(), maps.types.ravel().tolist()
    ([0.0, 1.0], [2.0, 3.0], [4.0, 5.0, 6.0])
    """
    first = 4 if regression else 2
    more = values[..., 2:4] if regression else None
    return CellMaps(values[..., :2], values[..., first : first + 2], values[..., first + 2 :], more)


class CellDecoder(nn.Module):
    """Three branches on `out["skips"]` (n, 4, positions, dim) and `batch["pixel_values"]`.

    Attributes:
        classes: number of types of nuclei, background among them.
        base: width at the size of the image; others are multiples of it.
        widths: of the first and the second step of the way up, and of the last depth; None is what
            CellViT has for encoders narrower than 512 and for others.
        regression: whether the binary branch has two channels more.
        dropout: rate behind each convolution, where the head is live.
        axis_name: axis of devices over which BatchNorm takes its moments; None for one program.
    """

    classes: int
    base: int = 64
    widths: tuple[int, int, int] | None = None
    regression: bool = False
    dropout: float = 0.0
    axis_name: str | None = None

    needs = "tokens"
    tied = False

    @nn.compact
    def __call__(
        self, out: Mapping[str, jax.Array], batch: Mapping[str, Any], live: bool = False
    ) -> jax.Array:
        """Return float32 (n, height, width, channels); `cell_maps` takes them apart.

        Raises:
            ValueError: the backbone gives no skips, or the batch no image that fits them.
        """
        image, z1, z2, z3, z4 = _read(out, batch)
        mask, base = real_rows(batch), self.base
        first, second, last = self.widths or ((256, 128, 312), (512, 256, 512))[z1.shape[-1] >= 512]
        options: Any = dict(dropout=self.dropout, axis_name=self.axis_name)
        shared: Any = dict(options, momentum=_SHARED_MOMENTUM)
        ups = ((base // 2, base), (first, second, 2 * base), (first, 4 * base), (last,))
        skips = [
            Chain(widths, up=i > 0, **shared, name=f"decoder{i}")(value, mask, live)
            for i, (widths, value) in enumerate(zip(ups, (image, z1, z2, z3), strict=True))
        ]
        outputs = {
            "nuclei_binary_map_decoder": 4 if self.regression else 2,
            "hv_map_decoder": 2,
            "nuclei_type_maps_decoder": self.classes,
        }
        maps = [
            _Branch(outputs, base, last, tuple(options.items()), name=name)(skips, z4, mask, live)
            for name, outputs in outputs.items()
        ]
        return jnp.concatenate(maps, axis=-1)


class _Branch(nn.Module):
    outputs: int
    base: int
    last: int
    options: tuple[tuple[str, Any], ...]

    @nn.compact
    def __call__(self, skips: list[jax.Array], deepest: jax.Array, mask: Any, live: bool) -> Any:
        base, last = self.base, self.last
        maps = _up(last, "bottleneck_upsampler")(deepest)
        steps = (
            ("decoder3_upsampler", (last, last, last), 4 * base),
            ("decoder2_upsampler", (4 * base, 4 * base), 2 * base),
            ("decoder1_upsampler", (2 * base, 2 * base), base),
            ("decoder0_header", (base, base), self.outputs),
        )
        for (name, widths, width), skip in zip(steps, reversed(skips), strict=True):
            end = ("point" if name == "decoder0_header" else "up", width)
            options: Any = dict(self.options)
            chain = Chain(widths, end=end, name=name, **options)
            maps = chain(jnp.concatenate([skip, maps], axis=-1), mask, live)
        return maps


class Chain(nn.Module):
    """Blocks one after another, named "0", "1", ... as in the checkpoints, and what ends them.

    Attributes:
        widths: of the blocks.
        up: whether each block doubles the sides first.
        end: ("up", width) for a transposed convolution at the end, ("point", width) for one of
            size 1, None for neither.
        dropout: rate at the end of each block.
        momentum: of BatchNorm, see `layers.BatchNorm`.
        axis_name: as in `layers.BatchNorm`.
    """

    widths: tuple[int, ...]
    up: bool = False
    end: tuple[str, int] | None = None
    dropout: float = 0.0
    momentum: float = 0.1
    axis_name: str | None = None

    @nn.compact
    def __call__(self, maps: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        """Return maps (n, height, width, the last width)."""
        own = (self.up, self.dropout, self.momentum, self.axis_name)
        for i, width in enumerate(self.widths):
            maps = _Block(width, *own, name=str(i))(maps, mask, live)
        name = str(len(self.widths))
        if self.end is None:
            return maps
        kind, width = self.end
        if kind == "up":
            return _up(width, name)(maps)
        return nn.Conv(width, (1, 1), conv_general_dilated=pointwise, name=name)(maps)


class _Block(nn.Module):
    """What lies under "block": a convolution, BatchNorm, ReLU, dropout."""

    width: int
    up: bool
    dropout: float
    momentum: float
    axis_name: str | None

    def setup(self) -> None:
        own = (self.up, self.dropout, self.momentum, self.axis_name)
        self.block = _Inner(self.width, *own)

    def __call__(self, maps: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        return self.block(maps, mask, live)


class _Inner(nn.Module):
    width: int
    up: bool
    dropout: float
    momentum: float
    axis_name: str | None

    @nn.compact
    def __call__(self, maps: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        if self.up:
            maps = _up(self.width, "0")(maps)
        first = int(self.up)
        maps = nn.Conv(self.width, (3, 3), padding=1, name=str(first))(maps)
        norm = BatchNorm(self.momentum, axis_name=self.axis_name, name=str(first + 1))
        return Dropout(self.dropout, deterministic=not live)(nn.relu(norm(maps, mask, live)))


def _up(width: int, name: str) -> nn.ConvTranspose:
    return nn.ConvTranspose(width, (2, 2), strides=(2, 2), padding="VALID", name=name)


def _read(out: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> list[jax.Array]:
    """Return the image and the four depths as maps, in float32."""
    if "skips" not in out or "pixel_values" not in batch:
        raise ValueError(
            f"CellViT's decoder reads out['skips'] and batch['pixel_values']; there are "
            f"{sorted(out)} and {sorted(batch)}; attach it to a cellvit or cellvit_sam backbone "
            "and keep the images in the batch"
        )
    image, skips = jnp.asarray(batch["pixel_values"], jnp.float32), out["skips"]
    n, rows, columns = image.shape[0], image.shape[1] // 16, image.shape[2] // 16
    if (rows * 16, columns * 16) != image.shape[1:3] or rows * columns != skips.shape[2]:
        raise ValueError(
            f"the images are {image.shape[1:3]} and the skips have {skips.shape[2]} positions; "
            "CellViT's decoder goes up from patches of 16; give images whose sides are multiples "
            "of 16, and the backbone the same batch"
        )
    depths = skips.astype(jnp.float32).reshape(n, 4, rows, columns, skips.shape[-1])
    return [image, *(depths[:, i] for i in range(4))]
