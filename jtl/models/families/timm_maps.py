"""timm's configs of ResNet, ConvNeXt, Swin and EfficientNet-Lite, which torchvision's names share.

Such a config is `{"architecture": "resnet50", "num_classes": 1000, ...}`; a bare file of weights is
opened with one given by hand: `load_backbone("resnet50-11ad3fa6.pth", config={"architecture":
"resnet50"})`.
"""

from collections.abc import Mapping
from typing import Any

_DEEP = (3, 4, 6, 3)
# {name: (kind of layer, layers of each stage)}
_RESNETS = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", _DEEP),
    "resnet50": ("bottleneck", _DEEP),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
# {size: (layers of each stage, first width)}
_CONVNEXTS = {
    "atto": ((2, 2, 6, 2), 40),
    "femto": ((2, 2, 6, 2), 48),
    "pico": ((2, 2, 6, 2), 64),
    "nano": ((2, 2, 8, 2), 80),
    "tiny": ((3, 3, 9, 3), 96),
    "small": ((3, 3, 27, 3), 96),
    "base": ((3, 3, 27, 3), 128),
    "large": ((3, 3, 27, 3), 192),
    "xlarge": ((3, 3, 27, 3), 256),
    "huge": ((3, 3, 27, 3), 352),
}
# {size: (layers of the third stage, first width, heads of the first stage)}
_SWINS = {
    "tiny": (6, 96, 3),
    "small": (18, 96, 3),
    "base": (18, 128, 4),
    "large": (18, 192, 6),
}


def timm_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return timm's config in transformers' terms, None where it is of another architecture.

    Args:
        config: the dict of a config file; `architecture` may have timm's tag after a point.

    >>> timm_config({"architecture": "resnet18.a1_in1k"})["layer_type"]
    'basic'
    >>> timm_config({"architecture": "swin_tiny_patch4_window7_224"})["depths"]
    [2, 2, 6, 2]
    """
    name = str(config.get("architecture", "")).split(".")[0]
    made = _resnet(name) or _convnext(name) or _swin(name) or _lite(name)
    if made is None:
        return None
    given = config.get("pretrained_cfg") or {}
    classes = config.get("num_classes", given.get("num_classes")) or 1000
    return {**made, "id2label": {str(i): f"LABEL_{i}" for i in range(classes)}}


def _resnet(name: str) -> dict[str, Any] | None:
    if name not in _RESNETS:
        return None
    kind, depths = _RESNETS[name]
    first = 64 if kind == "basic" else 256
    widths = [first * 2**stage for stage in range(4)]
    sizes = dict(embedding_size=64, hidden_sizes=widths, depths=list(depths))
    return {"model_type": "resnet", "layer_type": kind, **sizes}


def _convnext(name: str) -> dict[str, Any] | None:
    kind, _, size = name.partition("_")
    if kind not in ("convnext", "convnextv2") or size not in _CONVNEXTS:
        return None
    depths, first = _CONVNEXTS[size]
    widths = [first * 2**stage for stage in range(4)]
    # timm's last LayerNorm is like the others; transformers' is not.
    rest = dict(hidden_sizes=widths, depths=list(depths), layer_norm_eps=1e-6)
    return {"model_type": kind, **rest}


def _swin(name: str) -> dict[str, Any] | None:
    kind, size, *rest = (*name.split("_"), "", "")
    ends: Any = {("patch4", "window7", "224"): (7, 224), ("patch4", "window12", "384"): (12, 384)}
    window, side = ends.get(tuple(rest[:3]), (0, 0))
    if kind != "swin" or size not in _SWINS or not window:
        return None
    third, first, heads = _SWINS[size]
    return {
        "model_type": "swin",
        "embed_dim": first,
        "depths": [2, 2, third, 2],
        "num_heads": [heads * 2**stage for stage in range(4)],
        "window_size": window,
        "image_size": side,
    }


def _lite(name: str) -> dict[str, Any] | None:
    lead, _, variant = name.rpartition("_")
    if lead != "tf_efficientnet" or not variant.startswith("lite"):
        return None
    return {"model_type": "efficientnet_lite", "variant": variant}
