"""A pickle that can build tensors and plain values, and refuses everything else by name.

A pickle is a program that may call whatever it names. Here it can name what stands in `_allowed`
and nothing else, and none of that imports, opens or runs anything.
"""

import collections
import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
_SHORT = "tensors, parameters, numpy arrays, containers, scalars and argparse.Namespace"


class Refused(ValueError):
    """The pickle asks for something that is not built here."""


class Storage(NamedTuple):
    """A stretch of bytes in the file; a view is a part of one."""

    key: str
    dtype: np.dtype
    start: int
    size: int


class Stored(NamedTuple):
    """A tensor that still lies in the file; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


def unpickle(file: io.BufferedIOBase, path: Path) -> tuple[Any, dict[str, int]]:
    """Return the next object in the file and the size in bytes of each storage it refers to."""
    storages: dict[str, int] = {}
    allowed = _allowed()

    class Restricted(pickle.Unpickler):
        """The unpickler; `find_class` is the only way from a name to an object."""

        def find_class(self, module: str, name: str) -> Any:
            return _found(allowed, module, name, path)

        def persistent_load(self, pid: Any) -> Storage:
            whole, part = _storage(pid, path)
            storages[whole.key] = whole.size
            return part

    # Names that Python 2 wrote are bytes, which are text in this encoding.
    return Restricted(file, encoding="latin1").load(), storages


def _found(allowed: Mapping[str, Any], module: str, name: str, path: Path) -> Any:
    module = "builtins" if module == "__builtin__" else module  # its name in Python 2
    found = allowed.get(f"{module}.{name}")
    if found is None and module in ("torch", "torch.cuda", "torch.storage"):
        found = _STORAGES.get(name)
    if found is None:
        raise Refused(
            f"{str(path)!r} asks for {module}.{name}, which is no tensor and no plain value, and "
            f"making one could run code; jtl builds {_SHORT}; open the file once where its own "
            "project is installed, and save what state_dict() gives by torch.save or "
            "safetensors.torch.save_file"
        )
    return found


def _storage(pid: Any, path: Path) -> tuple[Storage, Storage]:
    """Return the storage that a reference in the pickle names, whole and the part that is meant."""
    if not isinstance(pid, tuple) or pid[0] != "storage":
        raise Refused(
            f"{str(path)!r} holds a whole module, which is code; it refers to {pid!r:.80}; "
            "save what its state_dict() gives by torch.save"
        )
    _, kind, key, _, count, *view = pid
    dtype = np.dtype(_DTYPES[kind])
    whole = Storage(str(key), dtype, 0, count * dtype.itemsize)
    if not view or view[0] is None:
        return whole, whole
    _, offset, length = view[0]
    part = whole._replace(start=offset * dtype.itemsize, size=length * dtype.itemsize)
    return whole, part


def _allowed() -> dict[str, Any]:
    """Return what a pickle may name; made anew for each file, so that none can change it."""
    arrays = {"_reconstruct": lambda *_: Array(), "scalar": lambda *a: _scalar(*a)}
    numpy = {
        f"numpy.{core}.multiarray.{name}": make
        for core in ("core", "_core")
        for name, make in arrays.items()
    }
    return {
        "torch._utils._rebuild_tensor": lambda *a: _rebuild_tensor(*a),
        "torch._utils._rebuild_tensor_v2": lambda *a: _rebuild_tensor(*a[:4], metadata=a[6:]),
        "torch._utils._rebuild_tensor_v3": lambda *a: _rebuild_tensor(
            *a[:4], dtype=a[6], metadata=a[7:]
        ),
        "torch._tensor._rebuild_from_type_v2": lambda make, kind, inputs, state: make(*inputs),
        "torch.Tensor": "Tensor",
        "torch.nn.parameter.Parameter": "Parameter",
        "torch.nn.parameter.Buffer": "Buffer",
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
        "torch.Size": lambda sizes=(): tuple(sizes),
        "torch.device": lambda *place: ":".join(map(str, place)),
        "torch.torch_version.TorchVersion": _Text,
        "torch.serialization._get_layout": lambda name: str(name),
        **{f"torch.{name}": name for name in _DTYPES},
        **numpy,
        "numpy.ndarray": "ndarray",
        "numpy.dtype": _Dtype,
        "_codecs.encode": lambda *a: _encode(*a),
        "argparse.Namespace": _Namespace,
        "collections.OrderedDict": collections.OrderedDict,
        "collections.Counter": _Namespace,
        "collections.defaultdict": lambda *_: {},
        "builtins.set": set,
        "builtins.frozenset": frozenset,
        "builtins.complex": complex,
        **{f"builtins.{name}": name for name in ("dict", "list", "int", "float", "str", "bool")},
        "pathlib.PosixPath": lambda *parts: "/".join(parts),
        "pathlib.Path": lambda *parts: "/".join(parts),
    }


class _Namespace(dict):
    """An `argparse.Namespace` as a dict that does nothing."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.update(state)


class _Text(str):
    """A kind of text, such as a version, as text."""

    def __setstate__(self, state: Any) -> None:
        """Leave its attributes out."""


class _Dtype:
    """A numpy dtype of numbers or text."""

    def __init__(self, code: str, *_: Any):
        if not re.fullmatch(r"[biufcSU]\d+", code):
            raise Refused(
                f"the file has a numpy array of type {code!r}, which is not of numbers; jtl "
                f"builds {_SHORT}; save the weights alone"
            )
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class Array:
    """A numpy array: made empty, then given its state, as pickle does it."""

    value: np.ndarray = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # of Python 2
        flat = np.frombuffer(raw, dtype.value)
        native = flat.astype(dtype.value.newbyteorder("="))
        self.value = native.reshape(shape, order="F" if fortran else "C")


def _scalar(dtype: Any, raw: bytes) -> Any:
    return np.frombuffer(raw, dtype.value)[0]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *, dtype: Any = None, metadata: Any = ()
) -> Stored:
    if any(metadata):
        raise ValueError(f"a tensor with the pending operations {metadata}")
    kind = storage.dtype if dtype is None else np.dtype(_DTYPES[dtype])
    return Stored(storage, offset, tuple(shape), tuple(strides), kind)
