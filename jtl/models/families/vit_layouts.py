"""ViT's published layouts made into transformers': timm's names, and the .npz of its authors.

timm's names are also those of the .pth files of DINO, DeiT, MAE, SatMAE and DINOv2. The config of a
folder from timm (`architecture`, `pretrained_cfg`) is read by `timm_config`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jtl.weights.checkpoint import Checkpoint
from jtl.weights.layouts import mapped, renamed, split

# {size in timm's names: (width, layers, heads)}
_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
_ARCHITECTURE = re.compile(
    r"(vit|deit)_(tiny|small|base|large|huge)_(distilled_)?patch(\d+)_(clip_)?(quickgelu_)?(\d+)"
)
_ARGS = ("img_size", "global_pool", "num_classes")
_LAYER = (
    (r"norm1\.(.*)", r"layernorm_before.\1"),
    (r"norm2\.(.*)", r"layernorm_after.\1"),
    (r"attn\.(query|key|value)\.(.*)", r"attention.attention.\1.\2"),
    (r"attn\.proj\.(.*)", r"attention.output.dense.\1"),
    (r"mlp\.fc1\.(.*)", r"intermediate.dense.\1"),
    (r"mlp\.fc2\.(.*)", r"output.dense.\1"),
)
_NAMES = (
    (r"patch_embed\.proj\.(.*)", r"embeddings.patch_embeddings.projection.\1"),
    (r"cls_token", "embeddings.cls_token"),
    (r"dist_token", "embeddings.distillation_token"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"norm_pre\.(.*)", r"embeddings.norm_pre.\1"),
    (r"(?:fc_)?norm\.(.*)", r"layernorm.\1"),
    (r"pre_logits\.fc\.(.*)", r"pooler.dense.\1"),
    (r"head_dist\.(.*)", r"distillation_classifier.\1"),
    (r"(decoder_(?:embed|norm|pred)\..*|decoder_pos_embed|mask_token)", r"decoder.\1"),
)
_NPZ = (
    (r"(?:params/)?cls", "embeddings/cls_token"),
    (r"(?:params/)?embedding/(.*)", r"embeddings/patch_embeddings/projection/\1"),
    (
        r"(?:params/)?Transformer/posembed_input/pos_embedding",
        "embeddings/position_embeddings",
    ),
    (r"(?:params/)?Transformer/encoder_norm/(.*)", r"layernorm/\1"),
    (r"(?:params/)?pre_logits/(.*)", r"pooler/dense/\1"),
    (r"(?:params/)?head/(.*)", r"classifier/\1"),
)
_NPZ_LAYER = (
    (r"LayerNorm_0/(.*)", r"layernorm_before/\1"),
    (r"LayerNorm_[12]/(.*)", r"layernorm_after/\1"),
    (r"MlpBlock_\d/Dense_0/(.*)", r"intermediate/dense/\1"),
    (r"MlpBlock_\d/Dense_1/(.*)", r"output/dense/\1"),
    (r"MultiHeadDotProductAttention_\d/(query|key|value)/(.*)", r"attention/attention/\1/\2"),
    (r"MultiHeadDotProductAttention_\d/out/(.*)", r"attention/output/dense/\1"),
)


def published(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Return a ViT's checkpoint under transformers' names, whoever wrote it.

    Args:
        checkpoint: of `weights.read`.
        config: whole, of the family.
    """
    if any("Transformer/encoderblock_" in name for name in checkpoint.names):
        return _from_npz(checkpoint)
    if any(re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", name) for name in checkpoint.names):
        return _from_timm(checkpoint, config)
    return checkpoint


def _from_timm(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    parts = tuple(rf"\1.attn.{name}.\2" for name in ("query", "key", "value"))
    checkpoint = split(checkpoint, r"(.*)\.attn\.qkv\.(.*)", parts)
    head = "cls_classifier" if config.get("model_type") == "deit" else "classifier"
    blocks = [
        (rf"{theirs}\.(\d+)\.{name}", rf"{ours}.\1.{_shifted(template)}")
        for theirs, ours in (
            ("blocks", "encoder.layer"),
            ("decoder_blocks", "decoder.decoder_layers"),
        )
        for name, template in _LAYER
    ]
    checkpoint = renamed(checkpoint, [*blocks, *_NAMES, (r"head\.(.*)", rf"{head}.\1")])
    table = checkpoint.names.get("embeddings.position_embeddings")
    tokens = 2 if config.get("model_type") == "deit" else 1
    if table is None or table.shape[1] % 2 == 0 and tokens == 2:
        return checkpoint
    return _with_first_positions(checkpoint, config, tokens)


def _with_first_positions(
    checkpoint: Checkpoint, config: Mapping[str, Any], tokens: int
) -> Checkpoint:
    """Put zeros before a table that has positions of the patches only, as DeiT III's has."""
    from jtl.models.layers.patches import grid, pair

    sides = (pair(config[name], name) for name in ("image_size", "patch_size"))
    patches = int(np.prod(grid(*sides)))
    name = "embeddings.position_embeddings"
    if checkpoint.names[name].shape[1] != patches:
        return checkpoint
    return mapped(
        checkpoint,
        re.escape(name),
        lambda table: np.pad(table, ((0, 0), (tokens, 0), (0, 0))),
        shape=lambda shape: (shape[0], shape[1] + tokens, shape[2]),
    )


def _from_npz(checkpoint: Checkpoint) -> Checkpoint:
    block = r"(?:params/)?Transformer/encoderblock_(\d+)/"
    rules = [
        (block + name, rf"encoder/layer/\1/{_shifted(template)}") for name, template in _NPZ_LAYER
    ]
    checkpoint = renamed(checkpoint, [*rules, *_NPZ])
    layer = r"encoder/layer/\d+/attention/"
    for pattern, axis in (
        (rf"{layer}attention/\w+/kernel", 1),  # (dim, heads, size)
        (rf"{layer}attention/\w+/bias", 0),
        (rf"{layer}output/dense/kernel", 0),  # (heads, size, dim)
    ):
        checkpoint = mapped(checkpoint, pattern, _joined(axis), shape=_joined_shape(axis))
    return checkpoint


def _joined(axis: int) -> Any:
    shape = _joined_shape(axis)
    return lambda array: array.reshape(shape(array.shape))


def _joined_shape(axis: int) -> Any:
    """Join the axis of the heads and the one behind it; a kernel without heads stays."""

    def shape(old: tuple[int, ...]) -> tuple[int, ...]:
        wanted = 2 if axis == 0 and len(old) == 2 else 3
        if len(old) < wanted:
            return old
        return (*old[:axis], old[axis] * old[axis + 1], *old[axis + 2 :])

    return shape


def _shifted(template: str) -> str:
    """Count the groups of a template one on: the number of the layer comes first."""
    return re.sub(r"\\(\d)", lambda match: rf"\{int(match[1]) + 1}", template)


def timm_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of a ViT or a DeiT of timm, None where it is of another architecture.

    Args:
        config: the dict of `config.json` in a folder of timm's.

    Raises:
        ValueError: it is a ViT with arguments that are not built here.

    >>> timm_config({"architecture": "vit_tiny_patch16_224"})["hidden_size"]
    192
    >>> timm_config({"architecture": "resnet50"})
    """
    match = _ARCHITECTURE.match(str(config.get("architecture", "")))
    if match is None:
        return None
    kind, size, distilled, patch, clip, quick, image = match.groups()
    rest, args = str(config["architecture"])[match.end() :], config.get("model_args") or {}
    unknown = sorted(set(args) - set(_ARGS))
    if unknown or re.search("gap|reg|rpn|siglip|xp|mlp", rest):
        raise ValueError(
            f"timm's {config['architecture']!r} with {dict(args)} is a ViT that is not built here; "
            f"built are tiny to huge with a CLS token, with model_args {_ARGS}; "
            "take such a checkpoint"
        )
    stated = config.get("pretrained_cfg") or {}
    channels, height, width = stated.get("input_size") or (3, int(image), int(image))
    dim, layers, heads = _SIZES[size]
    classes = config.get("num_classes", stated.get("num_classes", 1000))
    return {
        "model_type": "deit" if kind == "deit" and distilled else "vit",
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * dim,
        "image_size": args.get("img_size") or [height, width],
        "patch_size": int(patch),
        "num_channels": channels,
        "hidden_act": "quick_gelu" if quick else "gelu",
        "layer_norm_eps": 1e-5 if clip else 1e-6,
        "pre_norm": bool(clip),
        "id2label": {str(i): str(i) for i in range(classes)},
        "pretrained_cfg": dict(stated),
    }
