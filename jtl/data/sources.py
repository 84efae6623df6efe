"""A source: labelled raw examples, in memory or read row by row when they are asked for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jtl.data.labels import as_labels
from jtl.near import listed

INPUTS = ("text", "image", "audio")


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy(Sequence[Any]):
    """A column that is read when it is asked for: row i is `read(rows[i])`."""

    read: Callable[[int], Any]
    rows: np.ndarray

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, row: Any) -> Any:
        """Return the value of a row, or the column of a slice."""
        if isinstance(row, slice):
            return Lazy(self.read, self.rows[row])
        return self.read(int(self.rows[row]))


@dataclasses.dataclass(frozen=True, eq=False)
class Pixels(Sequence[Any]):
    """Images of one size that share one array: a column takes no memory but that of its rows.

    Attributes:
        images: (all images, height, width, channels) uint8.
        rows: which of them, in order.
        order: (height * width,) place i shows the pixel `order[i]`; None leaves them in place.
    """

    images: np.ndarray
    rows: np.ndarray
    order: np.ndarray | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, row: Any) -> Any:
        """Return an image, the column of a slice, or the images of an array of rows."""
        if isinstance(row, slice):
            return dataclasses.replace(self, rows=self.rows[row])
        found = self.images[self.rows[row]]
        if self.order is None:
            return found
        flat = found.reshape(*found.shape[:-3], -1, found.shape[-1])
        return np.take(flat, self.order, axis=-2).reshape(found.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Labelled raw examples; nothing about batches or models.

    Attributes:
        columns: "text" (strings), "image" (arrays, encoded bytes, paths or PIL images) or "audio"
            (paths of WAV files, or pairs of an array and its rate), and "label", an array of int32
            classes or float32 numbers.
        classes: names of the classes; None where the label is a number.
        name: where the examples are from, for errors and reports.
    """

    columns: Mapping[str, Any]
    classes: tuple[str, ...] | None
    name: str

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self.columns["label"])

    @property
    def modality(self) -> str:
        """The raw input's column: "text", "image" or "audio"."""
        return next(name for name in INPUTS if name in self.columns)

    def take(self, rows: Any) -> "Source":
        """Return the source of these rows, in their order."""
        rows = np.asarray(rows, np.int64)
        columns = {name: _take(column, rows) for name, column in self.columns.items()}
        return dataclasses.replace(self, columns=columns)


def from_arrays(
    columns: Mapping[str, Any],
    *,
    label: str = "label",
    classes: Sequence[str] | None = None,
    name: str = "arrays",
) -> Source:
    """Return the source of columns in memory.

    Args:
        columns: "text" (strings), "image" (uint8 arrays (height, width, channels), encoded bytes,
            paths or PIL images) or "audio" (paths of WAV files, or pairs of a float array and its
            samples a second), and the labels.
        label: name of the column of labels: strings and integers are classes, floats are numbers.
        classes: names of the classes, None for the sorted distinct labels, `()` for a regression.
        name: for errors and reports.

    Raises:
        ValueError: a column is missing, empty, shorter than another or has missing values, or a
            label is outside the classes.

    >>> source = from_arrays({"text": ["good", "bad"], "label": ["pos", "neg"]})
    >>> source.classes, source.columns["label"].tolist()
    (('neg', 'pos'), [1, 0])
    """
    kinds = [kind for kind in INPUTS if kind in columns]
    if label not in columns or len(kinds) != 1:
        raise ValueError(
            f"{name} has the columns {sorted(columns)}; wanted are {label!r} and one of "
            f"{list(INPUTS)}; rename the columns, or give label="
        )
    raw, values = columns[kinds[0]], columns[label]
    sizes = {kinds[0]: len(raw), label: len(values)}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"columns of {name} have {sizes} rows; give one of each for every example")
    if len(values) == 0:
        raise ValueError(f"{name} is empty: it has 0 rows; check the file, the split or the filter")
    if kinds[0] == "text":
        raw = checked_texts(raw, name)
    labels, names = as_labels(values, classes, name=name)
    return Source({kinds[0]: raw, "label": labels}, names, name)


def checked_texts(values: Sequence[Any], name: str) -> list[str]:
    """Return texts as a list of strings.

    Raises:
        ValueError: a text is missing or is no string.
    """
    texts = list(values)
    bad = [row for row, text in enumerate(texts) if not isinstance(text, str)]
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(texts)} texts of {name} are missing or no strings, first row "
            f"{bad[0]} ({texts[bad[0]]!r}); drop these rows, or choose the text column by text="
        )
    return [str(text) for text in texts]


def check_column(column: str, known: Sequence[str], *, option: str, name: str) -> None:
    """Refuse a column that the data has not.

    Raises:
        ValueError: it lists the columns that there are.
    """
    if column not in known:
        raise ValueError(
            f"{name} has no column {column!r}; it has {listed(list(known))}; "
            f"name one of them by {option}="
        )


def _take(column: Any, rows: np.ndarray) -> Any:
    if isinstance(column, np.ndarray):
        return column[rows]
    if isinstance(column, Lazy | Pixels):
        return dataclasses.replace(column, rows=column.rows[rows])
    return [column[row] for row in rows.tolist()]
