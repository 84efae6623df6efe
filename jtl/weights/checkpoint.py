"""What an open checkpoint is: names with shapes, and a function that reads one tensor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

AGAIN = "download or copy it again"


class Tensor(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Checkpoint(NamedTuple):
    """A checkpoint, opened.

    Attributes:
        layout: "torch" (names with dots, kernels transposed), "flax" (our own names and kernel
            layouts, names spelled `a/b/c`) or "numpy" (kernels as in "flax", names as another
            project chose them: `layouts.renamed` brings them to ours, and `fill` then treats
            both alike).
        names: shape and dtype of each tensor.
        get: reads one tensor.
        config: the dict of `config.json`.
        folder: where it lies.
        ignored: names in the file that were left out on purpose, by `layouts` or because they are
            no weights.
    """

    layout: str
    names: dict[str, Tensor]
    get: Callable[[str], Any]
    config: dict[str, Any]
    folder: Path
    ignored: tuple[str, ...] = ()
