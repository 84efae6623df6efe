"""IDX files, the format of MNIST: a big-endian header of type and shape, then the numbers."""

import gzip
import math
import struct
from pathlib import Path

import numpy as np

_TYPES = {
    0x08: ">u1",
    0x09: ">i1",
    0x0B: ">i2",
    0x0C: ">i4",
    0x0D: ">f4",
    0x0E: ">f8",
}
_GZIP = b"\x1f\x8b"


def read_idx(path: str | Path) -> np.ndarray:
    """Return the array of an IDX file, packed by gzip or not, in the machine's byte order.

    Raises:
        ValueError: there is no such file, it is no IDX file, or it holds fewer or more numbers
            than its header says.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == _GZIP else content
    except (OSError, EOFError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error}); it is missing or "
            "damaged; fetch it again"
        ) from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _TYPES:
        raise ValueError(
            f"{str(path)!r} is no IDX file: it begins with {content[:4].hex(' ')!r}; wanted are "
            f"two zero bytes, a type of {[f'{code:02x}' for code in _TYPES]} and the number of "
            "axes; give the file of the images or labels itself"
        )
    dtype, axes = np.dtype(_TYPES[content[2]]), content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        raise ValueError(
            f"{str(path)!r} ends inside its header: {len(content)} bytes, and {axes} axes need "
            f"{start}; fetch it again"
        )
    shape = struct.unpack(f">{axes}I", content[4:start])
    wanted = math.prod(shape) * dtype.itemsize
    if len(content) - start != wanted:
        raise ValueError(
            f"{str(path)!r} says that it holds {shape} numbers, {wanted} bytes; there are "
            f"{len(content) - start}; fetch it again"
        )
    array = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def find_idx(folder: str | Path, part: str) -> tuple[Path, Path]:
    """Return the files of images and labels of a part in a folder of MNIST's kind.

    Args:
        folder: holds `PART-images-idx3-ubyte` and `PART-labels-idx1-ubyte`, with a dot for the
            second hyphen or not, with `.gz` or not.
        part: "train" or "t10k".

    Raises:
        ValueError: a file is missing, or there are several.
    """
    found = []
    for kind in ("images", "labels"):
        pattern = f"{part}-{kind}[.-]idx?-ubyte*"
        files = sorted(path for path in Path(folder).glob(pattern) if path.is_file())
        if len(files) != 1:
            there = sorted(path.name for path in Path(folder).glob("*"))[:12]
            raise ValueError(
                f"{str(folder)!r} has {len(files)} files {pattern!r} where one is wanted; there "
                f"are {there}; give the folder with the IDX files, one of each kind"
            )
        found.append(files[0])
    return found[0], found[1]
