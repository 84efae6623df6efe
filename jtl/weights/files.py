"""Open checkpoints: a folder or one file, in each form that the field publishes, without PyTorch.

| form | layout | reader |
|---|---|---|
| `.safetensors` | torch | `safetensors.py` |
| `.bin`, `.pt`, `.pth`, `.ckpt` | torch | `pickles.py` |
| `.msgpack` | flax | `msgpacks.py` |
| `.npz` | numpy | `npz.py` |

Each of the first three may be an index of shards (`model.safetensors.index.json`).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jtl.weights.checkpoint import AGAIN, Checkpoint
from jtl.weights.checkpoint import Tensor as Tensor
from jtl.weights.forms import INDEX, config_file, weights_file
from jtl.weights.msgpacks import read_msgpack
from jtl.weights.npz import read_npz
from jtl.weights.pickles import read_pickle
from jtl.weights.safetensors import read_safetensors

_Opened = tuple[dict[str, Tensor], Callable[[str], Any], tuple[str, ...]]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LAYOUTS = {".safetensors": "torch", **dict.fromkeys(_PICKLES, "torch")}
_LAYOUTS |= {".msgpack": "flax", ".npz": "numpy"}


def read(
    path: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    file: str | None = None,
    key: str | None = None,
) -> Checkpoint:
    """Open a checkpoint; its tensors are read one at a time, when asked for.

    Args:
        path: a folder, or one file of weights.
        config: fields that stand over those of the folder's `config.json`, or for a missing one.
            With one file it is the whole config; None takes the `config.json` beside the file.
        file: the file in the folder that holds the weights; None takes the first of
            `forms.NAMES` that is there (safetensors, then msgpack, then pickles), else the only
            file with weights in it.
        key: the entry of a pickle that holds the weights, see `pickles.read_pickle`.

    Raises:
        ValueError: there is no such folder or file, no config, no weights in a form that is read
            here, several files or entries of which none is named, or a file that is cut off,
            corrupt, or asks for more than tensors.
    """
    path = Path(path)
    if path.is_file():
        folder, chosen = path.parent, path
        stated = _config(folder, path.name) or {} if config is None else config
    else:
        folder, files = path, _files(path)
        name = file or weights_file(files)
        stated = _config(folder, name)
        if stated is None and config is None:
            raise _no_config(folder, files)
        chosen = folder / (name or _no_weights(folder, files))
        stated = {**(stated or {}), **(config or {})}
    layout, (names, get, ignored) = _opened(chosen, key)
    return Checkpoint(layout, names, get, dict(stated), folder, ignored)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the dict of a folder's `config.json`.

    Raises:
        ValueError: the folder or the file is missing, or the file is no JSON object.
    """
    folder = Path(folder)
    files = _files(folder)
    if "config.json" not in files:
        raise _no_config(folder, files)
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
            f"{str(path)!r} is no JSON: {error}; it has {size} bytes; {AGAIN}"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} holds a {type(value).__name__}, no object; {AGAIN}")
    return value


def _files(folder: Path) -> list[str]:
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "not there"
        raise ValueError(
            f"{str(folder)!r} is to be a checkpoint folder and is {kind}; give the folder that "
            "holds config.json and model.safetensors"
        )
    return sorted(entry.name for entry in folder.iterdir())


def _config(folder: Path, weights: str | None) -> dict[str, Any] | None:
    name = config_file([entry.name for entry in folder.iterdir()], weights)
    return read_json(folder / name) if name else None


def _no_config(folder: Path, files: list[str]) -> ValueError:
    return ValueError(
        f"{str(folder)!r} has no config.json; it holds {files}; "
        "give the folder in which the model was saved whole, or its fields as config="
    )


def _no_weights(folder: Path, files: list[str]) -> str:
    several = [name for name in files if name.endswith(tuple(_LAYOUTS))]
    advice = (
        "name the file that is meant as file="
        if several
        else "give a folder with model.safetensors, its index of shards, flax_model.msgpack or "
        "pytorch_model.bin"
    )
    raise ValueError(f"{str(folder)!r} has no weights that jtl reads; it holds {files}; {advice}")


def _opened(path: Path, key: str | None) -> tuple[str, _Opened]:
    """Return the layout of a file or an index of shards, and what is in it."""
    if not path.is_file():
        raise ValueError(
            f"{str(path)!r} is missing; beside it lie {_files(path.parent)}; correct file="
        )
    ending = Path(path.name.removesuffix(INDEX)).suffix
    if ending not in _LAYOUTS:
        raise ValueError(
            f"{str(path)!r} is no file of weights that jtl reads; it ends in {ending!r}; give one "
            f"that ends in one of {sorted(_LAYOUTS)}, or a folder"
        )
    if key is not None and ending not in _PICKLES:
        raise ValueError(
            f"key={key!r} names the entry of a pickle; {path.name!r} is none; leave key= out, or "
            "take a part of the names by layouts.nested"
        )
    if path.name.endswith(INDEX):
        return _LAYOUTS[ending], _read_shards(path, ending, key)
    return _LAYOUTS[ending], _read_one(path, ending, key)


def _read_one(path: Path, ending: str, key: str | None) -> _Opened:
    if ending in _PICKLES:
        return read_pickle(path, key)
    if ending == ".msgpack":
        return read_msgpack(path)
    return (*(read_npz if ending == ".npz" else read_safetensors)(path), ())


def _read_shards(index: Path, ending: str, key: str | None) -> _Opened:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{str(index)!r} has no weight_map; {AGAIN}")
    missing = sorted({file for file in where.values() if not (index.parent / file).is_file()})
    if missing:
        there = sorted(entry.name for entry in index.parent.glob(f"*{ending}"))
        raise ValueError(
            f"{str(index)!r} names shards that are not there: {missing}; the folder holds {there}; "
            "download or copy them again"
        )
    files = sorted(set(where.values()))
    opened = {file: _read_one(index.parent / file, ending, key) for file in files}
    names = {}
    for name, file in where.items():
        if name not in opened[file][0]:
            raise ValueError(
                f"{str(index)!r} says that {name!r} lies in {file}, which does not have it; "
                "the shards are of another save: download or copy all of them again"
            )
        names[name] = opened[file][0][name]
    return names, lambda name: opened[where[name]][1](name), ()
