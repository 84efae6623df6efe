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
        image: name of the image feature; where both are None the Image feature of the name "image"
            or the only one, else the Text feature of the name "text" or the only one.
        label: name of the label; None is "label", else the only class label.

    Raises:
        ValueError: the dataset or the split is not there, a feature is not, which feature is meant
            is not clear, the split is empty, or a label is outside the classes (as in tests
            without labels).
    """
    import tensorflow_datasets as tfds

    builder = _opened(tfds, name, split, data_dir)
    features = dict(builder.info.features)
    known = list(features)
    for option, value in (("text", text), ("image", image), ("label", label)):
        if value is not None:
            check_column(value, known, option=option, name=name)
    kind, column = _input(tfds.features, features, text, image, name)
    label = label or _label(tfds.features, features, name)
    decoders = {column: tfds.decode.SkipDecoding()} if kind == "image" else None
    full = f"{name}:{split}"
    rows = builder.as_data_source(split=split, decoders=decoders)
    texts, labels = _read(rows, column if kind == "text" else None, label)
    raw = checked_texts(texts, full) if kind == "text" else _lazy(rows, column)
    values, classes = as_labels(labels, _classes(features[label]), name=full)
    return Source({kind: raw, "label": values}, classes, full)


def _opened(tfds: Any, name: str, split: str, data_dir: str | Path | None) -> Any:
    """Return the builder of a prepared dataset, preparing it where it is not on disk."""
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():  # TFDS's own default is a format that TensorFlow must read
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
        splits = builder.info.splits  # none under TFDS's mock_data
        empty = bool(splits) and splits[split].num_examples == 0
        if not empty:
            builder.as_data_source(split=split)
    except Exception as error:  # TFDS has a class of its own for each reason
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"the TFDS dataset {name!r}, split {split!r}, data_dir={data_dir}, cannot be opened "
            f"({type(error).__name__}: {reason}); correct name and split, give the data_dir where "
            "it lies prepared in the array_record format, or connect so that it can be fetched"
        ) from error
    if empty:
        sizes = {part: info.num_examples for part, info in splits.items()}
        raise ValueError(
            f"the split {split!r} of {name} is empty: it has 0 of {sizes} examples; widen it"
        )
    return builder


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
    # Images come first: datasets of images often have a Text feature, the name of the file.
    for kind, feature in (("image", kinds.Image), ("text", kinds.Text)):
        found = [key for key, value in features.items() if isinstance(value, feature)]
        if kind in found or len(found) == 1:
            return kind, kind if kind in found else found[0]
        if found:
            break
    raise ValueError(
        f"which feature of {name} is the input is not clear; it has {_shown(features)}; "
        "name it by text= or image=, or choose another dataset"
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
        labels.append(_plain(example[label]))
        if text is not None:
            texts.append(_plain(example[text]))
    return texts, labels


def _plain(value: Any) -> Any:
    """Return bytes as text and arrays of no axes as numbers: mock data has str and such arrays."""
    value = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _lazy(rows: Any, column: str) -> Lazy:
    return Lazy(_reader(rows, column), np.arange(len(rows)))


def _reader(rows: Any, column: str) -> Callable[[int], Any]:
    return lambda row: rows[row][column]
