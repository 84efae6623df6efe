"""Encoded examples, ready for batches: columns in memory by bucket, or images read as needed."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jtl.data.audio import AudioInputs
from jtl.data.bands import BandInputs
from jtl.data.buckets import bucket_of, choose_buckets
from jtl.data.fingerprint import fingerprint
from jtl.data.images import ImageInputs
from jtl.data.sources import Pixels, Source
from jtl.data.text import TextInputs
from jtl.data.threads import ahead

MEMORY_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Examples as arrays. Row r lies at `position[r]` of the columns of bucket `bucket[r]`.

    Attributes:
        parts: for each bucket, its columns in memory {name: (rows of the bucket, ...)}.
        bucket: (n,) the bucket of each row.
        labels: (n,) int32 classes or float32 numbers.
        classes: names of the classes, None where the label is a number.
        buckets: padded length of each bucket, (0,) where there is one shape only.
        read: `rows -> columns` of what is not in memory, None where all is.
        derived: names of the columns that `derive` has added.
        name: of the source.
        augmented: whether `read` gives other values each time; then nothing can be derived.
        origin: gives the fingerprint of all that `read` reads, None where nobody knows it.
    """

    parts: tuple[Mapping[str, np.ndarray], ...]
    bucket: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...] | None
    buckets: tuple[int, ...]
    read: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None
    derived: tuple[str, ...] = ()
    name: str = "data"
    augmented: bool = False
    origin: Callable[[], str] | None = None
    position: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "position", _positions(self.bucket, len(self.parts)))

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @functools.cached_property
    def steady(self) -> bool:
        """Whether a row has the same bits each time it is read: it is tried with the first rows."""
        if self.read is None or self.augmented or not self.size:
            return not self.augmented
        rows = np.flatnonzero(self.bucket == self.bucket[0])[:8]
        one, other = self.read(rows), self.read(rows)
        return all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)

    @functools.cached_property
    def contents(self) -> str | None:
        """Fingerprint of the raw columns of all rows, labels apart; None where `read` has none."""
        if self.read is not None and (self.origin is None or self.augmented):
            return None
        read = self.origin() if self.read is not None and self.origin is not None else ""
        raw = [
            {name: column for name, column in part.items() if name not in self.derived}
            for part in self.parts
        ]
        return fingerprint(self.bucket, raw, read)

    def columns(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return the columns of rows that lie in one bucket, without label, mask and index."""
        part, position = self.parts[self.bucket[rows[0]]], self.position[rows]
        held = {name: column[position] for name, column in part.items()}
        return held if self.read is None else {**self.read(rows), **held}

    def take(self, rows: Any) -> "Dataset":
        """Return the dataset of these rows, in their order, with copies of what is in memory.

        Its buckets are the same ones, and what is read as needed stays so.

        Args:
            rows: (n,) row numbers; one may come more than once.
        """
        rows = np.asarray(rows, np.int64)
        bucket, read, origin = self.bucket[rows], self.read, self.origin
        chosen = [self.position[rows[bucket == b]] for b in range(len(self.parts))]
        return dataclasses.replace(
            self,
            parts=tuple(
                {name: np.asarray(column[where]) for name, column in part.items()}
                for part, where in zip(self.parts, chosen, strict=True)
            ),
            bucket=bucket,
            labels=self.labels[rows],
            read=None if read is None else lambda places: read(rows[places]),
            origin=None if origin is None else lambda: fingerprint(origin(), rows),
        )

    def loaded(self, memory_bytes: int = MEMORY_BYTES) -> "Dataset":
        """Return the dataset with what is read kept in memory, if it fits and never changes.

        Args:
            memory_bytes: room for all of it.
        """
        if self.read is None or not self.size or not self.steady:
            return self
        row = sum(column.nbytes for column in self.read(np.arange(1)).values())
        if row * self.size > memory_bytes:
            return self
        buckets = [np.flatnonzero(self.bucket == b) for b in range(len(self.parts))]
        parts = tuple(_all_rows(self, rows) if len(rows) else {} for rows in buckets)
        return dataclasses.replace(self, parts=parts, read=None, origin=None)

    def only(self, *names: str, beside: Sequence[str] = ("attention_mask",)) -> "Dataset":
        """Return the dataset whose batches start at these derived columns: no other raw input.

        Args:
            names: of derived columns.
            beside: raw columns that stay, if there, where a column has an axis of positions.

        Raises:
            ValueError: a name is not among the derived columns.
        """
        unknown = sorted(set(names) - set(self.derived))
        if unknown or not names:
            raise ValueError(
                f"columns {unknown} are not derived; {self.name} has {sorted(self.derived)}; "
                "name at least one of these, or derive them first"
            )
        return dataclasses.replace(
            self,
            parts=tuple(without_raw(part, names, beside) for part in self.parts),
            read=None,
            derived=tuple(names),
        )


def without_raw(
    part: Mapping[str, Any], names: Sequence[str], beside: Sequence[str] = ("attention_mask",)
) -> dict[str, Any]:
    """Return the named columns, with those of `beside` if one of them has positions."""
    positions = any(part[name].ndim >= 3 for name in names)
    kept = [name for name in beside if positions and name in part and name not in names]
    return {name: part[name] for name in (*names, *kept)}


def encode(
    source: Source,
    inputs: Any,
    *,
    buckets: int | tuple[int, ...] = 2,
    multiple: int = 8,
    max_length: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> Dataset:
    """Return the examples of a source as the model reads them.

    Texts are tokenised once, into memory. Images are made once where they fit, else batch by batch;
    those of `data.sources.Pixels` stay bytes until they are in a batch. Recordings likewise, in
    buckets by length where the model reads samples.

    Args:
        source: raw examples.
        inputs: the preprocessing of the weights, `backbone.inputs`.
        buckets: at most so many padded lengths of texts, those that pad least; or the lengths
            themselves, say the training set's, so that evaluation compiles no further shapes: one
            more is added where a text is longer than all.
        multiple: lengths that are chosen here are multiples of it; those of recordings of a tenth
            of a second.
        max_length: texts are cut to so many tokens, recordings to so many samples of the model's
            rate; None is all that the checkpoint takes.
        memory_bytes: images or recordings of more than this in all are not kept in memory.

    Raises:
        ValueError: the source holds other examples than the inputs are for, or an example cannot be
            encoded.
    """
    kinds = {TextInputs: "text", ImageInputs: "image", BandInputs: "image", AudioInputs: "audio"}
    names = {"text": "texts", "image": "images", "audio": "recordings"}
    modality = kinds.get(type(inputs))
    if modality != source.modality:
        raise ValueError(
            f"{source.name} holds {names[source.modality]}; the backbone's inputs are "
            f"{type(inputs).__name__}; take data or a backbone of the other kind, or give the "
            "backbone its inputs (data.load_text_inputs, data.image_inputs, data.band_inputs, "
            "data.audio_inputs)"
        )
    if modality == "text":
        return _texts(source, inputs, buckets, multiple, max_length)
    if modality == "audio":
        return _recordings(source, inputs, buckets, max_length, memory_bytes)
    return _images(source, inputs, memory_bytes)


def _texts(
    source: Source,
    inputs: TextInputs,
    buckets: int | tuple[int, ...],
    multiple: int,
    max_length: int | None,
) -> Dataset:
    ragged = inputs.tokens(source.columns["text"], max_length=max_length)
    lengths = np.asarray([len(ids) for ids in ragged["input_ids"]])
    buckets = _buckets(lengths, buckets, multiple, max_length or inputs.max_length)
    bucket = bucket_of(lengths, buckets)
    parts = tuple(
        inputs.padded(ragged, np.flatnonzero(bucket == b), length)
        for b, length in enumerate(buckets)
    )
    labels = source.columns["label"]
    return Dataset(parts, bucket, labels, source.classes, buckets, name=source.name)


def _images(source: Source, inputs: ImageInputs | BandInputs, memory_bytes: int) -> Dataset:
    raw, bands = source.columns["image"], isinstance(inputs, BandInputs)
    array = isinstance(raw, np.ndarray) and (bands or raw.dtype == np.uint8)
    stacked = isinstance(raw, Pixels) or array

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        return inputs(raw[rows] if stacked else [raw[row] for row in rows.tolist()])

    bucket = np.zeros(source.size, np.int32)
    labels = source.columns["label"]

    def origin() -> str:
        made = ahead(lambda row: fingerprint(raw[row]), 0, source.size, prefetch=2)
        if isinstance(inputs, BandInputs):
            return fingerprint(repr(inputs), list(made))
        return fingerprint(repr(inputs.processor), inputs.size, inputs.channels, list(made))

    lazy = Dataset(
        ({},), bucket, labels, source.classes, (0,), read, name=source.name, origin=origin
    )
    if isinstance(inputs, BandInputs):
        quick, numbers = False, int(np.size(raw[0]))
    else:
        quick = isinstance(raw, Pixels) and inputs.levels is not None  # bytes already, in memory
        numbers = int(np.prod(inputs.size)) * inputs.channels
    if quick or source.size * numbers * 4 > memory_bytes:
        return lazy
    part = _all_rows(lazy, np.arange(source.size))
    return dataclasses.replace(lazy, parts=(part,), read=None, origin=None)


def _recordings(
    source: Source,
    inputs: AudioInputs,
    buckets: int | tuple[int, ...],
    max_length: int | None,
    memory_bytes: int,
) -> Dataset:
    raw, labels = source.columns["audio"], source.columns["label"]
    bucket, chosen = np.zeros(source.size, np.int32), (0,)
    if not inputs.fixed:
        lengths = np.minimum(inputs.lengths(raw), max_length or np.iinfo(np.int64).max)
        limit = max_length or inputs.limit
        chosen = _buckets(lengths, buckets, max(inputs.sampling_rate // 10, 1), limit)
        bucket = bucket_of(lengths, chosen)

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        return inputs([raw[row] for row in rows.tolist()], length=chosen[bucket[rows[0]]] or None)

    def origin() -> str:
        made = ahead(lambda row: fingerprint(raw[row]), 0, source.size, prefetch=2)
        return fingerprint(repr(inputs.extractor), inputs.max_seconds, list(made))

    parts = tuple({} for _ in chosen)
    lazy = Dataset(
        *(parts, bucket, labels, source.classes, chosen, read), name=source.name, origin=origin
    )
    return lazy.loaded(memory_bytes)


def _buckets(
    lengths: np.ndarray, buckets: int | tuple[int, ...], multiple: int, limit: int | None
) -> tuple[int, ...]:
    """Return that many lengths that pad least, or the given ones and a longer one if needed."""
    if isinstance(buckets, int):
        return choose_buckets(lengths, buckets, multiple=multiple, limit=limit)
    longest = choose_buckets(lengths, 1, multiple=multiple, limit=limit)
    return tuple(sorted({*buckets, *(longest if lengths.max() > max(buckets) else ())}))


def _all_rows(lazy: Dataset, rows: np.ndarray, chunk: int = 32) -> dict[str, np.ndarray]:
    """Return the columns of rows of one bucket."""
    chunks = [rows[i : i + chunk] for i in range(0, len(rows), chunk)]
    done = list(ahead(lambda i: lazy.columns(chunks[i]), 0, len(chunks), prefetch=2))
    return {name: np.concatenate([columns[name] for columns in done]) for name in done[0]}


def _positions(bucket: np.ndarray, buckets: int) -> np.ndarray:
    position = np.empty(len(bucket), np.int32)
    for b in range(buckets):
        rows = np.flatnonzero(bucket == b)
        position[rows] = np.arange(len(rows))
    return position
