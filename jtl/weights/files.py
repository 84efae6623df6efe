"""Read checkpoint folders: safetensors (one file or shards) and Flax msgpack, without PyTorch.

The safetensors reader is our own ten lines because the package's numpy one cannot read bfloat16
before ml_dtypes is imported and fails on a whole file for the sake of one float8 tensor.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_AGAIN = "download or copy it again"


class Tensor(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Checkpoint(NamedTuple):
    """A checkpoint folder, opened.

    Attributes:
        layout: "torch" (safetensors: names with dots, kernels transposed) or "flax" (msgpack: our
            own names and layouts).
        names: shape and dtype of each tensor; flax names are spelled `a/b/c`.
        get: reads one tensor.
        config: the dict of `config.json`.
        folder: where it lies.
        ignored: names in the file that were left out on purpose, by `layouts` or because they are
            no weights.
    """

    layout: str
    names: dict[str, Tensor]
    get: Callable[[str], np.ndarray]
    config: dict[str, Any]
    folder: Path
    ignored: tuple[str, ...] = ()


def read(folder: str | Path) -> Checkpoint:
    """Open a checkpoint folder; tensors of safetensors are read one at a time, when asked for.

    `model.safetensors` is taken first, then the shards of `model.safetensors.index.json`, then
    `flax_model.msgpack`.

    Raises:
        ValueError: no such folder, no config, no weights in a form that is read here, or a file
            that is cut off or corrupt.
    """
    folder = Path(folder)
    config = read_config(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        names, get = read_safetensors(folder / "model.safetensors")
        return Checkpoint("torch", names, get, config, folder)
    if index.exists():
        names, get = _read_shards(index)
        return Checkpoint("torch", names, get, config, folder)
    if (folder / "flax_model.msgpack").exists():
        names, get = _read_msgpack(folder / "flax_model.msgpack")
        return Checkpoint("flax", names, get, config, folder)
    there = sorted(entry.name for entry in folder.iterdir())
    pickled = [name for name in there if name.endswith((".bin", ".pth", ".pt", ".ckpt"))]
    advice = (
        f"{pickled[0]} is a pickle, which can run code and needs PyTorch: convert it once with "
        "transformers' save_pretrained, which writes model.safetensors"
        if pickled
        else "give a folder with model.safetensors, its index of shards, or flax_model.msgpack"
    )
    raise ValueError(f"{str(folder)!r} has no weights that jtl reads; it holds {there}; {advice}")


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the dict of a folder's `config.json`.

    Raises:
        ValueError: the folder or the file is missing, or the file is no JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "not there"
        raise ValueError(
            f"{str(folder)!r} is to be a checkpoint folder and is {kind}; give the folder that "
            "holds config.json and model.safetensors"
        )
    if not (folder / "config.json").is_file():
        there = sorted(entry.name for entry in folder.iterdir())
        raise ValueError(
            f"{str(folder)!r} has no config.json; it holds {there}; "
            "give the folder in which the model was saved whole"
        )
    return read_json(folder / "config.json")


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: the file is no JSON object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        size = Path(path).stat().st_size
        raise ValueError(
            f"{str(path)!r} is no JSON: {error}; it has {size} bytes; {_AGAIN}"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} holds a {type(value).__name__}, no object; {_AGAIN}")
    return value


def read_safetensors(
    path: str | Path,
) -> tuple[dict[str, Tensor], Callable[[str], np.ndarray]]:
    """Return shape and dtype of each tensor in a file, and a function that reads one.

    Raises:
        ValueError: the file is cut off or corrupt, or has a dtype that is not known.
    """
    path = Path(path)
    header, start = _header(path)
    room = path.stat().st_size - start
    names, places = {}, {}
    for name, entry in header.items():
        try:
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            shape = tuple(int(size) for size in entry["shape"])
            begin, end = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} says {entry} of {name!r}, which is no tensor of a known dtype "
                f"({sorted(_DTYPES)}); {_AGAIN}"
            ) from error
        if not 0 <= begin <= end or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{str(path)!r} is corrupt: {name!r} of shape {shape} is said to lie in bytes "
                f"{begin} to {end}; {_AGAIN}"
            )
        if end > room:
            raise ValueError(
                f"{str(path)!r} is cut off: {name!r} ends at byte {start + end} of a file of "
                f"{start + room}; {_AGAIN}"
            )
        names[name] = Tensor(shape, dtype)
        places[name] = start + begin

    def get(name: str) -> np.ndarray:
        shape, dtype = names[name]
        count = math.prod(shape)
        if not count:
            return np.zeros(shape, dtype)
        flat = np.fromfile(path, dtype=dtype, count=count, offset=places[name])
        return flat.reshape(shape)

    return names, get


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and the byte at which its data begins."""
    if not path.is_file():
        there = (
            sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        )
        raise ValueError(f"{str(path)!r} is missing; beside it lie {there[:10]}; {_AGAIN}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{str(path)!r} is cut off or no safetensors file: its header is said to have "
                f"{length} bytes, the file has {size}; {_AGAIN}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is corrupt: its header of {length} bytes is no JSON object; {_AGAIN}"
        ) from error
    return header, 8 + length


def _read_shards(index: Path) -> tuple[dict[str, Tensor], Callable[[str], np.ndarray]]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{str(index)!r} has no weight_map; {_AGAIN}")
    missing = sorted({file for file in where.values() if not (index.parent / file).is_file()})
    if missing:
        there = sorted(entry.name for entry in index.parent.glob("*.safetensors"))
        raise ValueError(
            f"{str(index)!r} names shards that are not there: {missing}; the folder holds {there}; "
            "download or copy them again"
        )
    shards = {file: read_safetensors(index.parent / file) for file in sorted(set(where.values()))}
    names = {}
    for name, file in where.items():
        if name not in shards[file][0]:
            raise ValueError(
                f"{str(index)!r} says that {name!r} lies in {file}, which does not have it; "
                "the shards are of another save: download or copy all of them again"
            )
        names[name] = shards[file][0][name]
    return names, lambda name: shards[where[name]][1](name)


def _read_msgpack(path: Path) -> tuple[dict[str, Tensor], Callable[[str], np.ndarray]]:
    from flax.serialization import msgpack_restore
    from flax.traverse_util import flatten_dict

    try:
        tree = msgpack_restore(path.read_bytes())
        flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}
    except Exception as error:  # msgpack and flax raise a dozen kinds on a damaged file
        raise ValueError(
            f"{str(path)!r} is cut off or no Flax checkpoint: {type(error).__name__}: {error}; it "
            f"has {path.stat().st_size} bytes; {_AGAIN}"
        ) from error
    return {name: Tensor(leaf.shape, leaf.dtype) for name, leaf in flat.items()}, flat.__getitem__
