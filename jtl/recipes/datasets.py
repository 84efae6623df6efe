"""The three parts of a task, encoded for a model: padded alike, so that shapes compile once."""

from collections.abc import Iterator, Mapping
from typing import Any

from jtl import data as jdata
from jtl.models.model import Model

Datasets = dict[str, jdata.Dataset]
EVALUATION_ROWS = 64
PARTS = ("train", "validation", "test")


def check_sources(sources: Mapping[str, Any]) -> None:
    """Refuse sources that are not all there, are empty, or do not share their classes.

    Raises:
        ValueError: which part, and what it has.
    """
    missing = [part for part in PARTS if part not in sources]
    if missing:
        raise ValueError(
            f"data has no {missing}; it has {sorted(sources)}; "
            f"give a source for each of {list(PARTS)}"
        )
    sizes = {part: source.size for part, source in sources.items()}
    if not all(sizes.values()):
        empty = [part for part, size in sizes.items() if not size]
        raise ValueError(f"the parts {empty} are empty; there are {sizes} rows; give each some")
    for part, source in sources.items():
        if source.classes != sources["train"].classes:
            raise ValueError(
                f"the part {part!r} has the classes {source.classes} and 'train' has "
                f"{sources['train'].classes}; give the classes of 'train' to every part (classes=)"
            )


def make_datasets(
    model: Model, sources: Mapping[str, Any], *, buckets: int = 2, max_length: int | None = None
) -> Datasets:
    """Return the sources as datasets ready for batches, by the inputs of the model's backbone.

    All parts are padded to the lengths chosen for "train", so evaluation compiles no further
    shapes; a part with a text longer than all of these has one more.

    Raises:
        ValueError: as `check_sources`, or an example cannot be encoded.
    """
    check_sources(sources)
    inputs = model.backbone.inputs
    train = jdata.encode(sources["train"], inputs, buckets=buckets, max_length=max_length)
    others = {
        part: jdata.encode(source, inputs, buckets=train.buckets, max_length=max_length)
        for part, source in sources.items()
        if part != "train"
    }
    return {"train": train, **others}


def once(dataset: jdata.Dataset, rows: int = EVALUATION_ROWS) -> Iterator[dict[str, Any]]:
    """Return one pass over a dataset in order, `rows` a batch, less where it has fewer."""
    size = min(rows, dataset.size)
    return jdata.batches(dataset, size, shuffle=False, stop=jdata.steps_per_epoch(dataset, size))
