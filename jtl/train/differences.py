"""Where two plain data differ: what an error about another config or another model lists."""

from collections.abc import Mapping
from typing import Any


def differences(saved: Any, now: Any) -> list[str]:
    """Return the entries in which two plain data differ, one line for each.

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 4})
    ['b/c: saved 2, now 3', 'd: saved nothing, now 4']
    """
    old, new = _entries(saved), _entries(now)
    lines = []
    for name in [*old, *(name for name in new if name not in old)]:
        if old.get(name, _NOTHING) != new.get(name, _NOTHING):
            lines.append(f"{name}: saved {_show(old, name)}, now {_show(new, name)}")
    return lines


_NOTHING = object()


def _show(entries: Mapping[str, Any], name: str) -> str:
    return repr(entries[name]) if name in entries else "nothing"


def _entries(data: Any, path: str = "") -> dict[str, Any]:
    if isinstance(data, Mapping) and data:
        items = ((str(key), value) for key, value in data.items())
    elif isinstance(data, list | tuple) and data:
        items = ((str(i), value) for i, value in enumerate(data))
    else:
        return {path: data}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= _entries(value, f"{path}/{key}" if path else key)
    return found
