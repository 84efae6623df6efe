"""Labels as given to integers and class names, or to numbers of a regression."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jtl.near import listed

Classes = tuple[str, ...] | None


def as_labels(
    values: Sequence[Any] | np.ndarray, classes: Sequence[str] | None, *, name: str
) -> tuple[np.ndarray, Classes]:
    """Return labels (n,) as int32 classes or float32 numbers, and the names of the classes.

    Args:
        values: strings, integers or bools are classes, floats are numbers to predict.
        classes: their names, where strings are looked up and integers are positions; None takes the
            sorted distinct values; `()` asks for numbers, whatever the type.
        name: of the data, for errors.

    Raises:
        ValueError: a label is missing or NaN, or is none of the classes.

    >>> as_labels(["neg", "pos", "neg"], None, name="reviews")
    (array([0, 1, 0], dtype=int32), ('neg', 'pos'))
    """
    array = _array(values, name)
    if classes is not None and len(classes) == 0:
        return _numbers(array, name), None
    if array.dtype.kind == "f":
        numbers = _numbers(array, name)
        if classes is None:
            return numbers, None
        if np.any(numbers != np.round(numbers)):
            raise ValueError(
                f"labels of {name} are the classes {listed(list(classes))}; row "
                f"{int(np.argmax(numbers != np.round(numbers)))} has a fraction; "
                "give integers, or no classes for a regression"
            )
        array = array.astype(np.int64)
    if classes is None:
        distinct, labels = np.unique(array, return_inverse=True)
        return labels.astype(np.int32), tuple(str(value) for value in distinct)
    if array.dtype.kind == "U":
        return _looked_up(array, tuple(classes), name), tuple(classes)
    return _positions(array, tuple(classes), name), tuple(classes)


def _array(values: Sequence[Any] | np.ndarray, name: str) -> np.ndarray:
    if isinstance(values, np.ndarray) and values.dtype.kind in "biufU":
        array = values
    else:  # np.asarray would spell a missing string "nan", a class like any other
        array = _from_objects(list(values), name)
    if array.ndim != 1:
        raise ValueError(
            f"labels of {name} have shape {array.shape}; one label for each example is wanted; "
            "give one class or one number a row"
        )
    return array.astype(np.int64) if array.dtype.kind == "b" else array


def _from_objects(values: list[Any], name: str) -> np.ndarray:
    missing = [row for row, value in enumerate(values) if _is_missing(value)]
    if missing:
        raise _missing(missing, len(values), name)
    if all(isinstance(value, str) for value in values):
        return np.asarray(values, str)
    if all(isinstance(value, int | float | np.number | np.bool_) for value in values):
        return np.asarray(values)
    kinds = sorted({type(value).__name__ for value in values})
    raise ValueError(
        f"labels of {name} are of the types {kinds}; all strings or all numbers are wanted; "
        "convert the column, or choose another by label="
    )


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas' own
        return True
    return isinstance(value, float | np.floating) and bool(np.isnan(value))


def _numbers(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind == "U":
        raise ValueError(
            f"labels of {name} are strings, {listed(sorted(set(array.tolist())))}; numbers are "
            "asked for by classes=(); leave classes out, or choose another label column"
        )
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise _missing(bad.tolist(), len(array), name)
    return array.astype(np.float32)


def _missing(rows: list[int], size: int, name: str) -> ValueError:
    return ValueError(
        f"{len(rows)} of {size} labels of {name} are missing or not finite, first in rows "
        f"{rows[:5]}; drop these rows or give them labels"
    )


def _looked_up(array: np.ndarray, classes: tuple[str, ...], name: str) -> np.ndarray:
    known = {label: position for position, label in enumerate(classes)}
    unknown = sorted(set(array.tolist()) - set(known))
    if unknown:
        raise ValueError(
            f"labels {listed(unknown)} of {name} are none of the classes; the classes are "
            f"{listed(list(classes))}; name every class, or drop these rows"
        )
    return np.asarray([known[label] for label in array.tolist()], np.int32)


def _positions(array: np.ndarray, classes: tuple[str, ...], name: str) -> np.ndarray:
    bad = np.flatnonzero((array < 0) | (array >= len(classes)))
    if len(bad):
        raise ValueError(
            f"label {int(array[bad[0]])} in row {int(bad[0])} of {name} is outside the classes; "
            f"there are {len(classes)}, labels 0 to {len(classes) - 1} "
            f"({len(bad)} of {len(array)} labels are outside); name every class, or drop these rows"
        )
    return array.astype(np.int32)
