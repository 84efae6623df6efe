"""The table of model families: from a `model_type` to the file that has it.

A family is a file in this folder and a row here for each `model_type` that it reads. Files are
imported when one of their rows is asked for.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from jtl import near
from jtl.models.backbone import Family

# {model_type: "file:NAME of its Family"}
TABLE: dict[str, str] = {
    "bert": "bert:BERT",
    "biovil_image": "biovil:BIOVIL_IMAGE",
    "camembert": "roberta:CAMEMBERT",
    "cellvit": "cellvit:CELLVIT",
    "cellvit_sam": "cellvit:CELLVIT_SAM",
    "clip": "clip:CLIP",
    "clip_text_model": "clip:CLIP_TEXT",
    "clip_vision_model": "clip:CLIP_VISION",
    "convnext": "convnext:CONVNEXT",
    "convnextv2": "convnext:CONVNEXTV2",
    "cxr-bert": "bert:CXR_BERT",
    "deberta-v2": "deberta:DEBERTA_V2",
    "deit": "vit:DEIT",
    "dinov2": "dinov2:DINOV2",
    "dinov2_with_registers": "dinov2:DINOV2_WITH_REGISTERS",
    "distilbert": "distilbert:DISTILBERT",
    "efficientnet": "efficientnet:EFFICIENTNET",
    "efficientnet_lite": "efficientnet:EFFICIENTNET_LITE",
    "electra": "electra:ELECTRA",
    "gpt2": "gpt:GPT2",
    "gpt_bigcode": "gpt:GPT_BIGCODE",
    "hubert": "wav2vec2:HUBERT",
    "idefics": "flamingo:IDEFICS",
    "llama": "llama:LLAMA",
    "llava": "llava:LLAVA",
    "medclip": "medclip:MEDCLIP",
    "mistral": "mistral:MISTRAL",
    "mlp": "mlp:FAMILY",
    "mpnet": "mpnet:MPNET",
    "mt5": "t5:MT5_ROW",
    "openflamingo": "open_flamingo:OPENFLAMINGO",
    "prithvi": "satellite:PRITHVI",
    "qwen2": "qwen:QWEN2",
    "qwen3": "qwen:QWEN3",
    "resnet": "resnet:RESNET",
    "roberta": "roberta:ROBERTA",
    "sam_vision_model": "sam:SAM_VISION",
    "satmae": "satellite:SATMAE",
    "satmae_temporal": "satellite:SATMAE_TEMPORAL",
    "siglip": "siglip:SIGLIP",
    "siglip_text_model": "siglip:SIGLIP_TEXT",
    "siglip_vision_model": "siglip:SIGLIP_VISION",
    "starcoder2": "starcoder:STARCODER2",
    "swin": "swin:SWIN",
    "t5": "t5:T5_ROW",
    "t5_encoder": "t5:T5_ENCODER",
    "vit": "vit:VIT",
    "vit_mae": "mae:VIT_MAE",
    "wav2vec2": "wav2vec2:WAV2VEC2",
    "whisper": "whisper:WHISPER",
    "whisper_encoder": "whisper:WHISPER_ENCODER",
    "xlm-roberta": "roberta:XLM_ROBERTA",
}


def family(model_type: Any, source: str = "the config") -> Family:
    """Return the family of a `model_type`.

    Args:
        model_type: of a `config.json`.
        source: how to name what asks for it in the error.

    Raises:
        ValueError: jtl has no such family.

    >>> family("bert").class_name
    'BertModel'
    """
    if model_type not in TABLE:
        raise ValueError(
            f"{source} asks for model_type {model_type!r}; jtl has {sorted(TABLE)}; "
            f"give a checkpoint of one of these{near.nearest(str(model_type), TABLE)}"
        )
    file, name = TABLE[model_type].split(":")
    return getattr(importlib.import_module(f"{__name__}.{file}"), name)


def parts(model_type: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the families that read a part of this checkpoint, such as CLIP's image tower."""
    rows = (family(name) for name in TABLE if name != model_type)
    return tuple(
        row.model_type
        for row in rows
        if row.part and config.get(row.part, {}).get("model_type") == row.model_type
    )
