"""IDX files: written by hand, packed and not, and every way in which they can be wrong."""

import gzip
import struct

import numpy as np
import pytest

from jtl.data.idx import find_idx, read_idx


def idx(array, code):
    """Return the bytes of an IDX file as the format says them."""
    head = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


_CUT_SHORT = gzip.compress(bytes(100), mtime=0)[:20]  # without the time: it names a test


@pytest.mark.parametrize(
    ("dtype", "code"),
    [("u1", 8), ("i1", 9), ("i2", 11), ("i4", 12), ("f4", 13), ("f8", 14)],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_each_type_comes_back(tmp_path, dtype, code, pack):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    path = tmp_path / "file"  # the name says nothing about the packing
    path.write_bytes(pack(idx(array, code)))
    found = read_idx(path)
    assert found.dtype == np.dtype(dtype) and found.dtype.isnative
    np.testing.assert_array_equal(found, array)
    found[0, 0, 0] = 1  # the array is the caller's own


def test_bytes_by_hand(tmp_path):
    (tmp_path / "labels").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 0, 255]))
    assert read_idx(tmp_path / "labels").tolist() == [7, 0, 255]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no IDX file: it begins with ''; wanted are two zero bytes"),
        (b"\x89PNG....", "is no IDX file: it begins with '89 50 4e 47'"),
        (bytes([0, 0, 7, 1, 0, 0, 0, 0]), "is no IDX file: it begins with '00 00 07 01'"),
        (bytes([0, 0, 8, 3, 0, 0, 0, 1]), "ends inside its header: 8 bytes, and 3 axes need 16"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 3, 1]), r"holds \(3,\) numbers, 3 bytes; there are 1; fetch"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 1, 1, 2]), r"holds \(1,\) numbers, 1 bytes; there are 2"),
        (_CUT_SHORT, "cannot be read .*; it is missing or damaged; fetch it"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "file")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read .*missing or damaged; fetch it again"):
        read_idx(tmp_path / "nothing")


def test_files_are_found_under_all_their_names(tmp_path):
    for number, names in enumerate(
        (
            ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
            ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
            ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"")
        (folder / f"._{names[0]}").write_bytes(b"")  # what an archive of a Mac leaves
        assert [path.name for path in find_idx(folder, "train")] == list(names)
    with pytest.raises(ValueError, match="has 0 files 't10k-images.*there are .*give the folder"):
        find_idx(tmp_path / "0", "t10k")
    (tmp_path / "0" / "train-images.idx3-ubyte").write_bytes(b"")
    with pytest.raises(ValueError, match="has 2 files 'train-images"):
        find_idx(tmp_path / "0", "train")
