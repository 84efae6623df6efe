"""Filling a tree: the four lists, dtypes, both layouts, and what check refuses."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jtl.weights import Checkpoint, LoadReport, check, counts, fill, from_tree, text
from jtl.weights.files import Tensor


def _checkpoint(tensors, layout="torch"):
    names = {name: Tensor(value.shape, value.dtype) for name, value in tensors.items()}
    return Checkpoint(layout, names, tensors.__getitem__, {}, Path("x"))


def _leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


TEMPLATE = {
    "params": {"a": {"kernel": _leaf(2, 3), "bias": _leaf(3)}, "norm": {"scale": _leaf(3)}},
    "stats": {"norm": {"mean": _leaf(3)}},
}


def _tensors():
    return {
        "a.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
        "a.bias": np.ones(3, np.float32),
        "norm.weight": np.full(3, 2.0, np.float32),
        "norm.running_mean": np.full(3, 5.0, np.float32),
    }


def test_every_leaf_is_read_and_transposed():
    trees, report = fill(TEMPLATE, _checkpoint(_tensors()))
    np.testing.assert_array_equal(trees["params"]["a"]["kernel"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(trees["stats"]["norm"]["mean"], [5, 5, 5])
    assert counts(report) == {"loaded": 4, "fresh": 0, "unexpected": 0, "wrong_shape": 0}
    check(report)


def test_flax_names_are_read_as_they_are_with_wrappers_and_prefix():
    tensors = {
        "params/bert/a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
        "params/bert/a/bias": np.ones(3, np.float32),
        "params/bert/norm/scale": np.ones(3, np.float32),
        "batch_stats/bert/norm/mean": np.zeros(3, np.float32),
        "params/classifier/kernel": np.zeros((3, 2), np.float32),
    }
    trees, report = fill(TEMPLATE, _checkpoint(tensors, "flax"), aliases=[("^bert[.]", "")])
    np.testing.assert_array_equal(trees["params"]["a"]["kernel"], [[0, 1, 2], [3, 4, 5]])
    assert len(report.loaded) == 4
    assert report.unexpected == ("classifier.weight",)


def test_narrow_floats_are_widened_exactly():
    tensors = _tensors()
    tensors["a.bias"] = np.array([1.5, -0.25, 3.0], ml_dtypes.bfloat16)
    tensors["norm.weight"] = np.array([0.5, 1.0, 2.0], np.float16)
    trees, _ = fill(TEMPLATE, _checkpoint(tensors))
    bias = trees["params"]["a"]["bias"]
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias, [1.5, -0.25, 3.0])


def test_a_missing_weight_stays_as_it_was_and_is_fresh():
    tensors = _tensors()
    del tensors["norm.weight"]
    trees, report = fill(TEMPLATE, _checkpoint(tensors))
    assert trees["params"]["norm"]["scale"] is TEMPLATE["params"]["norm"]["scale"]
    assert report.fresh == ("norm/scale",)
    with pytest.raises(ValueError, match=r"1 weights of the model are missing \(norm/scale\).*3 "):
        check(report)
    check(report, allow_fresh=["norm/.*"])
    with pytest.raises(ValueError, match="missing"):
        check(report, allow_fresh=["norm"])


def test_an_extra_weight_is_unexpected_and_a_buffer_is_not():
    tensors = {**_tensors(), "extra.weight": np.zeros(2, np.float32)}
    tensors["embeddings.position_ids"] = np.zeros((1, 4), np.int64)
    tensors["norm.num_batches_tracked"] = np.array(3)
    _, report = fill(TEMPLATE, _checkpoint(tensors))
    assert report.unexpected == ("extra.weight",)
    with pytest.raises(ValueError, match=r"1 are left over \(extra.weight\).*allow_unexpected"):
        check(report)
    check(report, allow_unexpected=["extra[.].*"])


@pytest.mark.parametrize(
    "value", [np.zeros((2, 3), np.float32), np.zeros(6, np.float32), np.zeros((3, 2), np.int8)]
)
def test_a_wrong_shape_or_kind_is_reported_and_never_excused(value):
    _, report = fill(TEMPLATE, _checkpoint({**_tensors(), "a.weight": value}))
    assert len(report.wrong_shape) == 1
    assert str(value.shape) in report.wrong_shape[0] or "(2, 3)" in report.wrong_shape[0]
    with pytest.raises(ValueError, match="another shape.*a/kernel: checkpoint .* model float32"):
        check(report, allow_fresh=[".*"], allow_unexpected=[".*"])


def test_another_architecture_is_named_as_such():
    _, report = fill(TEMPLATE, _checkpoint({"layer4.conv.weight": np.zeros((1, 1, 3, 3))}))
    with pytest.raises(ValueError, match="another architecture.*layer4.conv.weight.*a/kernel"):
        check(report)


def test_two_names_of_one_weight_are_an_error():
    tensors = {**_tensors(), "bert.a.bias": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match="both 'a.bias' and 'bert.a.bias'"):
        fill(TEMPLATE, _checkpoint(tensors), aliases=[("^bert[.]", "")])


def test_two_leaves_with_one_name_are_an_error():
    with pytest.raises(ValueError, match="would both read 'x'"):
        fill(TEMPLATE, _checkpoint(_tensors()), rules=[("a/.*", "x", "same")])


def test_the_text_cuts_long_lists():
    report = LoadReport(loaded=("a",), fresh=tuple(f"f{i}" for i in range(9)))
    assert text(report, limit=2).splitlines() == [
        "1 loaded, 9 fresh, 0 unexpected, 0 of wrong shape",
        "  fresh: f0, f1 and 7 more",
    ]


def test_leaves_are_placed_as_the_caller_says_in_our_layout_and_dtype():
    seen = {}

    def place(path, array):
        seen[path] = (type(array), array.dtype, array.shape)
        return jnp.asarray(array) + 1

    tensors = {**_tensors(), "norm.weight": np.array([0, 1, 2], np.float16)}
    trees, report = fill(TEMPLATE, _checkpoint(tensors), place=place)
    assert len(report.loaded) == 4
    assert seen["a/kernel"] == (np.ndarray, np.float32, (2, 3))
    assert {row[:2] for row in seen.values()} == {(np.ndarray, np.dtype(np.float32))}
    np.testing.assert_array_equal(trees["params"]["norm"]["scale"], [1, 2, 3])


def test_what_does_not_fit_is_neither_read_nor_placed():
    def refuse(*arguments):
        raise AssertionError(arguments)

    checkpoint = _checkpoint({"a.weight": np.zeros((9, 9), np.float32)})._replace(get=refuse)
    _, report = fill(TEMPLATE, checkpoint, place=refuse)
    assert len(report.wrong_shape) == 1 and len(report.fresh) == 3


def test_a_leaf_goes_straight_onto_its_shards():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    kernel = np.arange(64, dtype=np.float32).reshape(4, 16)
    template = {"params": {"a": {"kernel": _leaf(16, 4)}}}
    trees, _ = fill(
        template,
        _checkpoint({"a.weight": kernel}),
        place=lambda path, array: jax.device_put(array, sharding),
    )
    placed = trees["params"]["a"]["kernel"]
    np.testing.assert_array_equal(placed, kernel.T)
    assert placed.sharding == sharding
    assert [shard.data.nbytes for shard in placed.addressable_shards] == [kernel.nbytes // 8] * 8


def test_a_leaf_that_is_on_the_device_is_taken_as_it_is():
    leaf = jnp.ones(3)
    checkpoint = from_tree({"norm": {"scale": leaf}})
    trees, _ = fill({"params": {"norm": {"scale": _leaf(3)}}}, checkpoint)
    assert trees["params"]["norm"]["scale"] is leaf
    wide = {"params": {"norm": {"scale": _leaf(3, dtype=jnp.bfloat16)}}}
    assert fill(wide, checkpoint)[0]["params"]["norm"]["scale"].dtype == jnp.bfloat16


def test_what_is_written_into_a_tree_of_numpy_later_is_not_seen():
    raw = np.zeros(4 * 256 + 64, np.uint8)
    start = -raw.ctypes.data % 64  # memory that jax would take for its own
    scale = raw[start : start + 4 * 256].view(np.float32)
    trees, _ = fill({"params": {"scale": _leaf(256)}}, from_tree({"scale": scale}))
    scale[:] = 7
    np.testing.assert_array_equal(trees["params"]["scale"], np.zeros(256))
