"""The checkpoint readers against files written by the libraries, whole and damaged."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from safetensors.numpy import save_file

from jtl.weights import read, write
from jtl.weights.files import read_safetensors


def _folder(path, tensors=None, config=None):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "bert", **(config or {})}))
    if tensors is not None:
        save_file(tensors, path / "model.safetensors")
    return path


def _tensors():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(3, 2)).astype(np.float32),
        "b.bias": np.arange(4, dtype=np.int64),
        "c": np.float16([[1.5]]),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(7, np.int32),
    }


def test_safetensors_written_by_the_library_are_read_bit_for_bit(tmp_path):
    tensors = _tensors()
    checkpoint = read(_folder(tmp_path, tensors))
    assert checkpoint.layout == "torch" and checkpoint.config["model_type"] == "bert"
    assert set(checkpoint.names) == set(tensors)
    for name, tensor in tensors.items():
        value = checkpoint.get(name)
        assert checkpoint.names[name] == (tensor.shape, tensor.dtype)
        assert value.dtype == tensor.dtype
        np.testing.assert_array_equal(value, tensor)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_types_that_numpy_lacks_are_read(tmp_path, dtype):
    _folder(tmp_path)
    values = np.array([1.0, -2.5, 0.125], dtype)
    raw = values.tobytes()
    name = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}[values.dtype.name]
    head = json.dumps({"x": {"dtype": name, "shape": [3], "data_offsets": [0, len(raw)]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(head).to_bytes(8, "little") + head + raw)
    value = read(tmp_path).get("x")
    assert value.dtype == dtype
    np.testing.assert_array_equal(value.astype(np.float32), [1.0, -2.5, 0.125])


def test_what_write_writes_read_reads(tmp_path):
    _folder(tmp_path)
    tensors = {"x": jnp.arange(6.0).reshape(2, 3).T, "y": jnp.ones(2, jnp.bfloat16)}
    tensors["z"] = np.zeros((), np.int64)
    write(tmp_path / "model.safetensors", tensors)
    checkpoint = read(tmp_path)
    np.testing.assert_array_equal(checkpoint.get("x"), [[0, 3], [1, 4], [2, 5]])
    assert checkpoint.names["z"].shape == ()
    assert checkpoint.get("y").dtype == ml_dtypes.bfloat16
    assert [entry.name for entry in tmp_path.glob("*unfinished*")] == []


def test_shards_are_read_through_their_index(tmp_path):
    _folder(tmp_path)
    first, second = {"a": np.ones(2, np.float32)}, {"b": np.zeros(3, np.float32)}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    where = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    checkpoint = read(tmp_path)
    assert checkpoint.get("a").sum() == 2 and checkpoint.get("b").shape == (3,)
    index.write_text(json.dumps({"weight_map": {**where, "c": where["a"]}}))
    with pytest.raises(ValueError, match="'c' lies in model-00001.*does not have it.*again"):
        read(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not there: \['model-00002-of-00002.safetensors'\]"):
        read(tmp_path)


def test_an_index_without_a_map_is_an_error(tmp_path):
    _folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        read(tmp_path)


def test_flax_msgpack_names_are_paths(tmp_path):
    _folder(tmp_path)
    tree = {"params": {"a": {"0": {"kernel": np.ones((2, 3), np.float32)}}, "b": np.zeros(1)}}
    tree["batch_stats"] = {"n": {"mean": np.zeros(2, ml_dtypes.bfloat16)}}
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    checkpoint = read(tmp_path)
    assert checkpoint.layout == "flax"
    assert set(checkpoint.names) == {"params/a/0/kernel", "params/b", "batch_stats/n/mean"}
    assert checkpoint.get("params/a/0/kernel").shape == (2, 3)
    assert checkpoint.names["batch_stats/n/mean"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("keep", [0, 5, 40, -1, -100])
def test_a_truncated_safetensors_file_is_an_error(tmp_path, keep):
    file = _folder(tmp_path, {"w": np.zeros((8, 8), np.float32)}) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors.*cut off.*again"):
        read(tmp_path)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3"])
def test_floats_that_share_a_byte_are_refused(tmp_path, dtype):
    _folder(tmp_path)
    head = json.dumps({"x": {"dtype": dtype, "shape": [4], "data_offsets": [0, 2]}}).encode()
    raw = len(head).to_bytes(8, "little") + head + b"12"
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=f"is quantized: 'x' has the dtype {dtype}.*give the"):
        read(tmp_path)


def test_a_header_that_lies_is_an_error(tmp_path):
    file = _folder(tmp_path, {"w": np.zeros((8, 8), np.float32)}) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"[8,8]", b"[8,9]"))
    with pytest.raises(ValueError, match=r"corrupt: 'w' of shape \(8, 9\)"):
        read(tmp_path)
    file.write_bytes(whole.replace(b'"F32"', b'"Q32"'))
    with pytest.raises(ValueError, match="Q32.*no tensor of a known dtype"):
        read(tmp_path)
    file.write_bytes(whole[:8] + b"\xff" * 20 + whole[28:])
    with pytest.raises(ValueError, match="corrupt: its header"):
        read(tmp_path)


def test_a_truncated_msgpack_file_is_an_error(tmp_path):
    _folder(tmp_path)
    raw = msgpack_serialize({"a": np.zeros(100)})
    (tmp_path / "flax_model.msgpack").write_bytes(raw[:-50])
    with pytest.raises(ValueError, match="cut off or no Flax checkpoint"):
        read(tmp_path)


def test_a_missing_folder_config_or_weights_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is not there; give the folder"):
        read(tmp_path / "none")
    (tmp_path / "readme").write_text("")
    with pytest.raises(ValueError, match=r"no config.json; it holds \['readme'\]"):
        read(tmp_path)
    with pytest.raises(ValueError, match="is no file of weights.*ends in .*a folder"):
        read(tmp_path / "readme")
    _folder(tmp_path)
    with pytest.raises(ValueError, match="has no weights that jtl reads; it holds .*give a folder"):
        read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pytorch_model.bin' is cut off.*0 bytes.*again"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_config_that_is_no_object_is_an_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json.*again"):
        read(tmp_path)


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no tensors"):
        write(tmp_path / "x.safetensors", {})


def test_a_missing_file_is_named_with_what_lies_beside_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"head.safetensors' is missing; .*config.json"):
        read_safetensors(tmp_path / "head.safetensors")


def _all_forms(path):
    """Write one tensor in every form, each with a value of its own."""
    forms = {"open_clip_model.safetensors": 1, "model.safetensors": 2}
    for file, value in forms.items():
        save_file({"w": np.full(2, value, np.float32)}, path / file)
    (path / "flax_model.msgpack").write_bytes(msgpack_serialize({"w": np.full(2, 3.0)}))
    np.savez(path / "loose.npz", w=np.full(2, 4.0))
    return path


def test_the_form_that_is_read_first(tmp_path):
    folder = _all_forms(_folder(tmp_path))
    for file, layout, value in (
        ("model.safetensors", "torch", 2),
        ("open_clip_model.safetensors", "torch", 1),
        ("flax_model.msgpack", "flax", 3),
        ("loose.npz", "numpy", 4),
    ):
        for checkpoint in (read(folder), read(folder, file=file)):
            assert (checkpoint.layout, checkpoint.get("w")[0]) == (layout, value)
        (folder / file).unlink()


def test_several_loose_files_are_told_apart_by_name(tmp_path):
    for name in "ab":
        np.savez(_folder(tmp_path) / f"{name}.npz", w=np.full(1, ord(name)))
    with pytest.raises(ValueError, match=r"holds \['a.npz', 'b.npz', 'config.*; name .*file="):
        read(tmp_path)
    assert read(tmp_path, file="b.npz").get("w") == 98
    with pytest.raises(ValueError, match="c.npz' is missing; beside it lie .*correct file="):
        read(tmp_path, file="c.npz")


def test_files_of_a_training_run_are_no_weights(tmp_path):
    for name in ("optimizer.pt", "training_args.bin", "rng_state_0.pth", "head.safetensors"):
        (_folder(tmp_path) / name).write_bytes(b"x")
    np.savez(tmp_path / "mine.npz", w=np.ones(1))
    assert list(read(tmp_path).names) == ["w"]


def test_a_single_file_has_the_config_beside_it_or_the_one_given(tmp_path):
    folder = _all_forms(_folder(tmp_path, config={"size": 3}))
    checkpoint = read(folder / "loose.npz")
    assert checkpoint.folder == folder and checkpoint.config == {"model_type": "bert", "size": 3}
    assert read(folder / "model.safetensors", config={"a": 1}).config == {"a": 1}
    (folder / "config.json").unlink()
    assert read(folder / "model.safetensors").config == {}


def test_a_config_that_is_given_stands_over_the_folders_or_for_it(tmp_path):
    _all_forms(_folder(tmp_path, config={"size": 3}))
    assert read(tmp_path, config={"size": 4}).config == {"model_type": "bert", "size": 4}
    (tmp_path / "config.json").unlink()
    assert read(tmp_path, config={"size": 4}).config == {"size": 4}
    with pytest.raises(ValueError, match="no config.json.*as config="):
        read(tmp_path)


def test_open_clips_weights_have_open_clips_config(tmp_path):
    _all_forms(_folder(tmp_path))
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 8}}')
    assert read(tmp_path).config == {"model_type": "bert"}
    (tmp_path / "model.safetensors").unlink()
    assert read(tmp_path).config == {"model_cfg": {"embed_dim": 8}}
    assert read(tmp_path / "open_clip_model.safetensors").config["model_cfg"]["embed_dim"] == 8


def test_a_key_is_for_pickles(tmp_path):
    with pytest.raises(ValueError, match="key='model' names the entry of a pickle; 'model.safe"):
        read(_all_forms(_folder(tmp_path)), key="model")
