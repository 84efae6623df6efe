"""A backbone with random weights and the inputs it is to be trained on: the kind 'scratch'."""

from collections.abc import Mapping
from typing import Any

import jax

from jtl import data
from jtl.models import families
from jtl.models.backbone import Backbone
from jtl.models.load import new_backbone
from jtl.weights import hub


def scratch(
    family: str,
    config: Mapping[str, Any],
    *,
    pooling: str | None = None,
    tokenizer: str | None = None,
    mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    std: tuple[float, ...] = (0.5, 0.5, 0.5),
    seed: int = 0,
) -> Backbone:
    """Return a new backbone that reads raw texts or images.

    Args:
        family: a `model_type` of `families.TABLE`.
        config: fields of the family's `config.json`; for images `image_size` is among them.
        pooling: how `out["pooled"]` is made; None is the family's own.
        tokenizer: folder or hub id whose tokenizer a text family reads with.
        mean: of each channel of an image, on the scale of 0 to 1; one number for grey images.
        std: of each channel.
        seed: of the weights.

    Raises:
        ValueError: the family is not known, or nothing says what its inputs are.
    """
    inputs = _inputs(family, config, tokenizer, mean, std)
    key = jax.random.key(seed)
    return new_backbone(family, config, key=key, inputs=inputs, pooling=pooling)


def _inputs(
    family: str,
    config: Mapping[str, Any],
    tokenizer: str | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Any:
    if families.family(family, "a new backbone").modality == "text":
        if tokenizer is None:
            raise ValueError(
                f"a new {family} reads texts and no tokenizer is given; its config has "
                f"{sorted(config)}; give tokenizer= the folder or hub id of one"
            )
        return data.load_text_inputs(hub.locate(tokenizer), config)
    if families.family(family).modality == "audio":
        raise ValueError(
            f"a new {family} reads recordings; only texts and images are made here; its config has "
            f"{sorted(config)}; take models.load.new_backbone with inputs=data.audio_inputs()"
        )
    if "image_size" not in config:
        raise ValueError(
            f"a new {family} reads images and its config states no image_size; it has "
            f"{sorted(config)}; add image_size"
        )
    size = config["image_size"]
    return data.image_inputs(size if isinstance(size, int) else tuple(size), mean=mean, std=std)
