"""Examples from a table: CSV, TSV, JSON lines or Parquet, read with pandas."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jtl.data.sources import Source, check_column, from_arrays
from jtl.near import listed

_PACKED = (".gz", ".bz2", ".xz", ".zip", ".zst")


def from_table(
    path: str | Path,
    *,
    text: str | None = None,
    image: str | None = None,
    label: str = "label",
    where: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
) -> Source:
    """Return the rows of a .csv, .tsv, .jsonl or .parquet file, packed or not, as a source.

    A TSV is read without quoting, as GLUE's are: a quotation mark is a character like any other.

    Args:
        path: the file.
        text: column of the texts; None is "text" where no image column is named.
        image: column of the images: encoded bytes, or paths relative to the file.
        label: column of the labels: strings and integers are classes, other numbers are regressed.
        where: {column: value} keeps the rows that have the value, or one of a list of values.
        classes: names of the classes, None for the sorted distinct labels, `()` for a regression.

    Raises:
        ValueError: the file is missing, of another format, empty, or lacks a column; a text or
            label is missing; no row is left by `where`.
    """
    path = Path(path)
    if text and image:
        raise ValueError(
            f"text={text!r} and image={image!r} are both given; an example has one input; "
            "name one of them"
        )
    kind, column = ("image", image) if image else ("text", text or "text")
    where = dict(where or {})
    frame = _read(path, {"label": label, kind: column}, where)
    frame = _kept(frame, where, path)
    raw = frame[column].tolist()
    if kind == "image":
        raw = [_image(value, row, path) for row, value in enumerate(raw)]
    labels = frame[label]
    values = _parsed(labels.tolist()) if _is_text_file(path) else _plain(labels)
    return from_arrays({kind: raw, "label": values}, classes=classes, name=str(path))


def _read(path: Path, columns: Mapping[str, str], where: Mapping[str, Any]) -> Any:
    """Return the frame of the columns that are needed."""
    if not path.is_file():
        near = path.absolute().parent
        there = (
            sorted(entry.name for entry in near.iterdir()) if near.is_dir() else "no such folder"
        )
        there = listed(there) if isinstance(there, list) else there
        raise ValueError(f"there is no table {str(path)!r}; {near} has {there}; correct the path")
    suffix = _suffix(path)
    if suffix not in _READERS:
        raise ValueError(
            f"{path} ends in {suffix!r}; tables end in {sorted(_READERS)}; convert or rename it"
        )
    names, read = _READERS[suffix]
    try:
        known = names(path)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as {suffix} ({type(error).__name__}: {error}); "
            "it is empty, damaged or of another format; check the file"
        ) from error
    for option, column in columns.items():
        check_column(column, known, option=option, name=str(path))
    for column in where:
        check_column(column, known, option="where", name=str(path))
    return read(path, list(dict.fromkeys([*columns.values(), *where])))


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _PACKED]
    return suffixes[-1] if suffixes else ""


def _is_text_file(path: Path) -> bool:
    return _suffix(path) in (".csv", ".tsv")


def _delimited(**options: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def read(path: Path, columns: list[str] | None, rows: int | None = None) -> Any:
        import pandas as pd

        # "NA", "null" and "None" are words that reviews contain; only an empty field is missing.
        return pd.read_csv(
            path,
            usecols=columns,
            nrows=rows,
            dtype=str,
            keep_default_na=False,
            na_values=[""],
            **options,
        )

    return lambda path: read(path, None, 0).columns.tolist(), read


def _json_names(path: Path) -> list[str]:
    import pandas as pd

    with pd.read_json(path, lines=True, chunksize=1) as chunks:
        return next(iter(chunks)).columns.tolist()


def _json(path: Path, columns: list[str]) -> Any:
    import pandas as pd

    as_written: Any = False  # pandas' stubs do not know it
    return pd.read_json(path, lines=True, dtype=as_written)[columns]


def _parquet_names(path: Path) -> list[str]:
    from pyarrow import parquet

    return parquet.read_schema(path).names


def _parquet(path: Path, columns: list[str]) -> Any:
    import pandas as pd

    return pd.read_parquet(path, columns=columns)


_READERS = {
    ".csv": _delimited(),
    ".tsv": _delimited(sep="\t", quoting=csv.QUOTE_NONE),
    ".jsonl": (_json_names, _json),
    ".parquet": (_parquet_names, _parquet),
}


def _kept(frame: Any, where: Mapping[str, Any], path: Path) -> Any:
    for column, value in where.items():
        values = value if isinstance(value, list | tuple) else (value,)
        spelled = frame[column].astype(str)
        kept = frame[spelled.isin([str(value) for value in values])]
        if len(kept) == 0:
            there = listed(sorted(spelled.unique().tolist()))
            raise ValueError(
                f"no row of {path} has {column}={value!r}; the column has {there}; correct where="
            )
        frame = kept
    return frame


def _parsed(values: list[Any]) -> list[Any]:
    """Return strings as integers where all are, else as floats where all are."""
    for kind in (int, float):
        try:
            return [kind(value) for value in values]
        except ValueError:
            continue
    return values


def _plain(column: Any) -> Any:
    """Return a column as a NumPy array of its own kind, or as a list of Python values."""
    return column.to_numpy() if column.dtype.kind in "biuf" else column.tolist()


def _image(value: Any, row: int, path: Path) -> Any:
    if isinstance(value, Mapping):  # the struct that Hugging Face datasets write
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return path.parent / value
    raise ValueError(
        f"the image in row {row} of {path} is {type(value).__name__}; encoded bytes or a path are "
        "wanted; drop the row, or choose the column by image="
    )
