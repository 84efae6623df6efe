"""EfficientNet B0 to B7, and EfficientNet-Lite: inverted bottlenecks scaled in width and depth.

The names are those of transformers' EfficientNetModel; checkpoints in the names of the PyTorch
ports (`_blocks.0._depthwise_conv`) and of timm (`blocks.0.0.conv_dw`) are read too. Lite, which
transformers does not have, is without squeeze and excitation, with ReLU6, its stem and head do not
grow, and it pads as TensorFlow does at every size. Stages: "stem" is the first convolution,
"block_i" is `encoder/blocks/i`, "top" the last convolution and the mean of the map.

Reference: Tan and Le 2019, arXiv:1905.11946; drop connect is stochastic depth: Huang et al. 2016,
arXiv:1603.09382.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch, Family, Out, Rules, run_stages
from jtl.models.families.efficientnet_sizes import (
    EfficientNetConfig,
    Plan,
    efficientnet_config,
    lite_config,
    plans,
    stem_width,
    top_width,
)
from jtl.models.heads import pool
from jtl.models.heads.pretrained import classification
from jtl.models.layers import BatchNorm, activation, pixels
from jtl.models.layers.depthwise import DepthwiseConv, Sides
from jtl.models.layers.maps import flat, real_rows
from jtl.models.layers.nest import Nest
from jtl.models.layers.pointwise import pointwise
from jtl.models.layers.squeeze_excite import SqueezeExcite
from jtl.models.layers.stochastic_depth import StochasticDepth
from jtl.models.resize import any_size, channels_of
from jtl.weights.checkpoint import Checkpoint
from jtl.weights.layouts import renamed

POOLINGS = ("mean",)


def _conv(width: int, size: int, stride: int, padding: Any, dtype: Any, name: str) -> Any:
    """Return a convolution without bias, a depthwise one where the width is 0."""
    if not width:
        return DepthwiseConv(size, stride, padding, False, dtype=dtype, name=name)
    return nn.Conv(
        width,
        (size, size),
        strides=(stride, stride),
        padding=padding,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        conv_general_dilated=pointwise,
        name=name,
    )


def _norm(config: EfficientNetConfig, axis_name: str | None, dtype: Any, name: str) -> BatchNorm:
    own = (1.0 - config.batch_norm_momentum, config.batch_norm_eps, axis_name, dtype)
    return BatchNorm(*own, name=name)


class _Parts(nn.Module):
    """Convolution, BatchNorm, and the activation or none."""

    config: EfficientNetConfig
    names: tuple[str, str]
    width: int = 0
    size: int = 1
    stride: int = 1
    padding: str | Sides = "SAME"
    act: bool = True
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        own = (self.width, self.size, self.stride, self.padding, self.dtype)
        hidden = _conv(*own, self.names[0])(hidden)
        norm = _norm(self.config, self.axis_name, self.dtype, self.names[1])
        hidden = norm(hidden, mask, live)
        return activation(self.config.hidden_act)(hidden) if self.act else hidden


class _Block(nn.Module):
    """Widen, convolve each channel, weigh the channels, narrow; added to the stream if it fits."""

    config: EfficientNetConfig
    plan: Plan
    axis_name: str | None
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        config, plan = self.config, self.plan
        parts = functools.partial(_Parts, config, axis_name=self.axis_name, dtype=self.dtype)
        inner = hidden
        if plan.expand != 1:
            wide = plan.narrow * plan.expand
            inner = parts(("expand_conv", "expand_bn"), wide, name="expansion")(inner, mask, live)
        names, own = ("depthwise_conv", "depthwise_norm"), (0, plan.kernel, plan.stride)
        inner = parts(names, *own, plan.padding, name="depthwise_conv")(inner, mask, live)
        if not config.lite:
            narrow = max(1, int(plan.narrow * config.squeeze_expansion_ratio))
            inner = SqueezeExcite(narrow, config.hidden_act, self.dtype, name="squeeze_excite")(
                inner
            )
        project = parts(("project_conv", "project_bn"), plan.width, act=False, name="projection")
        inner = project(inner, mask, live)
        return hidden + StochasticDepth(plan.rate)(inner, live) if plan.residual else inner


class EfficientNet(nn.Module):
    """EfficientNet in stages; see `models/backbone.py` for the contract.

    A border's activations are maps (n, height, width, channels); "tokens" are the places of the
    last map, "pooled" is their mean. A stage that is not live normalises by its running statistics
    and leaves them as they are.

    Attributes:
        config: sizes and rates.
        pooling: "mean".
        dtype: of the computation; parameters and statistics are float32.
        axis_name: axis of devices over which BatchNorm takes its moments; None for one program.
    """

    config: EfficientNetConfig
    pooling: str = "mean"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        config = self.config
        own: Any = dict(axis_name=self.axis_name, dtype=self.dtype)
        sides = "SAME" if config.lite else ((0, 1), (0, 1))
        names = ("convolution", "batchnorm")
        self.embeddings = _Parts(config, names, stem_width(config), 3, 2, sides, **own)
        block, top = functools.partial(_Block, config, **own), top_width(config)
        blocks = (
            (f"blocks/{i}", functools.partial(block, plan)) for i, plan in enumerate(plans(config))
        )
        conv = functools.partial(_conv, top, 1, 1, "SAME", self.dtype)
        norm = functools.partial(_norm, config, **own)
        self.encoder = Nest((*blocks, ("top_conv", conv), ("top_bn", norm)))

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(plans(self.config))

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the map after the first convolution."""
        hidden = pixels(batch, self.config.num_channels).astype(self.dtype)
        return self.embeddings(hidden, real_rows(batch), live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the map after block `index`."""
        return self.encoder(f"blocks/{index}", hidden, real_rows(batch), live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" (n, height * width, dim) and "pooled" (n, dim)."""
        hidden = self.encoder("top_conv", hidden)
        hidden = self.encoder("top_bn", hidden, real_rows(batch), live)
        tokens = flat(activation(self.config.hidden_act)(hidden))
        return {"tokens": tokens, "pooled": pool({"tokens": tokens}, {}, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> EfficientNet:
    return EfficientNet(efficientnet_config(config), pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    blocks = len(plans(efficientnet_config(config)))
    labels = ((f"encoder/blocks/{i}/.*", f"block_{i}") for i in range(blocks))
    return (("embeddings/.*", "stem"), *labels, ("encoder/top_(conv|bn)/.*", "top"))


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    return {"pixel_values": jnp.zeros((1, 32, 32, config["num_channels"]))}


# What a block of the PyTorch ports has, under transformers' names.
_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_se_reduce": "squeeze_excite.reduce",
    "_se_expand": "squeeze_excite.expand",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
# timm's: the first where a block widens, the second where it does not.
_TIMM = {
    "se.conv_reduce": "_se_reduce",
    "se.conv_expand": "_se_expand",
    "conv_dw": "_depthwise_conv",
}
_WIDENED = {"conv_pw": "_expand_conv", "bn1": "_bn0", "bn2": "_bn1", "conv_pwl": "_project_conv"}
_WIDENED |= {**_TIMM, "bn3": "_bn2"}
_PLAIN = {**_TIMM, "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
_ENDS = (
    (r"_?conv_stem[.](.*)", r"embeddings.convolution.\1"),
    (r"_?conv_head[.](.*)", r"encoder.top_conv.\1"),
    (r"(?:_fc|classifier)[.](.*)", r"classifier.\1"),
)
_PORTS = (
    *_ENDS,
    (r"_bn0[.](.*)", r"embeddings.batchnorm.\1"),
    (r"_bn1[.](.*)", r"encoder.top_bn.\1"),
    (r"_blocks[.](\d+)[.](\w+)[.](\w+)", lambda m: f"encoder.blocks.{m[1]}.{_BLOCK[m[2]]}.{m[3]}"),
)


def _layout(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Bring the names of the PyTorch ports, and timm's, to transformers'."""
    if "_conv_stem.weight" in checkpoint.names:
        return renamed(checkpoint, _PORTS)
    if "conv_stem.weight" not in checkpoint.names:
        return checkpoint
    made = efficientnet_config(config)
    before = [sum(p.stage < stage for p in plans(made)) for stage in range(len(made.strides))]

    def block(match: Any) -> str:
        stage = int(match[1])
        own = (_PLAIN if made.expand_ratios[stage] == 1 else _WIDENED)[match[3]]
        return f"encoder.blocks.{before[stage] + int(match[2])}.{_BLOCK[own]}.{match[4]}"

    ends = ((r"bn1[.](.*)", r"embeddings.batchnorm.\1"), (r"bn2[.](.*)", r"encoder.top_bn.\1"))
    rule = (r"blocks[.](\d+)[.](\d+)[.]((?:se[.])?\w+)[.](\w+)", block)
    return renamed(checkpoint, (*_ENDS, *ends, rule))


_COMMON: dict[str, Any] = dict(
    modality="image",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_dim"],
    example=_example,
    resize=any_size,
    channels=channels_of("embeddings/convolution/kernel"),
    rules=((r"(.*)/kernel", r"\1.weight", "conv"),),
    ignored=(r"(.*[.])?num_batches_tracked", r"classifier[.].*"),
    layout=_layout,
)

EFFICIENTNET = Family(
    model_type="efficientnet",
    class_name="EfficientNetModel",
    aliases=((r"^efficientnet[.]", ""),),
    heads={"classification": classification("EfficientNetForImageClassification", "mean")},
    **_COMMON,
)

EFFICIENTNET_LITE = Family(
    model_type="efficientnet_lite",
    aliases=((r"^efficientnet_lite[.]", ""),),
    heads={"classification": classification("EfficientNetLiteForImageClassification", "mean")},
    complete=lite_config,
    **_COMMON,
)
