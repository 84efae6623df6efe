"""The preprocessing that travels with the weights: found in the folder of a checkpoint."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_INPUT_FILES = {
    "text": ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model"),
    "image": ("preprocessor_config.json", "processor_config.json"),
    "audio": ("preprocessor_config.json",),
}
_INPUT_FILES["image_text"] = _INPUT_FILES["text"] + _INPUT_FILES["image"]
_OPEN_CLIP, _BANDS = "open_clip_config.json", "band_inputs.json"


@dataclasses.dataclass(frozen=True)
class MissingInputs:
    """Stands for the preprocessing of a checkpoint that has none: its use is an error."""

    modality: str
    folder: str

    def __call__(self, *raw: Any, **named: Any) -> Any:
        """Refuse: nobody knows what these weights were fed with."""
        files = _INPUT_FILES[self.modality]
        raise ValueError(
            f"{self.folder!r} has no preprocessing for {self.modality} inputs: none of {files}; "
            "put the files of the original checkpoint there, or make the batches by hand"
        )

    def save(self, folder: str | Path) -> None:
        """Write nothing: there is nothing."""


def load_inputs(
    folder: Path,
    modality: str,
    config: Mapping[str, Any],
    *,
    published: Callable[[Mapping[str, Any]], Any] | None = None,
) -> Any:
    """Return the input spec of a checkpoint folder; `MissingInputs` where it has none.

    Args:
        folder: a local folder.
        modality: of the family.
        config: the dict of the family's `config.json`.
        published: `config -> input spec`, asked where the folder has no preprocessing; see
            `Family.inputs`.

    Raises:
        ValueError: its files are damaged, or are for other inputs.
    """
    if modality == "image_text":
        return _pair(folder, config)
    if modality == "image" and (folder / _BANDS).is_file():
        from jtl.data.bands import load_band_inputs

        return load_band_inputs(folder)
    if not any((folder / name).is_file() for name in _INPUT_FILES[modality]):
        if modality == "image" and (folder / _OPEN_CLIP).is_file():
            from jtl.data.open_clip import open_clip_inputs

            return open_clip_inputs(json.loads((folder / _OPEN_CLIP).read_text(encoding="utf-8")))
        if modality == "image" and config.get("pretrained_cfg"):
            from jtl.data.images import timm_inputs

            return timm_inputs(config["pretrained_cfg"])
        known = None if published is None else published(config)
        return MissingInputs(modality, str(folder)) if known is None else known
    if modality == "text":
        from jtl.data.text import load_text_inputs

        return load_text_inputs(folder, config)
    if modality == "audio":
        from jtl.data.audio import load_audio_inputs

        return load_audio_inputs(folder, config)
    from jtl.data.images import load_image_inputs

    return load_image_inputs(folder, config)


def _pair(folder: Path, config: Mapping[str, Any]) -> Any:
    from jtl.data.pairs import pair_inputs

    text = load_inputs(folder, "text", config.get("text_config", {}))
    images = load_inputs(folder, "image", config.get("vision_config", {}))
    if isinstance(text, MissingInputs) and isinstance(images, MissingInputs):
        return MissingInputs("image_text", str(folder))
    return pair_inputs(text, images, config)


def adapted_inputs(
    inputs: Any, image_size: int | tuple[int, int] | None, channels: int | None
) -> Any:
    """Return image inputs for another size or number of channels, all else as it was.

    Args:
        inputs: of `load_inputs`; of a pair, its images' are made anew.
        image_size: (height, width), or one number for both; None leaves it.
        channels: None leaves them. Files hold 1 or 3; for others the inputs are `MissingInputs`, as
            they are for other bands, whose means nobody knows.
    """
    from jtl.data.bands import BandInputs
    from jtl.data.images import ImageInputs, resized
    from jtl.data.pairs import PairInputs

    if isinstance(inputs, PairInputs):
        images = adapted_inputs(inputs.images, image_size, channels)
        return dataclasses.replace(inputs, images=images)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if isinstance(inputs, BandInputs) and channels in (None, len(inputs.mean)):
        return dataclasses.replace(inputs, size=size or inputs.size)
    if not isinstance(inputs, ImageInputs | BandInputs):
        return inputs
    if isinstance(inputs, BandInputs) or channels not in (None, 1, 3):
        return MissingInputs("image", f"a model of {channels} channels")
    return resized(inputs, size or inputs.size, channels or inputs.channels)
