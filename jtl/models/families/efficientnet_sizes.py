"""EfficientNet's config, and the sizes of its blocks: one small network scaled in width and depth.

Reference: Tan and Le 2019, arXiv:1905.11946.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jtl.models.layers import activation
from jtl.models.layers.depthwise import Sides
from jtl.models.layers.stated import stated

# {variant of Lite: (width, depth, image size, dropout of the head)}
LITE: dict[str, tuple[float, float, int, float]] = {
    "lite0": (1.0, 1.0, 224, 0.2),
    "lite1": (1.0, 1.1, 240, 0.2),
    "lite2": (1.1, 1.2, 260, 0.3),
    "lite3": (1.2, 1.4, 280, 0.3),
    "lite4": (1.4, 1.8, 300, 0.3),
}
_STEM, _TOP = 32, 1280


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
    """The fields of `config.json` that the network reads, under their names there.

    `batch_norm_momentum` is what stays of the running statistics, as in the paper's code.
    """

    width_coefficient: float
    depth_coefficient: float
    hidden_dim: int
    depth_divisor: int = 8
    kernel_sizes: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    in_channels: tuple[int, ...] = (32, 16, 24, 40, 80, 112, 192)
    out_channels: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    num_block_repeats: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    expand_ratios: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    depthwise_padding: tuple[int, ...] = ()
    squeeze_expansion_ratio: float = 0.25
    num_channels: int = 3
    hidden_act: str = "swish"
    pooling_type: str = "mean"
    batch_norm_eps: float = 1e-3
    batch_norm_momentum: float = 0.99
    drop_connect_rate: float = 0.2
    lite: bool = False


class Plan(NamedTuple):
    """Sizes of one block."""

    stage: int
    narrow: int  # width before, from which that of squeeze and excitation follows
    width: int
    kernel: int
    stride: int
    expand: int
    padding: str | Sides
    residual: bool
    rate: float


def efficientnet_config(config: Mapping[str, Any]) -> EfficientNetConfig:
    """Return the fields that the network reads, checked.

    Args:
        config: the dict of `config.json`; other fields are left alone.

    Raises:
        ValueError: a size is missing, sizes do not fit together, or a kind is not known.

    >>> sizes = dict(width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280)
    >>> len(plans(efficientnet_config(sizes))), plans(efficientnet_config(sizes))[1].width
    (16, 24)
    """
    made = stated(EfficientNetConfig, config, "EfficientNet")
    made = dataclasses.replace(made, lite=config.get("model_type") == "efficientnet_lite")
    stages = ("kernel_sizes", "in_channels", "out_channels", "strides", "expand_ratios")
    lengths = {name: len(getattr(made, name)) for name in (*stages, "num_block_repeats")}
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"the EfficientNet config has fields of {lengths} stages; give each one for each stage"
        )
    if made.hidden_dim != top_width(made):
        raise ValueError(
            f"hidden_dim is {made.hidden_dim}, width_coefficient={made.width_coefficient} makes "
            f"the last convolution {top_width(made)} wide; correct one of them"
        )
    if made.pooling_type != "mean" or not {*made.strides} <= {1, 2}:
        raise ValueError(
            f"pooling_type is {made.pooling_type!r} and strides are {made.strides}; "
            "'mean' and strides of 1 and 2 are built here; correct the config"
        )
    activation(made.hidden_act)
    return made


def rounded(width: int, config: EfficientNetConfig) -> int:
    """Return a width scaled and rounded to the divisor, by not more than a tenth downwards.

    >>> rounded(32, EfficientNetConfig(1.1, 1.0, 1408))
    32
    """
    scaled, step = width * config.width_coefficient, config.depth_divisor
    near = max(step, int(scaled + step / 2) // step * step)
    return near + step if near < 0.9 * scaled else near


def stem_width(config: EfficientNetConfig) -> int:
    """Return the width of the first convolution, which Lite does not scale."""
    return _STEM if config.lite else rounded(_STEM, config)


def top_width(config: EfficientNetConfig) -> int:
    """Return the width of the last convolution, which Lite does not scale."""
    return _TOP if config.lite else rounded(_TOP, config)


def plans(config: EfficientNetConfig) -> tuple[Plan, ...]:
    """Return the sizes of each block in order of depth."""
    last = len(config.num_block_repeats) - 1
    made: list[Plan] = []
    for stage, repeats in enumerate(config.num_block_repeats):
        fixed = config.lite and stage in (0, last)
        count = repeats if fixed else math.ceil(config.depth_coefficient * repeats)
        width, kernel = rounded(config.out_channels[stage], config), config.kernel_sizes[stage]
        for i in range(count):
            stride = config.strides[stage] if i == 0 else 1
            narrow = rounded(config.in_channels[stage], config) if i == 0 else width
            sides = _sides(kernel, stride, len(made) not in config.depthwise_padding)
            padding = "SAME" if config.lite or stride == 1 else sides
            expand = config.expand_ratios[stage]
            made.append(Plan(stage, narrow, width, kernel, stride, expand, padding, i > 0, 0.0))
    share = config.drop_connect_rate / len(made)
    return tuple(plan._replace(rate=share * i) for i, plan in enumerate(made))


def _sides(kernel: int, stride: int, even: bool) -> Sides:
    """Return the padding of a strided kernel: that of TensorFlow for maps of an even size."""
    half = kernel // 2
    return ((half - 1, half) if even else (half, half),) * 2


def lite_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of Lite with the sizes of its variant and the names of its classes.

    Args:
        config: with `variant`, or with its two coefficients; what it states stands.

    Raises:
        ValueError: there is no such variant.

    >>> lite_config({"variant": "lite2"})["image_size"]
    260
    """
    stated_sizes = all(config.get(name) for name in ("width_coefficient", "depth_coefficient"))
    if config.get("variant") not in LITE and not stated_sizes:
        raise ValueError(
            f"variant is {config.get('variant')!r}; there are {sorted(LITE)}; name one, or give "
            "width_coefficient and depth_coefficient"
        )
    width, depth, side, dropout = LITE.get(str(config.get("variant")), LITE["lite0"])
    sizes = dict(width_coefficient=width, depth_coefficient=depth, image_size=side)
    sizes |= dict(hidden_dim=_TOP, hidden_act="relu6", num_channels=3, dropout_rate=dropout)
    names = config.get("id2label") or {
        str(i): f"LABEL_{i}" for i in range(config.get("num_labels") or 1000)
    }
    given = {name: value for name, value in config.items() if value is not None}
    return {**sizes, **given, "id2label": names}
