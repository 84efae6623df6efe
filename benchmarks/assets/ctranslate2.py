"""Read the binary that CTranslate2 stores a model in: named arrays, and names that repeat others.

The layout, little-endian: version, name of the architecture, its revision, number of arrays; of
each array its name, rank (a byte), sizes, number of its dtype (a byte), bytes, data; then number
of aliases, and of each the new name and that of the array. A name is its length with the closing
zero (two bytes), then its bytes. All other numbers have four.
"""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from jtl.weights.files import Tensor

_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
_VERSIONS = (4, 5, 6)


class Binary(NamedTuple):
    """An opened model.

    Attributes:
        architecture: such as "WhisperSpec".
        names: shape and dtype of each array.
        aliases: {other name: name of an array}.
        get: reads one array.
    """

    architecture: str
    names: dict[str, Tensor]
    aliases: dict[str, str]
    get: Callable[[str], np.ndarray]


def read(path: str | Path) -> Binary:
    """Open a `model.bin`; arrays are read one at a time, when asked for.

    Raises:
        ValueError: the file is of another version, cut off, or no such file at all.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _opened(path, file)
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise ValueError(
            f"{str(path)!r} is cut off or no file of CTranslate2 ({error}); it has "
            f"{path.stat().st_size} bytes; fetch it again"
        ) from error


def _opened(path: Path, file: IO[bytes]) -> Binary:
    version = _number(file, "I")
    if version not in _VERSIONS:
        raise ValueError(
            f"{str(path)!r} is of version {version} of CTranslate2's binary; read are {_VERSIONS}; "
            "give a model that was converted by CTranslate2 2 to 4"
        )
    architecture, _ = _name(file), _number(file, "I")
    names, places = {}, {}
    for _ in range(_number(file, "I")):
        name = _name(file)
        shape = tuple(_number(file, "I") for _ in range(_number(file, "B")))
        names[name] = Tensor(shape, np.dtype(_DTYPES[_number(file, "B")]))
        size = _number(file, "I")
        places[name] = file.tell()
        if size != math.prod(shape) * names[name].dtype.itemsize:
            raise IndexError(f"{name!r} of {shape} is said to have {size} bytes")
        file.seek(size, 1)
    aliases = {}
    for _ in range(_number(file, "I")):
        name = _name(file)
        aliases[name] = _name(file)

    def get(name: str) -> np.ndarray:
        shape, dtype = names[name]
        flat = np.fromfile(path, dtype, math.prod(shape), offset=places[name])
        return flat.reshape(shape)

    return Binary(architecture, names, aliases, get)


def _number(file: IO[bytes], kind: str) -> int:
    code = f"<{kind}"
    return struct.unpack(code, file.read(struct.calcsize(code)))[0]


def _name(file: IO[bytes]) -> str:
    return file.read(_number(file, "H"))[:-1].decode()
