"""Metrics that are read when somebody asks for them: until then nothing waits for the device."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Late(Mapping[str, Any]):
    """The metrics of a step as floats and bools; the first look waits until the step is done.

    A loop that looks at the metrics of a step after it has started the next one never leaves the
    device idle.

    >>> import jax.numpy as jnp
    >>> metrics = Late({"loss": jnp.float32(0.5)})
    >>> metrics["loss"], dict(metrics)
    (0.5, {'loss': 0.5})

    Attributes:
        arrays: scalars on the device.
        found: the same on the host; filled by use.
    """

    arrays: Mapping[str, jax.Array]
    found: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """Return one metric, and read all of them if none was read before."""
        if not self.found:
            host = jax.device_get(dict(self.arrays))
            self.found.update({key: value.item() for key, value in host.items()})
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.arrays)

    def __len__(self) -> int:
        """Return the number of metrics."""
        return len(self.arrays)

    def __repr__(self) -> str:
        """Show the values."""
        return repr(dict(self))
