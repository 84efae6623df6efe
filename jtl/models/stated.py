"""What a checkpoint states: its family, its whole config, its pooling."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jtl.models import families, foreign
from jtl.models.backbone import Family
from jtl.weights.checkpoint import Checkpoint
from jtl.weights.files import read, read_json
from jtl.weights.hub import locate

EXTRA_CONFIG = "jtl.json"
_POOLING_CONFIG = "1_Pooling/config.json"


def opened(
    name: str | Path | Checkpoint,
    *,
    family: str | None = None,
    config: Mapping[str, Any] | None = None,
    otherwise: Mapping[str, Any] | None = None,
) -> tuple[Checkpoint, Family, dict[str, Any]]:
    """Return a checkpoint under its family's names, the family, and its whole config.

    Args:
        name: as for `load_backbone`.
        family: as for `load_backbone`.
        config: as for `load_backbone`.
        otherwise: the config where neither the checkpoint nor `config` states one.

    Raises:
        ValueError: there is no such checkpoint, or no family reads it.
    """
    if isinstance(name, Checkpoint):
        checkpoint = name if config is None else name._replace(config=dict(config))
        own = checkpoint.config
    else:
        place = locate(str(name))
        checkpoint = read(place, config=config)
        own = checkpoint.config or foreign.inside(place)
    stated = foreign.recognised(own) or checkpoint.config or otherwise or {}
    source = f"{str(checkpoint.folder)!r}"
    row = families.family(family or foreign.family_of(stated), source)
    if row.part and row.part in stated and stated.get("model_type") != row.model_type:
        stated = row.part_config(stated) if row.part_config else stated[row.part]
    whole = full_config(row, stated)
    if row.layout is not None:
        checkpoint = row.layout(checkpoint, whole)
    return checkpoint, row, whole


def full_config(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the defaults for the fields that it does not state.

    They are transformers' own; a family that transformers does not have states them in its file.

    >>> full_config(families.family("bert"), {"hidden_size": 48})["layer_norm_eps"]
    1e-12

    Raises:
        ValueError: transformers refuses a field.
    """
    model_type = family.model_type
    if family.complete is not None:
        return {"model_type": model_type, **family.complete(config)}
    from transformers import AutoConfig

    # A copy: transformers' config classes write into nested fields such as rope_scaling.
    own = copy.deepcopy({name: value for name, value in config.items() if name != "model_type"})
    try:
        # All fields go in: some defaults follow from others (stage names from depths, labels).
        whole = AutoConfig.for_model(model_type, **own)
    except Exception as error:  # each field has its own check there, with its own kind of error
        raise ValueError(
            f"transformers refuses this {model_type} config: {' '.join(str(error).split())}; the "
            f"config has {sorted(config)}; correct that field of config.json"
        ) from error
    defaults = json.loads(whole.to_json_string(use_diff=False))
    return {**defaults, **config, **_towers(defaults, config), "model_type": model_type}


def _towers(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configs of a config's parts ("text_config"), with the defaults for each."""
    return {
        name: {**defaults[name], **stated}
        for name, stated in config.items()
        if name.endswith("_config")
        and isinstance(stated, Mapping)
        and isinstance(defaults.get(name), Mapping)
    }


def pooling_of(family: Family, pooling: str | None) -> str:
    """Return the pooling that was asked for, or the family's own.

    Raises:
        ValueError: the family has no such pooling.
    """
    pooling = pooling or family.poolings[0]
    if pooling not in family.poolings:
        raise ValueError(
            f"pooling {pooling!r} is not known to {family.model_type}; "
            f"it has {family.poolings}; give one of them as pooling="
        )
    return pooling


def stated_pooling(checkpoint: Checkpoint, family: Family) -> str | None:
    """Return the pooling that the folder of the checkpoint states, None where it states none.

    Raises:
        ValueError: it states another one than the family has.
    """
    folder = checkpoint.folder
    if family.part and family.part in checkpoint.config:  # what is stated is of the larger model
        return None
    if (folder / EXTRA_CONFIG).is_file():
        return read_json(folder / EXTRA_CONFIG).get("pooling")
    if not (folder / _POOLING_CONFIG).is_file():
        return None
    stated = read_json(folder / _POOLING_CONFIG)
    modes = {mode: stated.get(f"pooling_mode_{mode}_tokens") for mode in ("mean", "max")}
    modes["cls"] = stated.get("pooling_mode_cls_token")
    chosen = [mode for mode, on in modes.items() if on]
    if len(chosen) == 1 and chosen[0] in family.poolings:
        return chosen[0]
    raise ValueError(
        f"{_POOLING_CONFIG} of {str(folder)!r} asks for {chosen or stated}; {family.model_type} "
        f"has {family.poolings}; choose one of them by pooling="
    )
