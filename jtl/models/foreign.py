"""Configs of other projects: what family, and what config of ours, a folder of theirs is."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jtl.weights.pickles import contents

_PICKLES = (".pth", ".pt", ".bin", ".ckpt")


def _open_clip(config: Mapping[str, Any]) -> dict[str, Any] | None:
    from jtl.models.families import open_clip

    return open_clip.read_config(config)


def _timm_vit(config: Mapping[str, Any]) -> dict[str, Any] | None:
    from jtl.models.families.vit_layouts import timm_config

    return timm_config(config)


def _timm_maps(config: Mapping[str, Any]) -> dict[str, Any] | None:
    from jtl.models.families.timm_maps import timm_config

    return timm_config(config)


def _prithvi(config: Mapping[str, Any]) -> dict[str, Any] | None:
    from jtl.models.families.satellite import prithvi_config

    return prithvi_config(config)


def _cellvit(config: Mapping[str, Any]) -> dict[str, Any] | None:
    from jtl.models.families.cellvit_files import read_config

    return read_config(config)


# Each looks at the dict of a config file; it returns the config in this library's terms, with its
# `model_type`, or None where the file is not of its kind.
READERS: tuple[Callable[[Mapping[str, Any]], dict[str, Any] | None], ...] = (
    _open_clip,
    _timm_vit,
    _timm_maps,
    _prithvi,
    _cellvit,
)


# Classes that hold a part of what their `model_type` is, and the family that reads them.
CLASSES: dict[str, str] = {
    "SamModel": "sam_vision_model",
    "T5EncoderModel": "t5_encoder",
    "T5ForTokenClassification": "t5_encoder",
    "WhisperEncoder": "whisper_encoder",
    "WhisperForAudioClassification": "whisper_encoder",
}


def family_of(config: Mapping[str, Any]) -> Any:
    """Return the name of the family that a config states, by its class or its `model_type`.

    >>> family_of({"model_type": "t5", "architectures": ["T5EncoderModel"]})
    't5_encoder'
    """
    stated = config.get("architectures") or [""]
    return CLASSES.get(str(stated[0]), config.get("model_type"))


def recognised(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a foreign config in this library's terms, None where no reader knows it."""
    if "model_type" in config:
        return None
    return next((found for reader in READERS if (found := reader(config)) is not None), None)


def inside(path: str | Path) -> dict[str, Any]:
    """Return what a pickled file holds, {} for anything else: some state their config there.

    Args:
        path: of a checkpoint.
    """
    if not Path(path).is_file() or Path(path).suffix not in _PICKLES:
        return {}
    held = contents(path)
    return {str(name): value for name, value in held.items()} if isinstance(held, Mapping) else {}
