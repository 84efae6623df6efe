"""ConvNeXt and ConvNeXt V2: a 7x7 depthwise convolution, then an MLP, added to the stream.

The names are those of transformers' ConvNextModel and ConvNextV2Model; checkpoints in the names of
the authors (`downsample_layers.0.0`, `stages.0.0.dwconv`) and of timm (`stem.0`,
`stages.0.blocks.0.conv_dw`) are read too. Stages: "stem" is the patches and their LayerNorm,
"block_i" the i-th layer over all of `encoder/stages/*/layers/*`, "top" the LayerNorm of the mean of
the map. What makes the map smaller belongs to the first block of its stage.

Reference: Liu et al. 2022, arXiv:2201.03545; V2: Woo et al. 2023, arXiv:2301.00808.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch, Family, Out, Rules, run_stages
from jtl.models.heads.pretrained import classification
from jtl.models.layers import activation, flat_dot, layer_norm, pixels
from jtl.models.layers.depthwise import DepthwiseConv
from jtl.models.layers.maps import flat
from jtl.models.layers.nest import Nest
from jtl.models.layers.stated import one_for_each_stage, places, stated
from jtl.models.layers.stochastic_depth import StochasticDepth, growing_rates
from jtl.models.resize import any_size, channels_of
from jtl.weights.checkpoint import Checkpoint
from jtl.weights.layouts import mapped, renamed

POOLINGS = ("mean",)
_EPSILON = 1e-6  # of every LayerNorm but the last


@dataclasses.dataclass(frozen=True)
class ConvNextConfig:
    """The fields of `config.json` that the network reads, under their names there.

    `layer_scale_init_value` is 0 where layers have no scale. `response_norm` is V2's.
    """

    hidden_sizes: tuple[int, ...]
    depths: tuple[int, ...]
    patch_size: int = 4
    num_channels: int = 3
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    layer_scale_init_value: float = 1e-6
    drop_path_rate: float = 0.0
    response_norm: bool = False


def convnext_config(config: Mapping[str, Any]) -> ConvNextConfig:
    """Return the fields that the network reads, checked.

    Args:
        config: the dict of `config.json`; other fields are left alone.

    Raises:
        ValueError: a size is missing, sizes do not fit together, or an activation is not known.

    >>> made = convnext_config(dict(hidden_sizes=[8, 16], depths=[1, 2]))
    >>> made.depths, made.response_norm
    ((1, 2), False)
    """
    made = stated(ConvNextConfig, config, "ConvNeXt")
    one_for_each_stage("ConvNeXt", depths=made.depths, hidden_sizes=made.hidden_sizes)
    if config.get("model_type") == "convnextv2":
        made = dataclasses.replace(made, response_norm=True, layer_scale_init_value=0.0)
    activation(made.hidden_act)
    return made


def _conv(width: int, size: int, config: ConvNextConfig, dtype: Any, name: str) -> nn.Conv:
    """Return a convolution whose stride is its size."""
    return nn.Conv(
        width,
        (size, size),
        strides=(size, size),
        padding="VALID",
        dtype=dtype,
        kernel_init=nn.initializers.normal(config.initializer_range),
        name=name,
    )


class _Embeddings(nn.Module):
    config: ConvNextConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        config = self.config
        width, size = config.hidden_sizes[0], config.patch_size
        hidden = _conv(width, size, config, self.dtype, "patch_embeddings")(images)
        return layer_norm(_EPSILON, self.dtype, name="layernorm")(hidden)


class _Downsampling(nn.Module):
    """LayerNorm, then a convolution that halves both sides."""

    config: ConvNextConfig
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        hidden = layer_norm(_EPSILON, self.dtype, name="0")(hidden)
        return _conv(self.width, 2, self.config, self.dtype, "1")(hidden)


class ResponseNorm(nn.Module):
    """Scale each channel by the size of its map over the mean size: x weight (x norm) + bias + x.

    Attributes:
        dtype: of the output; norms and parameters are float32.

    Reference: Woo et al. 2023, arXiv:2301.00808, section 3.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Return hidden (n, height, width, dim) normalised."""
        shape = (1, 1, 1, hidden.shape[-1])
        weight = self.param("weight", nn.initializers.zeros, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        wide = hidden.astype(jnp.float32)
        square = jnp.sum(jnp.square(wide), axis=(1, 2), keepdims=True)
        # The root of zero has no gradient: a channel that is zero everywhere gets size zero.
        size = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
        normal = size / (jnp.mean(size, axis=-1, keepdims=True) + 1e-6)
        return (weight * (wide * normal) + bias + wide).astype(self.dtype)


class _Layer(nn.Module):
    """Depthwise convolution, LayerNorm, MLP, scale, stochastic depth; added to the stream."""

    config: ConvNextConfig
    width: int
    rate: float
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, live: bool) -> jax.Array:
        config, width = self.config, self.width
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(config.initializer_range),
            dot_general=flat_dot,
        )
        scale, sides = config.initializer_range, ((3, 3), (3, 3))
        conv = DepthwiseConv(7, padding=sides, scale=scale, dtype=self.dtype, name="dwconv")
        inner = layer_norm(_EPSILON, self.dtype, name="layernorm")(conv(hidden))
        inner = activation(config.hidden_act)(dense(4 * width, name="pwconv1")(inner))
        if config.response_norm:
            inner = ResponseNorm(self.dtype, name="grn")(inner)
        inner = dense(width, name="pwconv2")(inner)
        if config.layer_scale_init_value > 0:
            first = nn.initializers.constant(config.layer_scale_init_value)
            own = self.param("layer_scale_parameter", first, (width,))
            inner = inner * own.astype(self.dtype).reshape(1, 1, 1, -1)
        return hidden + StochasticDepth(self.rate)(inner, live)


class ConvNext(nn.Module):
    """ConvNeXt in stages; see `models/backbone.py` for the contract.

    A border's activations are maps (n, height, width, channels); "tokens" are the places of the
    last map, "pooled" is the LayerNorm of their mean.

    Attributes:
        config: sizes and rates.
        pooling: "mean".
        dtype: of the computation; parameters are float32.
    """

    config: ConvNextConfig
    pooling: str = "mean"
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        self.embeddings = _Embeddings(self.config, self.dtype)
        self.encoder = Nest((*self._downsampling(), *self._layers()))
        self.layernorm = layer_norm(self.config.layer_norm_eps, self.dtype)

    def _downsampling(self) -> tuple[tuple[str, Any], ...]:
        widths = self.config.hidden_sizes[1:]
        makers = (functools.partial(_Downsampling, self.config, w, self.dtype) for w in widths)
        return tuple((_smaller(stage), make) for stage, make in enumerate(makers, 1))

    def _layers(self) -> tuple[tuple[str, Any], ...]:
        config = self.config
        rates = growing_rates(config.drop_path_rate, self.blocks)
        return tuple(
            (
                _path(stage, layer),
                functools.partial(_Layer, config, config.hidden_sizes[stage], rate, self.dtype),
            )
            for rate, (stage, layer) in zip(rates, places(config.depths), strict=True)
        )

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return sum(self.config.depths)

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the map of patches."""
        images = pixels(batch, self.config.num_channels)
        return self.embeddings(images.astype(self.dtype))

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the map after layer `index`."""
        stage, layer = places(self.config.depths)[index]
        if stage > 0 and layer == 0:
            hidden = self.encoder(_smaller(stage), hidden)
        return self.encoder(_path(stage, layer), hidden, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" (n, height * width, dim) and "pooled" (n, dim)."""
        tokens = flat(hidden)
        mean = jnp.mean(tokens.astype(jnp.float32), axis=1)
        return {"tokens": tokens, "pooled": self.layernorm(mean)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _path(stage: int, layer: int) -> str:
    return f"stages/{stage}/layers/{layer}"


def _smaller(stage: int) -> str:
    return f"stages/{stage}/downsampling_layer"


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> ConvNext:
    return ConvNext(convnext_config(config), pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    blocks = []
    for i, (stage, layer) in enumerate(places(tuple(config["depths"]))):
        if stage > 0 and layer == 0:
            blocks.append((f"encoder/{_smaller(stage)}/.*", f"block_{i}"))
        blocks.append((f"encoder/{_path(stage, layer)}/.*", f"block_{i}"))
    return (("embeddings/.*", "stem"), *blocks, ("layernorm/.*", "top"))


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    side = config["patch_size"] * 2 ** (len(config["depths"]) - 1)
    return {"pixel_values": jnp.zeros((1, side, side, config["num_channels"]))}


# The authors' names, then timm's; timm's head holds the last LayerNorm.
_STEM = {"0": "patch_embeddings", "1": "layernorm"}
_PARTS = {"dwconv": "dwconv", "norm": "layernorm", "pwconv1": "pwconv1", "pwconv2": "pwconv2"}
_PARTS |= {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}
_GRN = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}
_AT = r"encoder.stages.\1.layers.\2."
_FOREIGN = (
    (
        r"(?:downsample_layers[.]0|stem)[.]([01])[.](.*)",
        lambda m: f"embeddings.{_STEM[m[1]]}.{m[2]}",
    ),
    (
        r"(?:downsample_layers[.](\d)|stages[.](\d)[.]downsample)[.](.*)",
        lambda m: f"encoder.stages.{m[1] or m[2]}.downsampling_layer.{m[3]}",
    ),
    (r"stages[.](\d)[.](?:blocks[.])?(\d+)[.]gamma", _AT + "layer_scale_parameter"),
    (
        r"stages[.](\d)[.](?:blocks[.])?(\d+)[.](?:mlp[.])?grn[.](\w+)",
        lambda m: m.expand(_AT) + f"grn.{_GRN[m[3]]}",
    ),
    (
        r"stages[.](\d)[.](?:blocks[.])?(\d+)[.](dwconv|norm|pwconv\d|conv_dw|mlp[.]fc\d)[.](\w+)",
        lambda m: m.expand(_AT) + f"{_PARTS[m[3]]}.{m[4]}",
    ),
    (r"(?:head[.])?norm[.](.*)", r"layernorm.\1"),
    (r"head[.](?:fc[.])?(weight|bias)", r"classifier.\1"),
)


def _layout(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Bring the authors' names and timm's to transformers'; timm's V2 has flat scales."""
    names = checkpoint.names
    if "downsample_layers.0.0.weight" not in names and "stem.0.weight" not in names:
        return checkpoint
    made = renamed(checkpoint, _FOREIGN)
    made = mapped(
        made,
        r".*[.]grn[.](weight|bias)",
        lambda x: x.reshape(1, 1, 1, -1),
        shape=lambda shape: (1, 1, 1, shape[-1]),
    )
    # Where the layers are convolutions of size 1, their kernels have two sides of length 1.
    return mapped(
        made, r".*[.]pwconv\d[.]weight", lambda x: x.reshape(x.shape[:2]), shape=lambda s: s[:2]
    )


_COMMON: dict[str, Any] = dict(
    modality="image",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_sizes"][-1],
    example=_example,
    resize=any_size,
    channels=channels_of("embeddings/patch_embeddings/kernel"),
    rules=((r"(.*(?:patch_embeddings|dwconv|downsampling_layer/1))/kernel", r"\1.weight", "conv"),),
    ignored=(r"classifier[.].*",),
    layout=_layout,
)

CONVNEXT = Family(
    model_type="convnext",
    class_name="ConvNextModel",
    aliases=((r"^convnext[.]", ""),),
    heads={"classification": classification("ConvNextForImageClassification", "mean")},
    **_COMMON,
)

CONVNEXTV2 = Family(
    model_type="convnextv2",
    class_name="ConvNextV2Model",
    aliases=((r"^convnextv2[.]", ""),),
    heads={"classification": classification("ConvNextV2ForImageClassification", "mean")},
    **_COMMON,
)
