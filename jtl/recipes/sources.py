"""Named data as {"train", "validation", "test"}: what the config section `data` builds.

A `path` may be a file or folder, or `package:NAME/inner/path` inside an installed package.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jtl import data
from jtl.data.idx import find_idx, read_idx
from jtl.data.sources import Pixels
from jtl.weights import hub

Splits = dict[str, data.Source]


def table(
    path: str,
    *,
    text: str | None = None,
    image: str | None = None,
    label: str = "label",
    where: Mapping[str, Any] | None = None,
    test_where: Mapping[str, Any] | None = None,
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
        test_where: the same for the test rows, where the table has a test part of its own; None
            cuts them from the others.
        classes: names of the classes, the label being an integer from 0 up or one of the names; ()
            makes integers numbers, for a regression; None takes the labels themselves.
        train: rows to train on.
        validation: rows that phases and the probe are chosen by.
        test: rows that are scored once, at the end.
        seed: of the split.
    """
    column: dict[str, Any] = {"image": image} if image else {"text": text or "text"}
    file = str(hub.locate(path))
    source = data.from_table(file, **column, label=label, where=where, classes=classes)
    if test_where is None:
        return split(source, train=train, validation=validation, test=test, seed=seed)
    names = source.classes if classes is None else classes
    tested = data.from_table(file, **column, label=label, where=test_where, classes=names)
    sizes = {"train": train, "validation": validation}
    return {
        **data.split(source, sizes, seed=seed),
        **data.split(tested, {"test": test}, seed=seed),
    }


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


def mnist(
    path: str,
    *,
    train: int | None = None,
    validation: int,
    test: int | None = None,
    classes: tuple[int, ...] = tuple(range(10)),
    names: tuple[str, ...] | None = None,
    permutation: int | None = None,
    seed: int = 0,
) -> Splits:
    """Return MNIST or its like, whole, of some classes only, or with its pixels in another order.

    All parts and all tasks share one array of bytes.

    Args:
        path: a folder of IDX files with the parts "train" and "t10k"; or a file `.csv` or
            `.csv.gz` with a row of pixels and then the label for each image, all of one part: the
            published test part is absent there, so that the test rows are cut from it first.
        train: rows to train on, None for all that are left.
        validation: rows cut from the training part, that strengths and phases are chosen by.
        test: rows of the published test part, None for all; of a `.csv` a number.
        classes: the digits that are kept.
        names: of the classes of the source. None makes labels 0 up of the classes that are kept,
            as for a head of their own; ("0", ..., "9") keeps the labels, as for one head over all.
        permutation: seed of an order of the pixels, the same for all images; None leaves them.
        seed: of which rows are cut.

    Raises:
        ValueError: there are no such files, too few rows, or a class is not among the names.

    Reference: permuted: Goodfellow et al. 2013, arXiv:1312.6211; split: Zenke et al. 2017,
    arXiv:1703.04200.
    """
    parts = _digit_parts(str(hub.locate(path)))
    rng = np.random.default_rng(seed)
    kept = [np.flatnonzero(np.isin(labels, classes)) for _, labels in parts]
    kept = [kept[0][rng.permutation(len(kept[0]))], *kept[1:]]
    if len(parts) == 1:  # a table of one part
        cut = 0 if test is None else test
        kept = [kept[0][cut:], kept[0][:cut]]
    own, tested = kept
    train = len(own) - validation if train is None else train
    sizes = {
        "train": train,
        "validation": validation,
        "test": len(tested) if test is None else test,
    }
    there = {"train and validation": len(own), "test": len(tested)}
    if min(sizes.values()) < 1 or train + validation > len(own) or sizes["test"] > len(tested):
        raise ValueError(
            f"{sizes} rows of the classes {list(classes)} are asked for; {path} has {there}; "
            "ask for at least one and for no more than there are"
        )
    # The validation rows do not depend on how many are trained on.
    rows = {"train": own[validation:][:train], "validation": own[:validation]}
    rows["test"] = tested[: sizes["test"]]
    where = {"train": parts[0], "validation": parts[0], "test": parts[-1]}
    return {
        part: _digit_source(*where[part], chosen, sorted(classes), names, permutation)
        for part, chosen in rows.items()
    }


def _digit_source(
    images: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    classes: list[int],
    names: tuple[str, ...] | None,
    permutation: int | None,
) -> data.Source:
    order = None
    if permutation is not None:
        pixels = images.shape[1] * images.shape[2]
        order = np.random.default_rng(permutation).permutation(pixels)
    own = tuple(str(digit) for digit in classes)
    digits = np.asarray([str(digit) for digit in labels[rows]])
    made = "mnist" if permutation is None else f"mnist, permutation {permutation}"
    made = made if len(own) == 10 else f"{made}, {'-'.join(own)}"
    columns = {"image": Pixels(images, rows, order), "label": digits}
    return data.from_arrays(columns, classes=names or own, name=made)


@functools.lru_cache(maxsize=2)
def _digit_parts(path: str) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Return (images, labels) of the training part and of the test part, where there are two."""
    if path.endswith((".csv", ".csv.gz")):
        import pandas

        table = pandas.read_csv(path, header=None).to_numpy()
        side = int(round((table.shape[1] - 1) ** 0.5))
        images = table[:, :-1].astype(np.uint8).reshape(-1, side, side, 1)
        return ((images, table[:, -1].astype(np.int64)),)
    parts = []
    for part in ("train", "t10k"):
        images, labels = (read_idx(file) for file in find_idx(Path(path), part))
        if images.ndim != 3 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"part {part!r} of {path} has images {images.dtype}{images.shape} and labels "
                f"{labels.shape}; wanted are bytes (n, height, width) and one label for each; "
                "give a folder of IDX files of MNIST's kind"
            )
        parts.append((images[..., None], labels.astype(np.int64)))
    return tuple(parts)


def split(source: data.Source, *, train: int, validation: int, test: int, seed: int = 0) -> Splits:
    """Return a seeded split of one source by numbers of examples."""
    sizes = {"train": train, "validation": validation, "test": test}
    return data.split(source, sizes, seed=seed)
