"""Flax's files against Flax: every kind of object, pieces, shards, damage, nothing held twice."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from jtl.weights import read
from jtl.weights.msgpacks import read_msgpack


def _tree():
    rng = np.random.default_rng(0)
    return {
        "a": {"0": {"kernel": rng.normal(size=(3, 70)).astype(np.float32)}},
        "b" * 40: np.arange(5),
        "bfloat": jnp.array([1.5, -2.0], jnp.bfloat16),
        "float8": np.array([1.0, 0.5], ml_dtypes.float8_e4m3fn),
        "flag": np.array([True, False]),
        "scalar": np.float32(2.5),
        "none": np.zeros((0, 3), np.float16),
        "long": np.zeros(70_000, np.int8),
        "many": {str(i): np.full(i % 3, i) for i in range(20)},
    }


def _flat(tree, path=""):
    if not isinstance(tree, dict):
        return {path: np.asarray(tree)}
    below = [_flat(value, f"{path}/{name}" if path else name) for name, value in tree.items()]
    return {name: leaf for part in below for name, leaf in part.items()}


def test_what_flax_writes_is_read_bit_for_bit(tmp_path):
    (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize(_tree()))
    names, get, ignored = read_msgpack(tmp_path / "x.msgpack")
    flat = _flat(_tree())
    assert set(names) == set(flat) and ignored == ()
    for name, array in flat.items():
        assert names[name] == (array.shape, array.dtype)
        assert get(name).dtype == array.dtype and get(name).shape == array.shape
        np.testing.assert_array_equal(get(name), array)


def test_a_big_array_in_pieces_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    tree = {"w": np.arange(60.0).reshape(3, 20), "deep": {"w": np.arange(9.0), "v": np.ones(1)}}
    (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    names, get, _ = read_msgpack(tmp_path / "x.msgpack")
    assert set(names) == {"w", "deep/w", "deep/v"} and names["w"].shape == (3, 20)
    np.testing.assert_array_equal(get("w"), tree["w"])
    np.testing.assert_array_equal(get("deep/w"), tree["deep"]["w"])


def test_what_is_no_array_is_named_and_left_alone(tmp_path):
    others = {"step": 7, "name": "x" * 300, "rate": 0.5, "gone": None, "on": True, "big": 2**40}
    others |= {"less": -5, "lower": -70000, "bytes": b"ab", "list": list(range(20))}
    tree = {"w": np.ones(2), "state": others}
    (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    names, _, ignored = read_msgpack(tmp_path / "x.msgpack")
    assert set(names) == {"w"} and set(ignored) == {f"state/{name}" for name in others}


def test_one_leaf_is_read_without_the_others(tmp_path):
    path = tmp_path / "x.msgpack"
    path.write_bytes(serialization.msgpack_serialize({"a": np.ones(4), "b": np.zeros(4)}))
    _, get, _ = read_msgpack(path)
    path.write_bytes(path.read_bytes().replace(np.zeros(4).tobytes(), b"\xff" * 32))
    np.testing.assert_array_equal(get("a"), np.ones(4))


@pytest.mark.parametrize("keep", [0, 1, 20, 60, -1, -40])
def test_a_file_that_is_cut_off_is_an_error(tmp_path, keep):
    raw = serialization.msgpack_serialize({"a": np.zeros(10), "b": {"c": np.ones(3)}})
    (tmp_path / "x.msgpack").write_bytes(raw[:keep])
    with pytest.raises(ValueError, match="x.msgpack' is cut off or no Flax checkpoint.*again"):
        read_msgpack(tmp_path / "x.msgpack")


@pytest.mark.parametrize("raw", [b"\xc1", b"\x01", b"\x80\x00", b"\x81\xa1a\xc7\x01\x09x"])
def test_what_is_no_tree_is_an_error(tmp_path, raw):
    (tmp_path / "x.msgpack").write_bytes(raw)
    with pytest.raises(ValueError, match="no Flax checkpoint"):
        read_msgpack(tmp_path / "x.msgpack")


def test_an_array_that_lies_about_its_shape_or_type_is_an_error(tmp_path):
    raw = serialization.msgpack_serialize({"a": np.zeros((2, 3), np.float32)})
    for old, new in ((b"\x92\x02\x03", b"\x92\x02\x04"), (b"float32", b"object_")):
        assert raw.count(old) == 1
        (tmp_path / "x.msgpack").write_bytes(raw.replace(old, new))
        with pytest.raises(ValueError, match="no Flax checkpoint"):
            read_msgpack(tmp_path / "x.msgpack")


def test_shards_are_read_through_their_index(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    first, second = "flax_model-00001-of-00002.msgpack", "flax_model-00002-of-00002.msgpack"
    trees = {first: {"a": {"kernel": np.ones((2, 3))}}, second: {"a": {"bias": np.zeros(3)}}}
    for file, tree in trees.items():
        (tmp_path / file).write_bytes(serialization.msgpack_serialize(tree))
    where = {"a/kernel": first, "a/bias": second}
    index = tmp_path / "flax_model.msgpack.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    checkpoint = read(tmp_path)
    assert checkpoint.layout == "flax" and checkpoint.get("a/kernel").sum() == 6
    assert checkpoint.names["a/bias"].shape == (3,)
