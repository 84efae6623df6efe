"""numpy's archives: names and kernels as they are, no pickles, one member at a time."""

import zipfile

import ml_dtypes
import numpy as np
import pytest

from jtl.weights import fill, nested, read, renamed
from jtl.weights.npz import read_npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_bit_for_bit_under_their_names(tmp_path, save):
    arrays = {
        "params/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
        "brain": np.array([1.5, -2.0], ml_dtypes.bfloat16),
        "scalar": np.array(3),
    }
    save(tmp_path / "x.npz", **arrays)
    names, get = read_npz(tmp_path / "x.npz")
    assert set(names) == set(arrays)
    for name, array in arrays.items():
        assert names[name] == (array.shape, array.dtype) and get(name).dtype == array.dtype
        np.testing.assert_array_equal(get(name), array)
        assert get(name).flags.c_contiguous and get(name).shape == array.shape


def test_objects_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(2), b=np.array([{}], object))
    with pytest.raises(ValueError, match=r"no array of numbers: \['b'\].*pickles.*save"):
        read_npz(tmp_path / "x.npz")


def test_a_file_that_is_cut_off_or_none_is_an_error(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.ones(20))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cut off or no archive of numpy.*again"):
        read_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"no header")
    with pytest.raises(ValueError, match="cut off or no archive of numpy"):
        read_npz(path)


def test_kernels_lie_as_flax_has_them_and_names_are_brought_to_ours(tmp_path):
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez(tmp_path / "x.npz", **{"params/Dense_0/kernel": kernel, "opt/count": np.array(1)})
    checkpoint = read(tmp_path / "x.npz", config={"model_type": "vit"})
    assert checkpoint.layout == "numpy" and checkpoint.config == {"model_type": "vit"}
    checkpoint = renamed(nested(checkpoint, "params/"), [("Dense_0/(.*)", r"dense/\1")])
    assert checkpoint.ignored == ("opt/count",)
    trees, report = fill({"params": {"dense": {"kernel": kernel * 0}}}, checkpoint)
    np.testing.assert_array_equal(trees["params"]["dense"]["kernel"], kernel)
    assert report.loaded == ("dense/kernel",) and report.unexpected == ()
