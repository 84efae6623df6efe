"""ResNet v1.5 with basic or bottleneck layers, as transformers has it.

The trees of parameters and statistics are those of transformers' FlaxResNetModel. Stages: "stem"
is the first convolution and the max pooling, "block_i" is the i-th residual layer over all of
`encoder/stages/*/layers/*`, "top" is the global average and has no leaves. Checkpoints in the
names of torchvision and timm are read too.

Reference: He et al. 2015, arXiv:1512.03385; v1.5 has its stride in the 3x3 convolution.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch, Family, Out, Rules, run_stages
from jtl.models.heads import pool
from jtl.models.heads.pretrained import classification
from jtl.models.layers import BatchNorm, activation, pixels
from jtl.models.layers.maps import flat, real_rows
from jtl.models.layers.nest import Nest
from jtl.models.layers.pointwise import pointwise
from jtl.models.layers.stated import one_for_each_stage, places, stated
from jtl.models.resize import any_size, channels_of
from jtl.weights.checkpoint import Checkpoint
from jtl.weights.layouts import nested, renamed

POOLINGS = ("mean",)
LAYER_TYPES = ("basic", "bottleneck")
_REDUCTION = 4


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The fields of `config.json` that the network reads, under their names there."""

    embedding_size: int
    hidden_sizes: tuple[int, ...]
    depths: tuple[int, ...]
    num_channels: int = 3
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False


def resnet_config(config: Mapping[str, Any]) -> ResNetConfig:
    """Return the fields that the network reads, checked.

    Args:
        config: the dict of `config.json`; other fields are left alone.

    Raises:
        ValueError: a size is missing, `depths` and `hidden_sizes` do not fit together, or the
            layer type or activation is not known.

    >>> made = resnet_config(dict(embedding_size=4, hidden_sizes=[8, 16], depths=[1, 2]))
    >>> made.depths, made.layer_type
    ((1, 2), 'bottleneck')
    """
    made = stated(ResNetConfig, config, "ResNet")
    one_for_each_stage("ResNet", depths=made.depths, hidden_sizes=made.hidden_sizes)
    if made.layer_type not in LAYER_TYPES:
        raise ValueError(f"layer_type {made.layer_type!r} is not known; give one of {LAYER_TYPES}")
    activation(made.hidden_act)
    return made


class _Convolution(nn.Module):
    """Convolution without bias, BatchNorm, and the activation, None for none."""

    width: int
    size: int
    stride: int = 1
    act: str | None = "relu"
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        hidden = nn.Conv(
            self.width,
            (self.size, self.size),
            strides=(self.stride, self.stride),
            padding=self.size // 2,  # "SAME" would pad strided layers on one side only
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            conv_general_dilated=pointwise,
            name="convolution",
        )(hidden)
        norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name="normalization")
        hidden = norm(hidden, mask, live)
        return hidden if self.act is None else activation(self.act)(hidden)


class _Chain(nn.Module):
    """The convolutions of one residual layer, named "0", "1", ... as in the checkpoints."""

    parts: tuple[tuple[int, int, int, str | None], ...]
    axis_name: str | None
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        for i, (width, size, stride, act) in enumerate(self.parts):
            step = _Convolution(width, size, stride, act, self.axis_name, self.dtype, name=str(i))
            hidden = step(hidden, mask, live)
        return hidden


class _Layer(nn.Module):
    """A residual layer: activation(chain(x) + shortcut(x))."""

    config: ResNetConfig
    width: int
    stride: int
    axis_name: str | None
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        residual = hidden
        hidden = _Chain(self._parts(), self.axis_name, self.dtype, name="layer")(hidden, mask, live)
        if residual.shape[-1] != self.width or self.stride != 1:
            own = (self.width, 1, self.stride, None, self.axis_name, self.dtype)
            residual = _Convolution(*own, name="shortcut")(residual, mask, live)
        return activation(self.config.hidden_act)(hidden + residual)

    def _parts(self) -> tuple[tuple[int, int, int, str | None], ...]:
        """Return (width, kernel size, stride, activation) of each; inside it is always ReLU."""
        if self.config.layer_type == "basic":
            return ((self.width, 3, self.stride, "relu"), (self.width, 3, 1, None))
        narrow = self.width // _REDUCTION
        first, second = (
            (self.stride, 1) if self.config.downsample_in_bottleneck else (1, self.stride)
        )
        return (
            (narrow, 1, first, "relu"),
            (narrow, 3, second, "relu"),
            (self.width, 1, 1, None),
        )


class _Embedder(nn.Module):
    config: ResNetConfig
    axis_name: str | None
    dtype: Any

    def setup(self) -> None:
        act, own = self.config.hidden_act, (self.axis_name, self.dtype)
        self.embedder = _Convolution(self.config.embedding_size, 7, 2, act, *own)

    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        hidden = self.embedder(hidden, mask, live)
        sides: Any = ((1, 1), (1, 1))  # flax's annotation knows the words "SAME" and "VALID" alone
        return nn.max_pool(hidden, (3, 3), strides=(2, 2), padding=sides)


class ResNet(nn.Module):
    """ResNet in stages; see `models/backbone.py` for the contract.

    A border's activations are maps (n, height, width, channels); "tokens" are the places of the
    last map, "pooled" is their mean. A stage that is not live normalises by its running statistics
    and leaves them as they are.

    Attributes:
        config: sizes and kinds of layers.
        pooling: "mean".
        dtype: of the computation; parameters and statistics are float32.
        axis_name: axis of devices over which BatchNorm takes its moments; None for one program.
    """

    config: ResNetConfig
    pooling: str = "mean"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        """Declare the modules of the stem and the blocks."""
        self.embedder = _Embedder(self.config, self.axis_name, self.dtype)
        self.encoder = Nest(tuple((path, self._layer(path)) for path in _paths(self.config)))

    def _layer(self, path: str) -> Any:
        config = self.config
        stage, layer = (int(part) for part in path.split("/")[1::2])
        down = layer == 0 and (stage > 0 or config.downsample_in_first_stage)
        own = (config.hidden_sizes[stage], 2 if down else 1, self.axis_name, self.dtype)
        return functools.partial(_Layer, config, *own)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return sum(self.config.depths)

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the map after the first convolution and max pooling."""
        hidden = pixels(batch, self.config.num_channels).astype(self.dtype)
        return self.embedder(hidden, real_rows(batch), live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the map after residual layer `index`."""
        return self.encoder(_paths(self.config)[index], hidden, real_rows(batch), live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" (n, height * width, dim) and "pooled" (n, dim)."""
        tokens = flat(hidden)
        return {"tokens": tokens, "pooled": pool({"tokens": tokens}, {}, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _paths(config: ResNetConfig) -> tuple[str, ...]:
    return tuple(f"stages/{stage}/layers/{layer}" for stage, layer in places(config.depths))


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> ResNet:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not known to ResNet; give one of {POOLINGS}")
    return ResNet(resnet_config(config), pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    blocks = (
        (rf"encoder/stages/{stage}/layers/{layer}/.*", f"block_{i}")
        for i, (stage, layer) in enumerate(places(tuple(config["depths"])))
    )
    return (("embedder/.*", "stem"), *blocks)


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    return {"pixel_values": jnp.zeros((1, 32, 32, config["num_channels"]))}


# torchvision's and timm's names, which are one: `layer1.0.conv1.weight`, `bn1`, `downsample.0`.
_FOREIGN = (
    (r"conv1[.]weight", "embedder.embedder.convolution.weight"),
    (r"bn1[.](.*)", r"embedder.embedder.normalization.\1"),
    (
        r"layer(\d)[.](\d+)[.](conv|bn)(\d)[.](.*)",
        lambda m: f"{_place(m)}.layer.{int(m[4]) - 1}.{_KINDS[m[3]]}.{m[5]}",
    ),
    (
        r"layer(\d)[.](\d+)[.]downsample[.]([01])[.](.*)",
        lambda m: f"{_place(m)}.shortcut.{_KINDS[m[3]]}.{m[4]}",
    ),
    (r"fc[.](.*)", r"classifier.1.\1"),
)
_CONVOLUTION, _NORM = "convolution", "normalization"
_KINDS = {"conv": _CONVOLUTION, "bn": _NORM, "0": _CONVOLUTION, "1": _NORM}


def _place(match: re.Match[str]) -> str:
    return f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}"


def _layout(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Bring torchvision's names, which may lie under a prefix (BioViL's image side), to ours."""
    first = next((n for n in checkpoint.names if n.endswith("layer1.0.conv1.weight")), None)
    if first is None:
        return checkpoint
    prefix = first.removesuffix("layer1.0.conv1.weight")
    return renamed(nested(checkpoint, prefix) if prefix else checkpoint, _FOREIGN)


RESNET = Family(
    model_type="resnet",
    modality="image",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_sizes"][-1],
    example=_example,
    resize=any_size,
    channels=channels_of("embedder/embedder/convolution/kernel"),
    rules=((r"(.*convolution)/kernel", r"\1.weight", "conv"),),
    aliases=((r"^resnet[.]", ""), (r"[.]layer_(\d)[.]", r".\1.")),  # the second of the Flax class
    ignored=(r"(.*[.])?num_batches_tracked", r"classifier[.].*"),
    class_name="ResNetModel",
    layout=_layout,
    heads={
        "classification": classification("ResNetForImageClassification", "mean", "classifier.1")
    },
)
