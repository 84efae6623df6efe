"""Configs of other projects: what family, and what config of ours, a folder of theirs is."""

from collections.abc import Callable, Mapping
from typing import Any

# Each looks at the dict of a config file; it returns the config in this library's terms, with its
# `model_type`, or None where the file is not of its kind.
READERS: tuple[Callable[[Mapping[str, Any]], dict[str, Any] | None], ...] = ()


def recognised(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a foreign config in this library's terms, None where no reader knows it."""
    if "model_type" in config:
        return None
    return next((found for reader in READERS if (found := reader(config)) is not None), None)
