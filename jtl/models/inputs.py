"""The preprocessing that travels with the weights: found in the folder of a checkpoint."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_INPUT_FILES = {
    "text": ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model"),
    "image": ("preprocessor_config.json", "processor_config.json"),
}


@dataclasses.dataclass(frozen=True)
class MissingInputs:
    """Stands for the preprocessing of a checkpoint that has none: its use is an error."""

    modality: str
    folder: str

    def __call__(self, raw: Any) -> Any:
        """Refuse: nobody knows what these weights were fed with."""
        files = _INPUT_FILES[self.modality]
        raise ValueError(
            f"{self.folder!r} has no preprocessing for {self.modality} inputs: none of {files}; "
            "put the files of the original checkpoint there, or make the batches by hand"
        )

    def save(self, folder: str | Path) -> None:
        """Write nothing: there is nothing."""


def load_inputs(folder: Path, modality: str, config: Mapping[str, Any]) -> Any:
    """Return the input spec of a checkpoint folder; `MissingInputs` where it has none.

    Args:
        folder: a local folder.
        modality: of the family.
        config: the dict of the family's `config.json`.

    Raises:
        ValueError: its files are damaged, or are for other inputs.
    """
    if not any((folder / name).is_file() for name in _INPUT_FILES[modality]):
        return MissingInputs(modality, str(folder))
    if modality == "text":
        from jtl.data.text import load_text_inputs

        return load_text_inputs(folder, config)
    from jtl.data.images import load_image_inputs

    return load_image_inputs(folder, config)
