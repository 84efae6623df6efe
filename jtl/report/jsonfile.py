"""Plain data to JSON files and back, each file written in one move."""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any


def plain(value: Any) -> Any:
    """Return a value as what JSON knows: arrays as lists, numbers not finite as None.

    >>> plain({"loss": float("nan"), "live": ("head",), "folder": pathlib.PurePosixPath("a/b")})
    {'loss': None, 'live': ['head'], 'folder': 'a/b'}

    Raises:
        ValueError: a value that JSON cannot hold, such as a function.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(plain(entry) for entry in value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Iterable):
        return [plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return str(value)
    raise ValueError(
        f"{value!r} is a {type(value).__name__}; a record holds text, numbers, bools, lists and "
        "dicts; give its name instead"
    )


def read(path: pathlib.Path) -> dict[str, Any]:
    """Return the dict in a file.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is no JSON ({error}); restore it, or give another run folder"
        ) from None


def write(path: pathlib.Path, value: Any) -> None:
    """Write plain data, indented."""
    replace(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def replace(path: pathlib.Path, text: str) -> None:
    """Write a text: whoever reads the file sees all of the old one or all of the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
