"""PyTorch's files without PyTorch: both forms, views, what is refused, what is damaged."""

import argparse
import collections
import io
import json
import pickle
import struct
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jtl.weights import read, unpickle
from jtl.weights.pickles import contents, read_pickle

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class Global:
    """Pickled as a reference to a name, whether or not there is such a thing."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickled as a call of a `Global`, with a state to build it up with."""

    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state


class View:
    """A tensor: a part of an array, which is its storage."""

    def __init__(self, storage, offset=0, shape=None, strides=None, part=None):
        self.storage, self.offset, self.part = storage, offset, part
        self.shape = storage.shape if shape is None else shape
        whole = np.empty(self.shape, np.int8).strides
        self.strides = whole if strides is None else strides


class Pickler(pickle._Pickler):
    """Writes what torch.save writes; every storage goes by its number."""

    def __init__(self, file, legacy=False):
        super().__init__(file, protocol=2)
        self.legacy, self.arrays = legacy, []

    def key(self, array):
        found = [i for i, other in enumerate(self.arrays) if other is array]
        if not found:
            self.arrays.append(array)
        return str(found[0] if found else len(self.arrays) - 1)

    def persistent_id(self, item):
        if not isinstance(item, _Storage):
            return None
        kind = Global("torch", STORAGES[item.array.dtype.name])
        pid = ("storage", kind, self.key(item.array), "cpu", item.array.size)
        return (*pid, item.part and ("7", *item.part)) if self.legacy else pid

    def save(self, item, save_persistent_id=True):
        if isinstance(item, Global):
            return self.write(pickle.GLOBAL + f"{item.module}\n{item.name}\n".encode())
        if isinstance(item, View):
            arguments = (_Storage(item.storage, item.part), item.offset, item.shape, item.strides)
            hooks = collections.OrderedDict()
            item = Call(Global("torch._utils", "_rebuild_tensor_v2"), *arguments, False, hooks)
        if isinstance(item, Call):
            self.save(item.function)
            self.save(item.arguments)
            self.write(pickle.REDUCE)
            if item.state is not None:
                self.save(item.state)
                self.write(pickle.BUILD)
            return None
        return super().save(item, save_persistent_id)

    def memoize(self, item):
        """Remember nothing: what stands for a tensor has no memo of its own."""


class _Storage:
    def __init__(self, array, part):
        self.array, self.part = array, part


def write_zip(path, value, *, order="little", **options):
    file = io.BytesIO()
    pickler = Pickler(file)
    pickler.dump(value)
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", file.getvalue())
        archive.writestr("archive/byteorder", order)
        for key, array in enumerate(pickler.arrays):
            raw = array.byteswap() if order == "big" else array
            archive.writestr(f"archive/data/{key}", raw.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def write_legacy(path, value):
    with path.open("wb") as file:
        pickle.dump(0x1950A86A20F9469CFC6C, file, protocol=2)
        pickle.dump(1001, file, protocol=2)
        system = {"protocol_version": 1001, "little_endian": sys.byteorder == "little"}
        pickle.dump(system, file, protocol=2)
        pickler = Pickler(file, legacy=True)
        pickler.dump(value)
        pickle.dump([str(key) for key in range(len(pickler.arrays))], file, protocol=2)
        for array in pickler.arrays:
            file.write(struct.pack("<q", array.size) + array.tobytes())
    return path


WRITERS = [write_zip, write_legacy]


def _weights():
    rng = np.random.default_rng(0)
    base = np.arange(12, dtype=np.float32)
    return {
        "w": rng.normal(size=(3, 2)).astype(np.float32),
        "half": np.array([1.5, -2.0], np.float16),
        "brain": np.array([1.0, 0.125, -3.0], ml_dtypes.bfloat16),
        "count": np.array(7, np.int64),
        "flag": np.array([True, False]),
        "none": np.zeros((0, 4), np.float32),
        "base": base,
    }


@pytest.mark.parametrize("write", WRITERS)
def test_tensors_of_every_type_are_read_bit_for_bit(tmp_path, write):
    arrays = _weights()
    path = write(tmp_path / "x.bin", {name: View(array) for name, array in arrays.items()})
    names, get, ignored = read_pickle(path)
    assert list(names) == list(arrays) and ignored == ()
    for name, array in arrays.items():
        assert names[name] == (array.shape, array.dtype)
        assert get(name).dtype == array.dtype and get(name).shape == array.shape
        np.testing.assert_array_equal(get(name), array)


@pytest.mark.parametrize("write", WRITERS)
def test_views_share_a_storage_and_keep_their_strides(tmp_path, write):
    base = np.arange(12, dtype=np.float32)
    value = {
        "transposed": View(base, 0, (4, 3), (1, 4)),
        "column": View(base, 2, (3,), (4,)),
        "tied": View(base, 0, (3, 4), (4, 1)),
        "repeated": View(base, 5, (2, 3), (0, 1)),
    }
    names, get, _ = read_pickle(write(tmp_path / "x.pt", value))
    square = base.reshape(3, 4)
    np.testing.assert_array_equal(get("transposed"), square.T)
    np.testing.assert_array_equal(get("column"), square[:, 2])
    np.testing.assert_array_equal(get("tied"), square)
    np.testing.assert_array_equal(get("repeated"), [[5, 6, 7], [5, 6, 7]])
    assert all(get(name).flags.c_contiguous for name in names)


def test_a_storage_of_the_old_form_may_be_a_part_of_another(tmp_path):
    base = np.arange(12, dtype=np.float32)
    value = {"part": View(base, 1, (2,), (1,), part=(4, 6))}
    _, get, _ = read_pickle(write_legacy(tmp_path / "x.pt", value))
    np.testing.assert_array_equal(get("part"), [5, 6])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int64])
def test_bytes_in_the_other_order_are_turned_round(tmp_path, dtype):
    array = np.array([1, 2, -3], dtype)
    _, get, _ = read_pickle(write_zip(tmp_path / "x.pt", {"w": View(array)}, order="big"))
    np.testing.assert_array_equal(get("w"), array)


def test_one_tensor_is_read_without_the_others(tmp_path):
    path = write_zip(tmp_path / "x.pt", {"a": View(np.ones(4)), "b": View(np.zeros(4))})
    _, get, _ = read_pickle(path)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(np.zeros(4).tobytes(), b"\xff" * 32))
    np.testing.assert_array_equal(get("a"), np.ones(4))


def test_parameters_and_ordered_dicts_are_plain(tmp_path):
    parameter = Call(Global("torch._utils", "_rebuild_parameter"), View(np.ones(2)), True, {})
    value = Call(Global("collections", "OrderedDict"), [("w", parameter)], state={"_metadata": 1})
    names, get, _ = read_pickle(write_zip(tmp_path / "x.pt", value))
    assert list(names) == ["w"] and get("w").tolist() == [1.0, 1.0]


def test_a_tensor_with_a_dtype_of_its_own_over_plain_bytes(tmp_path):
    raw = np.array([1.0, -0.5], ml_dtypes.float8_e4m3fn).view(np.uint8)
    storage = (_Storage(raw, None), 0, (2,), (1,), False, {}, Global("torch", "float8_e4m3fn"))
    value = {"w": Call(Global("torch._utils", "_rebuild_tensor_v3"), *storage)}
    names, get, _ = read_pickle(write_zip(tmp_path / "x.pt", value))
    assert names["w"].dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(get("w").astype(np.float32), [1.0, -0.5])


def test_a_training_checkpoint_gives_its_weights_and_names_what_it_leaves(tmp_path):
    moment = {"state": {0: {"exp_avg": View(np.zeros(2))}}, "param_groups": []}
    namespace = Call(Global("argparse", "Namespace"), state={"model": "mae_vit", "lr": 0.1})
    value = {"model": {"w": View(np.ones(2))}, "optimizer": moment, "epoch": 3, "args": namespace}
    value["rng_state"] = View(np.zeros(4, np.uint8))
    path = write_zip(tmp_path / "x.pth", value)
    names, _, ignored = read_pickle(path)
    assert list(names) == ["w"] and set(ignored) == {"optimizer", "epoch", "args", "rng_state"}
    assert contents(path)["args"] == {"model": "mae_vit", "lr": 0.1}


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "whatever"])
def test_the_only_dict_of_tensors_is_found(tmp_path, wrapper):
    path = write_legacy(tmp_path / "x.ckpt", {wrapper: {"w": View(np.ones(2))}, "step": 1})
    assert list(read_pickle(path)[0]) == ["w"]


def test_of_several_dicts_one_is_to_be_named(tmp_path):
    value = {name: {"w": View(np.full(1, i))} for i, name in enumerate(("student", "teacher"))}
    path = write_zip(tmp_path / "x.pth", value)
    with pytest.raises(ValueError, match=r"several.*student: 1 tensors.*give key="):
        read_pickle(path)
    assert read_pickle(path, "teacher")[1]("w") == 1
    assert set(read_pickle(path, "")[0]) == {"student.w", "teacher.w"}
    with pytest.raises(ValueError, match="no entry 'pupil'.*'student', 'teacher'.*correct key="):
        read_pickle(path, "pupil")
    with pytest.raises(ValueError, match="'teacher/w'.*no dict of tensors; correct key="):
        read_pickle(path, "teacher/w")
    assert read(path, key="student").get("w") == 0


def test_a_file_without_tensors_says_what_is_in_it(tmp_path):
    with pytest.raises(ValueError, match=r"no tensors.*\['epoch', 'deep'\].*give key="):
        path = write_zip(tmp_path / "x.pt", {"epoch": 1, "deep": {"er": {"w": View(np.ones(1))}}})
        read_pickle(path)
    assert list(read_pickle(path, "deep/er")[0]) == ["w"]
    with pytest.raises(ValueError, match="holds a list, no dict of tensors"):
        read_pickle(write_zip(tmp_path / "y.pt", [1, 2]))


def test_numpy_values_are_read_as_numpy_pickles_them(tmp_path):
    array = np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3))
    value = {"w": array, "best": np.float64(0.5), "t": View(np.ones(1))}
    names, get, ignored = read_pickle(write_zip(tmp_path / "x.pt", value))
    assert names["w"] == ((2, 3), np.float32) and ignored == ("best",)
    np.testing.assert_array_equal(get("w"), [[0, 1, 2], [3, 4, 5]])
    assert contents(tmp_path / "x.pt")["best"] == 0.5


REFUSED = {
    "os.system": Call(Global("os", "system"), "touch /tmp/ran"),
    "posix.system": Call(Global("posix", "system"), "touch /tmp/ran"),
    "builtins.eval": Call(Global("builtins", "eval"), "1"),
    "builtins.getattr": Call(Global("builtins", "getattr"), "", "join"),
    "torch.storage._load_from_bytes": Call(Global("torch.storage", "_load_from_bytes"), "x"),
    "torch._utils._rebuild_qtensor": Call(Global("torch._utils", "_rebuild_qtensor"), 1),
    "torch.QInt8Storage": Global("torch", "QInt8Storage"),
    "collections.OrderedDict.fromkeys": Global("collections", "OrderedDict.fromkeys"),
    "numpy.load": Call(Global("numpy", "load"), "x"),
    "mmcv.Config": Call(Global("mmcv", "Config"), 1),
    "torch._utils._rebuild_tensor_v2.__globals__": Global(
        "torch._utils", "_rebuild_tensor_v2.__globals__"
    ),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_by_name(tmp_path, write, name):
    path = write(tmp_path / "x.bin", {"w": View(np.ones(2)), "more": REFUSED[name]})
    with pytest.raises(ValueError, match=rf"x.bin' asks for {name}, which is no .*save what"):
        read_pickle(path)


@pytest.mark.parametrize("protocol", range(6))
def test_no_protocol_gets_round_the_refusal(tmp_path, protocol):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": Evil()}, protocol=protocol))
    with pytest.raises(ValueError, match="asks for builtins.exec"):
        read_pickle(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def test_one_file_cannot_change_how_the_next_is_read(tmp_path):
    """A pickle may give a state to what it names: `(None, {attribute: value})` sets attributes."""
    array, function = np.ones(2, np.float32), Global("torch._utils", "_rebuild_tensor")
    pickler = Pickler(raw := io.BytesIO())
    pickler.save(function)
    pickler.save((None, {"__kwdefaults__": {"dtype": "float64"}, "changed": True}))
    pickler.write(pickle.BUILD + pickle.STOP)
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", raw.getvalue())
    with pytest.raises(ValueError, match="no dict of tensors"):
        read_pickle(tmp_path / "x.pt")
    value = {"w": Call(function, _Storage(array, None), 0, (2,), (1,))}
    assert read_pickle(write_zip(tmp_path / "y.pt", value))[0]["w"].dtype == np.float32
    assert not any(hasattr(item, "changed") for item in vars(unpickle).values())


def test_a_whole_module_and_a_program_are_refused(tmp_path):
    pickler = Pickler(file := io.BytesIO(), legacy=True)
    pickler.persistent_id = lambda item: ("module", "Net") if item == "net" else None
    pickler.dump("net")
    head = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {}))
    (tmp_path / "x.pt").write_bytes(head + file.getvalue())
    with pytest.raises(ValueError, match="a whole module.*save what its state_dict"):
        read_pickle(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/net.py"):
            archive.writestr(f"net/{name}", b"")
    with pytest.raises(ValueError, match="TorchScript program.*net/data.pkl.*torch.jit.load"):
        read_pickle(tmp_path / "y.pt")


def test_a_numpy_array_of_objects_is_refused(tmp_path):
    path = write_zip(tmp_path / "x.pt", {"w": np.array([print, None], object)})
    with pytest.raises(ValueError, match=r"asks for builtins.print|array of type 'O8'"):
        read_pickle(path)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("keep", [0, 3, 40, 0.5, -1, -30])
def test_a_file_that_is_cut_off_is_an_error(tmp_path, write, keep):
    path = write(tmp_path / "x.bin", {"w": View(np.arange(64.0))})
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"x.bin' is cut off or no file of torch.save.*again"):
        read_pickle(path)


@pytest.mark.parametrize(
    "view",
    [
        View(np.ones(4), 1, (4,), (1,)),
        View(np.ones(4), 0, (2, 4), (2, 1)),
        View(np.ones(4), -1, (2,), (1,)),
        View(np.ones(4), 3, (4,), (-1,)),
        View(np.ones(4), 0, (2, 2), (1,)),
    ],
)
def test_a_tensor_that_reaches_out_of_its_storage_is_an_error(tmp_path, view):
    with pytest.raises(ValueError, match="is corrupt: 'w' of shape.*again"):
        read_pickle(write_zip(tmp_path / "x.bin", {"w": view}))


def test_a_compressed_archive_is_an_error(tmp_path):
    value = {"w": View(np.zeros(64))}
    path = write_zip(tmp_path / "x.bin", value, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="archive/data/0 is compressed"):
        read_pickle(path)


def test_shards_of_pickles_are_read_through_their_index(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    where = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    for name, file in where.items():
        write_zip(tmp_path / file, {name: View(np.full(2, ord(name)))})
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    checkpoint = read(tmp_path)
    assert checkpoint.layout == "torch" and checkpoint.get("b").tolist() == [98, 98]


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_values_are_read_as_pickle_writes_them(tmp_path, protocol):
    plain = {"set": {1, 2}, "bytes": b"\xff\x00", "complex": 1j, "frozen": frozenset("a")}
    plain["count"] = collections.Counter("aab")
    plain["default"] = collections.defaultdict(list, {"a": [1]})
    plain["args"] = argparse.Namespace(lr=0.1)
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(plain, protocol=protocol))
    value = contents(tmp_path / "x.pt")
    assert value == {**plain, "args": {"lr": 0.1}}
    assert isinstance(value["args"], dict)


def test_a_namespace_may_hold_only_what_is_allowed(tmp_path):
    namespace = argparse.Namespace(lr=1, inner=types.SimpleNamespace())
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"args": namespace}, protocol=2))
    with pytest.raises(ValueError, match="asks for types.SimpleNamespace"):
        read_pickle(tmp_path / "x.pt")
