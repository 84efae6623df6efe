"""Read numpy archives, such as big_vision's: one `.npy` member for each tensor, read one at a time.

Members keep their names (`params/Transformer/encoderblock_0/LayerNorm_0/scale`). Kernels lie as
Flax has them; `layouts.renamed` brings the names of a project to ours.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from jtl.weights.checkpoint import AGAIN, Tensor

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_UNNAMED = np.dtype("V2")  # how numpy writes bfloat16, for which it has no name


def read_npz(path: str | Path) -> tuple[dict[str, Tensor], Callable[[str], np.ndarray]]:
    """Return shape and dtype of each array in an archive, and a function that reads one.

    Raises:
        ValueError: the file is cut off or no archive, or a member holds Python objects.
    """
    path = Path(path)
    try:
        names = _members(path)
    except Exception as error:  # a damaged zip or header raises a dozen kinds of error
        size = path.stat().st_size if path.is_file() else 0
        raise ValueError(
            f"{str(path)!r} is cut off or no archive of numpy: {type(error).__name__}: {error}; "
            f"it has {size} bytes; {AGAIN}"
        ) from error
    numbers = {name for name, (_, t) in names.items() if t.kind in "biufc" or t == _BFLOAT16}
    objects = [name for name in names if name not in numbers]
    if objects:
        raise ValueError(
            f"{str(path)!r} holds what is no array of numbers: {objects[:6]}, of "
            f"{names[objects[0]].dtype}; objects in it are pickles, which can run code; "
            "save the weights alone by numpy.savez"
        )

    def get(name: str) -> np.ndarray:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            array = np.lib.format.read_array(member, allow_pickle=False)
        return np.asarray(array, order="C").view(names[name].dtype)

    return names, get


def _members(path: Path) -> dict[str, Tensor]:
    names = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as member:
                version = np.lib.format.read_magic(member)
                reader = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, _, dtype = reader(member)
            dtype = _BFLOAT16 if dtype == _UNNAMED else dtype
            names[entry.filename.removesuffix(".npy")] = Tensor(shape, dtype)
    return names
