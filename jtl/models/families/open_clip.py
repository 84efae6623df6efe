r"""open_clip's files (BioCLIP's among them) in the terms of transformers' CLIP.

`open_clip_config.json` becomes a config of model_type "clip", and the names of
`open_clip_pytorch_model.bin` or `open_clip_model.safetensors` become transformers': the fused
projections of attention are cut into three, and the two projections, which are stored `(in, out)`,
are turned round.

Reference: Cherti et al. 2022, arXiv:2212.07143 (open_clip); Stevens et al. 2023, arXiv:2311.18803
(BioCLIP).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jtl.weights import layouts
from jtl.weights.checkpoint import Checkpoint

# What is read of either tower; a field beside these, with a value, asks for another architecture.
_VISION = ("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio")
_TEXT = ("context_length", "vocab_size", "layers", "width", "heads", "mlp_ratio")
_HARMLESS = ("patch_dropout", "hf_tokenizer_name", "tokenizer_kwargs")


def read_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of model_type "clip" that an open_clip config says, None for others.

    Args:
        config: the dict of `open_clip_config.json`.

    Raises:
        ValueError: a tower is of another architecture than OpenAI's.

    >>> vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16}
    >>> text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    >>> stated = {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}
    >>> made = read_config({"model_cfg": stated})
    >>> made["vision_config"]["num_attention_heads"], made["vision_config"]["hidden_act"]
    (12, 'gelu')
    """
    stated = config.get("model_cfg")
    if not isinstance(stated, Mapping) or "vision_cfg" not in stated or "text_cfg" not in stated:
        return None
    vision, text = stated["vision_cfg"], stated["text_cfg"]
    _check(vision, "vision_cfg", _VISION, {"pool_type": "tok"})
    _check(text, "text_cfg", _TEXT, {"pool_type": "argmax", "proj_type": "linear"})
    if isinstance(vision["layers"], list | tuple):
        raise ValueError(
            f"vision_cfg.layers of the open_clip config is {list(vision['layers'])}: a ResNet; "
            "jtl reads its vision transformers; take such a checkpoint"
        )
    shared = {
        "hidden_act": "quick_gelu" if stated.get("quick_gelu") else "gelu",
        "projection_dim": stated["embed_dim"],
        "layer_norm_eps": 1e-5,
    }
    image = {
        "model_type": "clip_vision_model",
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "num_attention_heads": vision["width"] // vision.get("head_width", 64),
        **_sizes(vision),
        **shared,
    }
    words = {
        "model_type": "clip_text_model",
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["context_length"],
        "num_attention_heads": text["heads"],
        "eos_token_id": 2,  # the place of the largest token, as open_clip has it
        **_sizes(text),
        **shared,
    }
    return {
        "model_type": "clip",
        "projection_dim": stated["embed_dim"],
        "vision_config": image,
        "text_config": words,
    }


def _sizes(tower: Mapping[str, Any]) -> dict[str, int]:
    return {
        "hidden_size": tower["width"],
        "num_hidden_layers": tower["layers"],
        "intermediate_size": int(tower["width"] * tower.get("mlp_ratio", 4.0)),
    }


def _check(
    tower: Mapping[str, Any], name: str, known: tuple[str, ...], only: Mapping[str, str]
) -> None:
    others = {
        field: value
        for field, value in tower.items()
        if field not in (*known, *_HARMLESS) and value and value != only.get(field)
    }
    missing = [f for f in known if f not in tower and f not in ("head_width", "mlp_ratio")]
    if others or missing:
        raise ValueError(
            f"{name} of the open_clip config has {others} and lacks {missing}; jtl reads towers "
            f"of OpenAI's architecture, which have {known}; take a checkpoint of that kind"
        )


# After the prefixes "module." and "text." are gone.
_LAYER = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = r"(?P<visual>visual\.)?transformer\.resblocks\.(?P<index>\d+)\.(?P<part>.+)\.(?P<leaf>\w+)"
_NAMES = (
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.ln_pre\.(\w+)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(\w+)", r"vision_model.post_layernorm.\1"),
    (r"visual\.proj", "visual_projection.weight"),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.(\w+)", r"text_model.final_layer_norm.\1"),
    (r"text_projection", "text_projection.weight"),
    (r"attn_mask|context_length|input_resolution|vocab_size", None),
)


def layout(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Return a checkpoint of open_clip (or OpenAI's own) under transformers' names.

    Others are given back as they are.
    """
    marks = ("visual.conv1.weight", "transformer.resblocks.0.ln_1.weight")
    if not any(name.endswith(marks) for name in checkpoint.names):
        return checkpoint
    made = layouts.renamed(checkpoint, [(r"(?:module\.)?(?:text\.)?(.+)", r"\1")])
    made = layouts.mapped(
        made, r"visual\.proj|text_projection", np.transpose, shape=lambda shape: shape[::-1]
    )
    made = layouts.split(
        made,
        r"(.*)\.attn\.in_proj_(weight|bias)",
        [rf"\1.self_attn.{part}_proj.\2" for part in "qkv"],
    )
    return layouts.renamed(made, [(_BLOCK, _layer), *_NAMES])


def _layer(match: re.Match[str]) -> str:
    tower = "vision_model" if match["visual"] else "text_model"
    part = _LAYER.get(match["part"], match["part"])
    return f"{tower}.encoder.layers.{match['index']}.{part}.{match['leaf']}"
