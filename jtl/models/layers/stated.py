"""The fields of a config that a network reads, taken out of the dict of `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def stated(kind: type[T], config: Mapping[str, Any], name: str) -> T:
    """Return a dataclass made of the fields that a config states; other fields are left alone.

    Lists become tuples, so that the dataclass can be hashed. A field that is None counts as absent.

    Args:
        kind: a dataclass; fields without a default must be stated.
        config: the dict of `config.json`.
        name: of the architecture, for the error.

    Raises:
        ValueError: a field without a default is missing.

    >>> Sizes = dataclasses.make_dataclass("Sizes", ["depths", ("dim", int, 4)])
    >>> stated(Sizes, {"depths": [1, 2], "id2label": {}}, "ResNet")
    Sizes(depths=(1, 2), dim=4)
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [field for field in needed if config.get(field) is None]
    if missing:
        raise ValueError(
            f"the {name} config lacks {missing}; it has {sorted(config)}; "
            f"add them, or correct model_type if the checkpoint is no {name}"
        )
    own = {f.name: config[f.name] for f in fields if config.get(f.name) is not None}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})


def one_for_each_stage(name: str, **fields: tuple[Any, ...]) -> None:
    """Refuse fields of several stages that differ in length, or stages without a layer.

    Args:
        name: of the architecture.
        fields: `depths` among them.

    Raises:
        ValueError: they do.
    """
    lengths = {len(value) for value in fields.values()}
    if len(lengths) != 1 or not fields["depths"] or min(fields["depths"]) < 1:
        said = " and ".join(f"{field}={value}" for field, value in fields.items())
        raise ValueError(
            f"the {name} config has {said}; "
            "give each one number for each stage, and each stage one layer or more"
        )


def places(depths: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return (stage, layer) of each block in order of depth.

    >>> places((1, 2))
    ((0, 0), (1, 0), (1, 1))
    """
    return tuple((stage, layer) for stage, depth in enumerate(depths) for layer in range(depth))
