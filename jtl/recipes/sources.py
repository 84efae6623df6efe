"""Named data as {"train", "validation", "test"}: what the config section `data` builds.

A `path` may be a file or folder, or `package:NAME/inner/path` inside an installed package.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jtl import data
from jtl.weights import hub

Splits = dict[str, data.Source]


def table(
    path: str,
    *,
    text: str | None = None,
    image: str | None = None,
    label: str = "label",
    where: Mapping[str, Any] | None = None,
    classes: tuple[str, ...] | None = None,
    train: int,
    validation: int,
    test: int,
    seed: int = 0,
) -> Splits:
    """Return a seeded split of a CSV, TSV, JSONL or Parquet file, duplicates removed before it.

    Args:
        path: the file.
        text: column of the texts; or
        image: column of the images (encoded bytes or paths).
        label: column of the labels: strings, integers, or numbers for a regression.
        where: {column: value} keeps the rows that have these values.
        classes: names of the classes, the label being an integer from 0 up or one of the names; ()
            makes integers numbers, for a regression; None takes the labels themselves.
        train: rows to train on.
        validation: rows that phases and the probe are chosen by.
        test: rows that are scored once, at the end.
        seed: of the split.
    """
    column: dict[str, Any] = {"image": image} if image else {"text": text or "text"}
    source = data.from_table(
        str(hub.locate(path)), **column, label=label, where=where, classes=classes
    )
    return split(source, train=train, validation=validation, test=test, seed=seed)


def folder(
    path: str,
    *,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    seed: int = 0,
) -> Splits:
    """Return an image folder: its subfolders train, validation, test as they are, else split."""
    root = hub.locate(path)
    parts = ("train", "validation", "test")
    if all((root / part).is_dir() for part in parts):
        first = data.from_folder(str(root / "train"))
        others = {
            part: data.from_folder(str(root / part), classes=first.classes) for part in parts[1:]
        }
        return {"train": first, **others}
    if train is None or validation is None or test is None:
        raise ValueError(
            f"{root} has no subfolders {list(parts)}, so it must be split; "
            f"sizes are train={train}, validation={validation}, test={test}; give all three"
        )
    source = data.from_folder(str(root))
    return split(source, train=train, validation=validation, test=test, seed=seed)


def tfds(
    name: str,
    *,
    train: str = "train[:90%]",
    validation: str = "train[90%:]",
    test: str = "test",
    data_dir: str | None = None,
    text: str | None = None,
    image: str | None = None,
    label: str | None = None,
) -> Splits:
    """Return a TensorFlow dataset by name; its own splits are kept apart.

    Args:
        name: as TFDS spells it, "imdb_reviews" or "eurosat/rgb".
        train: split expression to train on.
        validation: split expression that phases and the probe are chosen by.
        test: split expression that is scored once, at the end.
        data_dir: where the prepared dataset lies; None is TFDS's default.
        text: name of the text feature; guessed where None.
        image: name of the image feature; guessed where None.
        label: name of the label feature; guessed where None.
    """
    columns = {"text": text, "image": image, "label": label}
    named = {field: value for field, value in columns.items() if value}
    expressions = {"train": train, "validation": validation, "test": test}
    return {
        part: data.from_tfds(name, expression, data_dir=data_dir, **named)
        for part, expression in expressions.items()
    }


def digits(
    *,
    classes: tuple[int, ...] = tuple(range(10)),
    train: int,
    validation: int,
    test: int,
    seed: int = 0,
) -> Splits:
    """Return scikit-learn's 8x8 digits (1,797, UCI) as images, of some classes only."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "data of kind 'digits' needs scikit-learn; pip install scikit-learn"
        ) from error
    raw: Any = load_digits()
    keep = np.isin(raw.target, classes)
    images = np.round(raw.images[keep] * (255 / 16)).astype(np.uint8)
    labels = np.searchsorted(np.asarray(sorted(classes)), raw.target[keep])
    names = tuple(str(digit) for digit in sorted(classes))
    columns = {"image": list(np.repeat(images[..., None], 3, axis=-1)), "label": labels}
    source = data.from_arrays(columns, label="label", classes=names)
    return split(source, train=train, validation=validation, test=test, seed=seed)


def split(source: data.Source, *, train: int, validation: int, test: int, seed: int = 0) -> Splits:
    """Return a seeded split of one source by numbers of examples."""
    sizes = {"train": train, "validation": validation, "test": test}
    return data.split(source, sizes, seed=seed)
