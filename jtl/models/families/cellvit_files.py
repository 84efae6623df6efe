"""CellViT's configs and files: what they say of themselves, their defaults, their names.

Reference: Hörst et al. 2023, arXiv:2306.15350; ViT-256: Chen et al. 2022, arXiv:2206.02647.
"""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from jtl.models.families import sam, vit_layouts
from jtl.weights.checkpoint import Checkpoint
from jtl.weights.layouts import renamed

_DECODER = dict(
    num_nuclei_classes=6,
    num_tissue_classes=19,
    regression_loss=False,
    decoder_base=64,
    decoder_widths=None,
)
_VIT_256 = dict(
    hidden_size=384,
    num_hidden_layers=12,
    num_attention_heads=6,
    mlp_ratio=4.0,
    image_size=224,
    patch_size=16,
    num_channels=3,
    qkv_bias=True,
    hidden_act="gelu",
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    drop_path_rate=0.0,
    layer_norm_eps=1e-6,
    initializer_range=0.02,
    extract_layers=[3, 6, 9, 12],
    **_DECODER,
)
_SAM_FIELDS = dict(
    mlp_ratio=4.0,
    mlp_dim=None,
    image_size=1024,
    patch_size=16,
    output_channels=256,
    window_size=14,
    num_channels=3,
    qkv_bias=True,
    use_abs_pos=True,
    use_rel_pos=True,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    attention_dropout=0.0,
    initializer_range=0.02,
    extract_layers=None,
    **_DECODER,
)


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config on DINO's ViT with ViT-256's sizes for what it does not state."""
    return {**_VIT_256, **config}


def complete_sam(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config on SAM's encoder with SAM-B's sizes for what it does not state."""
    whole = {**sam.SIZES["vit_b"], **_SAM_FIELDS, **config}
    if whole["mlp_dim"] is None:
        whole["mlp_dim"] = int(whole["hidden_size"] * whole["mlp_ratio"])
    if whole["extract_layers"] is None:  # where the layers without windows are, in SAM
        quarter = whole["num_hidden_layers"] // 4
        whole["extract_layers"] = [quarter * i for i in (1, 2, 3, 4)]
    return whole


def read_config(stated: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of a file of CellViT's, None where it is another one.

    Args:
        stated: what the file holds beside the weights: "arch" and "config", whose names are joined
            by dots.

    Raises:
        ValueError: it is a CellViT that is not built here.

    >>> made = read_config({"arch": "CellViTSAM", "config": {"model.backbone": "SAM-H"}})
    >>> made["model_type"], made["hidden_size"], made["num_nuclei_classes"]
    ('cellvit_sam', 1280, 6)
    """
    arch, own = str(stated.get("arch")), stated.get("config")
    if not arch.startswith("CellViT") or not isinstance(own, Mapping):
        return None
    given = {str(name): value for name, value in flatten_dict(dict(own), sep=".").items()}
    found = {
        name: given[f"data.{name}"]
        for name in ("num_nuclei_classes", "num_tissue_classes")
        if f"data.{name}" in given
    }
    found["regression_loss"] = bool(given.get("model.regression_loss", False))
    found["pretrained_cfg"] = _preprocessing(given)
    if arch == "CellViT256":
        return {"model_type": "cellvit", **_VIT_256, **found}
    if arch == "CellViT":
        names = dict(embed_dim="hidden_size", depth="num_hidden_layers")
        names |= dict(num_heads="num_attention_heads", extract_layers="extract_layers")
        sizes = {ours: given[f"model.{theirs}"] for theirs, ours in names.items()}
        return {"model_type": "cellvit", **_VIT_256, **sizes, **found}
    size = str(given.get("model.backbone", "")).lower().replace("sam-", "vit_")
    if arch != "CellViTSAM" or size not in sam.SIZES:
        raise ValueError(
            f"the file holds a {arch!r} on {given.get('model.backbone')!r}; built here are "
            "CellViT, CellViT256 and CellViTSAM on SAM-B, SAM-L and SAM-H, whose branches have "
            "decoders of their own; take a checkpoint of one of these"
        )
    return {"model_type": "cellvit_sam", **complete_sam({**sam.SIZES[size], **found})}


def _preprocessing(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return mean and deviation in timm's terms; tiles come in the size in which they are read."""
    mean, std = (
        list(given.get(f"transformations.normalize.{name}", (0.5, 0.5, 0.5)))
        for name in ("mean", "std")
    )
    return {"input_size": [3, 256, 256], "mean": mean, "std": std, "crop_pct": 1.0}


def layout(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Bring DINO's names below `encoder` (CellViT) or `backbone` (HIPT) to those of ViT here."""
    first = next((n for n in checkpoint.names if n.endswith("patch_embed.proj.weight")), None)
    if first is None:
        return checkpoint
    prefix = first.removesuffix("patch_embed.proj.weight").replace(".", r"\.")
    return vit_layouts.published(renamed(checkpoint, [(f"{prefix}(.*)", r"\1")]), config)


def layout_sam(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Bring SAM's names below `encoder`, and the tissue classifier's, to those here."""
    made = sam.published(checkpoint, config)
    return renamed(made, [(r"classifier_head\.(.*)", r"classifier.\1")])
