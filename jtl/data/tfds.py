"""Examples of TensorFlow Datasets by name, read from ArrayRecord files without TensorFlow."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jtl.data.labels import as_labels
from jtl.data.sources import Lazy, Source, check_column, checked_texts
from jtl.near import listed


def from_tfds(
    name: str,
    split: str,
    *,
    data_dir: str | Path | None = None,
    text: str | None = None,
    image: str | None = None,
    label: str | None = None,
) -> Source:
    """Return one split of a TFDS dataset; it is prepared first where it is not on disk yet.

    Texts are read into memory; images stay encoded on disk and are read when a batch needs them.

    Args:
        name: as TFDS spells it, "imdb_reviews" or "eurosat/rgb".
        split: a split expression, "train" or "train[:90%]".
        data_dir: where prepared datasets lie; None is TFDS's own default.
        text: name of the text feature; or
        image: name of the image feature; where both are None the first Text feature, else the first
            Image feature.
        label: name of the label; None is "label", else the only class label.

    Raises:
        ValueError: the dataset or the split is not there, a feature is not, which feature is meant
            is not clear, the split is empty, or a label is outside the classes (as in tests
            without labels).
    """
    import tensorflow_datasets as tfds

    features = _features(tfds, name, split, data_dir)
    known = list(features)
    for option, value in (("text", text), ("image", image), ("label", label)):
        if value is not None:
            check_column(value, known, option=option, name=name)
    kind, column = _input(tfds.features, features, text, image, name)
    label = label or _label(tfds.features, features, name)
    decoders = {column: tfds.decode.SkipDecoding()} if kind == "image" else None
    rows = tfds.data_source(name, split=split, data_dir=data_dir, decoders=decoders)
    full = f"{name}:{split}"
    if len(rows) == 0:
        raise ValueError(f"{full} is empty: it has 0 rows; widen the split expression")
    texts, labels = _read(rows, column if kind == "text" else None, label)
    raw = checked_texts(texts, full) if kind == "text" else _lazy(rows, column)
    values, classes = as_labels(labels, _classes(features[label]), name=full)
    return Source({kind: raw, "label": values}, classes, full)


def _features(tfds: Any, name: str, split: str, data_dir: Any) -> Mapping[str, Any]:
    """Return the features of a prepared dataset, preparing it where need be."""
    try:
        return tfds.data_source(name, split=split, data_dir=data_dir).dataset_info.features
    except Exception as error:  # TFDS has a class of its own for each reason
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"the TFDS dataset {name!r}, split {split!r}, data_dir={data_dir}, cannot be opened "
            f"({type(error).__name__}: {reason}); correct name and split, give the data_dir where "
            "it lies prepared in the array_record format, or connect so that it can be fetched"
        ) from error


def _input(
    kinds: Any, features: Mapping[str, Any], text: str | None, image: str | None, name: str
) -> tuple[str, str]:
    if text and image:
        raise ValueError(
            f"text={text!r} and image={image!r} are both given; an example has one input; "
            "name one of them"
        )
    if text or image:
        return ("text", text) if text else ("image", str(image))
    for kind, feature in (("text", kinds.Text), ("image", kinds.Image)):
        found = [key for key, value in features.items() if isinstance(value, feature)]
        if found:
            return kind, found[0]
    raise ValueError(
        f"{name} has no text and no image feature; it has {_shown(features)}; "
        "choose another dataset, or name the feature by text= or image="
    )


def _label(kinds: Any, features: Mapping[str, Any], name: str) -> str:
    if "label" in features:
        return "label"
    found = [key for key, value in features.items() if isinstance(value, kinds.ClassLabel)]
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"which feature of {name} is the label is not clear: {len(found)} are class labels; "
        f"it has {_shown(features)}; name it by label="
    )


def _shown(features: Mapping[str, Any]) -> str:
    return listed([f"{key} ({type(value).__name__})" for key, value in features.items()])


def _classes(feature: Any) -> tuple[str, ...] | None:
    count = getattr(feature, "num_classes", None)
    if count is None:
        return None
    return tuple(feature.names) if feature.names else tuple(str(i) for i in range(count))


def _read(rows: Any, text: str | None, label: str) -> tuple[list[Any], list[Any]]:
    """Read all labels, and the texts, in one pass; undecoded images cost little (0.4 s for 10k)."""
    texts, labels = [], []
    for example in rows:
        labels.append(_string(example[label]))
        if text is not None:
            texts.append(_string(example[text]))
    return texts, labels


def _string(value: Any) -> Any:
    """Return text as str: data sources give bytes, TFDS's mock data gives str."""
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _lazy(rows: Any, column: str) -> Lazy:
    return Lazy(_reader(rows, column), np.arange(len(rows)))


def _reader(rows: Any, column: str) -> Callable[[int], Any]:
    return lambda row: rows[row][column]
