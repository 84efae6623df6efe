"""Modules under nested names, such as the layers of the stages of an encoder."""

from typing import Any

import flax.linen as nn


class Nest(nn.Module):
    """Modules that lie at paths such as `stages/0/layers/1`, each called by its path.

    Attributes:
        parts: (path, function that takes `name=` and returns the module). No path leads on from
            another one.
    """

    parts: tuple[tuple[str, Any], ...]

    def setup(self) -> None:
        """Declare what lies directly below: a module, or what is nested deeper."""
        below: dict[str, list[tuple[str, Any]]] = {}
        for path, make in self.parts:
            first, _, rest = path.partition("/")
            below.setdefault(first, []).append((rest, make))
        self.inner = {
            first: Nest(tuple(parts), name=first) if parts[0][0] else parts[0][1](name=first)
            for first, parts in below.items()
        }

    def __call__(self, path: str, *args: Any) -> Any:
        """Return what the module at `path` returns."""
        first, _, rest = path.partition("/")
        return self.inner[first](rest, *args) if rest else self.inner[first](*args)
