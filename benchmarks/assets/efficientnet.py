"""EfficientNet-Lite with its 1,000 classes of ImageNet: weights as they are, config written here.

Reference: Tan and Le 2019, arXiv:1905.11946; the Lite variants have no squeeze-and-excitation,
ReLU6 for swish, and a stem and head that do not grow.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

WEIGHTS = "pytorch_model.bin"
CLASS_FILES = ("imagenet_synsets.txt", "imagenet_synset_to_lemma.txt")
FILES = ("config.json", "preprocessor_config.json", WEIGHTS)
_BICUBIC = 3
# The crop is image_size / (image_size + 32) of the shorter side, as in the training of these.
_CROP_PADDING = 32


class _Size(NamedTuple):
    width: float
    depth: float
    image: int
    dropout: float


_SIZES = {
    "lite0": _Size(1.0, 1.0, 224, 0.2),
    "lite1": _Size(1.0, 1.1, 240, 0.2),
    "lite2": _Size(1.1, 1.2, 260, 0.3),
}


def convert(fetched: Path, made: Path, *, variant: str) -> None:
    """Put config and preprocessing beside the weights."""
    size = _SIZES[variant]
    names = _class_names(fetched)
    os.replace(fetched / WEIGHTS, made / WEIGHTS)
    _write(made / "config.json", _config(variant, size, names))
    _write(made / "preprocessor_config.json", _preprocessing(size.image))


def _config(variant: str, size: _Size, names: list[str]) -> dict[str, Any]:
    return {
        "model_type": "efficientnet_lite",
        "architectures": ["EfficientNetLiteForImageClassification"],
        "variant": variant,
        "image_size": size.image,
        "num_channels": 3,
        "num_labels": len(names),
        "width_coefficient": size.width,
        "depth_coefficient": size.depth,
        "hidden_dim": 1280,
        "hidden_act": "relu6",
        "dropout_rate": size.dropout,
        "batch_norm_eps": 1e-3,
        "batch_norm_momentum": 0.99,
        "id2label": {str(number): name for number, name in enumerate(names)},
    }


def _preprocessing(size: int) -> dict[str, Any]:
    """Return the processor whose output is (byte - 127) / 128 of a central crop.

    These were trained on TensorFlow's bilinear resize, which does not smooth. Pillow's smooths in
    each method; bicubic is its nearest, and what timm takes for them.
    """
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size + _CROP_PADDING},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [127 / 255] * 3,
        "image_std": [128 / 255] * 3,
    }


def _class_names(folder: Path) -> list[str]:
    synsets, lemmas = (folder / file for file in CLASS_FILES)
    names = dict(line.split("\t") for line in lemmas.read_text().splitlines())
    return [names[synset] for synset in synsets.read_text().split()]


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
