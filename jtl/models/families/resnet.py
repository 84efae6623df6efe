"""ResNet v1.5 with basic or bottleneck layers, as transformers has it.

The trees of parameters and statistics are those of transformers' FlaxResNetModel. Stages: "stem"
is the first convolution and the max pooling, "block_i" is the i-th residual layer over all of
`encoder/stages/*/layers/*`, "top" is the global average and has no leaves.

Reference: He et al. 2015, arXiv:1512.03385; v1.5 has its stride in the 3x3 convolution.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch, Family, Out, Rules, run_stages
from jtl.models.heads import pool
from jtl.models.heads.pretrained import classification
from jtl.models.layers import BatchNorm, activation, pixels

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
    fields = dataclasses.fields(ResNetConfig)
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [name for name in needed if config.get(name) is None]
    if missing:
        raise ValueError(
            f"the ResNet config lacks {missing}; it has {sorted(config)}; "
            "add them, or correct model_type if the checkpoint is no ResNet"
        )
    own = {f.name: config[f.name] for f in fields if config.get(f.name) is not None}
    made = ResNetConfig(
        **{**own, "hidden_sizes": tuple(own["hidden_sizes"]), "depths": tuple(own["depths"])}
    )
    if len(made.depths) != len(made.hidden_sizes) or not made.depths or min(made.depths) < 1:
        raise ValueError(
            f"the ResNet config has depths={made.depths} and hidden_sizes={made.hidden_sizes}; "
            "give both one number for each stage, and each stage one layer or more"
        )
    if made.layer_type not in LAYER_TYPES:
        raise ValueError(f"layer_type {made.layer_type!r} is not known; give one of {LAYER_TYPES}")
    activation(made.hidden_act)
    return made


def places(depths: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return (stage, layer) of each block in order of depth.

    >>> places((1, 2))
    ((0, 0), (1, 0), (1, 1))
    """
    return tuple((stage, layer) for stage, depth in enumerate(depths) for layer in range(depth))


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


class _Layers(nn.Module):
    """The residual layers of one stage under the names "0", "1", ..."""

    config: ResNetConfig
    stage: int
    axis_name: str | None
    dtype: Any

    def setup(self) -> None:
        width, own = self.config.hidden_sizes[self.stage], (self.axis_name, self.dtype)
        down = self.stage > 0 or self.config.downsample_in_first_stage
        self.layers = [
            _Layer(self.config, width, 2 if down and i == 0 else 1, *own, name=str(i))
            for i in range(self.config.depths[self.stage])
        ]

    def __call__(
        self, layer: int, hidden: jax.Array, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        return self.layers[layer](hidden, mask, live)


class _Stage(nn.Module):
    config: ResNetConfig
    stage: int
    axis_name: str | None
    dtype: Any

    def setup(self) -> None:
        self.layers = _Layers(self.config, self.stage, self.axis_name, self.dtype)

    def __call__(
        self, layer: int, hidden: jax.Array, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        return self.layers(layer, hidden, mask, live)


class _Stages(nn.Module):
    """The stages under the names "0", "1", ... as in the checkpoints."""

    config: ResNetConfig
    axis_name: str | None
    dtype: Any

    def setup(self) -> None:
        own = (self.axis_name, self.dtype)
        self.stages = [
            _Stage(self.config, i, *own, name=str(i)) for i in range(len(self.config.depths))
        ]

    def __call__(
        self, index: int, hidden: jax.Array, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        stage, layer = places(self.config.depths)[index]
        return self.stages[stage](layer, hidden, mask, live)


class _Encoder(nn.Module):
    config: ResNetConfig
    axis_name: str | None
    dtype: Any

    def setup(self) -> None:
        self.stages = _Stages(self.config, self.axis_name, self.dtype)

    def __call__(
        self, index: int, hidden: jax.Array, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        return self.stages(index, hidden, mask, live)


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
        self.encoder = _Encoder(self.config, self.axis_name, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return sum(self.config.depths)

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the map after the first convolution and max pooling."""
        hidden = pixels(batch, self.config.num_channels).astype(self.dtype)
        return self.embedder(hidden, _rows(batch), live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the map after residual layer `index`."""
        return self.encoder(index, hidden, _rows(batch), live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" (n, height * width, dim) and "pooled" (n, dim)."""
        tokens = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
        return {"tokens": tokens, "pooled": pool({"tokens": tokens}, {}, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _rows(batch: Batch) -> jax.Array | None:
    mask = batch.get("mask")
    return None if mask is None else jnp.asarray(mask, bool)


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


RESNET = Family(
    model_type="resnet",
    modality="image",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_sizes"][-1],
    example=_example,
    rules=((r"(.*convolution)/kernel", r"\1.weight", "conv"),),
    aliases=((r"^resnet[.]", ""), (r"[.]layer_(\d)[.]", r".\1.")),  # the second of the Flax class
    ignored=(r"(.*[.])?num_batches_tracked", r"classifier[.].*"),
    class_name="ResNetModel",
    heads={
        "classification": classification("ResNetForImageClassification", "mean", "classifier.1")
    },
)
