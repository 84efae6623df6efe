"""How the kernel of a fresh head begins."""

from typing import Any

import flax.linen as nn


def kernel_init(start: str) -> Any:
    """Return the initializer of a head's kernel by its name.

    Raises:
        ValueError: no start has this name.
    """
    if start == "zeros":
        return nn.initializers.zeros
    if start == "normal":
        return nn.initializers.normal(0.02)
    raise ValueError(f"head start {start!r} is not known; there are 'normal' and 'zeros'")
