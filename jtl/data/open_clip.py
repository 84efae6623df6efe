"""The image preprocessing that `open_clip_config.json` states."""

from collections.abc import Mapping
from typing import Any

from jtl.data.images import ImageInputs

_FILTERS = {"bicubic": 3, "bilinear": 2}
# What open_clip takes where its config does not say: OpenAI's mean and deviation.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def open_clip_inputs(config: Mapping[str, Any]) -> ImageInputs:
    """Return the preprocessing of a checkpoint of open_clip as it evaluates.

    The shorter side is resized and the middle cut out ("shortest"), or the whole is squeezed into
    the square ("squash").

    Args:
        config: the dict of `open_clip_config.json`.

    Raises:
        ValueError: it states another way to resize, or an interpolation that is not known.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    stated = config.get("preprocess_cfg") or {}
    size = stated.get("size") or config["model_cfg"]["vision_cfg"]["image_size"]
    sides = {size} if isinstance(size, int) else set(size)
    mode, name = stated.get("resize_mode", "shortest"), stated.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or name not in _FILTERS or len(sides) != 1:
        raise ValueError(
            f"open_clip_config.json states resize_mode {mode!r}, interpolation {name!r} and size "
            f"{size}; read are 'shortest' and 'squash', {sorted(_FILTERS)} and squares; state the "
            "preprocessing by data.image_inputs(size, mean=, std=)"
        )
    side = sides.pop()
    square = {"height": side, "width": side}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side} if mode == "shortest" else square,
        crop_size=square,
        resample=_FILTERS[name],
        image_mean=list(stated.get("mean") or _MEAN),
        image_std=list(stated.get("std") or _STD),
    )
    return ImageInputs(processor, (side, side))
