"""Transforms of checkpoints: names, parts, laziness, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from jtl.weights import (
    Checkpoint,
    Tensor,
    fill,
    from_tree,
    joined,
    mapped,
    nested,
    read,
    renamed,
    split,
    united,
)

PARTS = (r"\1.q.\2", r"\1.k.\2", r"\1.v.\2")


def _checkpoint(tensors, path):
    names = {name: Tensor(value.shape, value.dtype) for name, value in tensors.items()}
    reads = []

    def get(name):
        reads.append(name)
        return tensors[name]

    return Checkpoint("torch", names, get, {"a": 1}, path, ("before",)), reads


def _values(checkpoint):
    values = {name: checkpoint.get(name) for name in checkpoint.names}
    for name, value in values.items():
        assert checkpoint.names[name] == (value.shape, value.dtype)
    return {name: value.tolist() for name, value in values.items()}


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    tensors = {"x.0.qkv.w": np.arange(6.0).reshape(6, 1), "x.other": np.ones(2)}
    checkpoint, reads = _checkpoint(tensors, tmp_path)
    made = split(nested(checkpoint, "x."), r"(\d)\.qkv\.(.*)", PARTS)
    made = mapped(renamed(made, [("other", "mine")]), "mine", np.flip)
    made = joined(made, (r"(\d)\.k\.(.*)", r"(\d)\.v\.(.*)"), r"\1.kv.\2")
    assert reads == []
    assert made.get("0.kv.w").ravel().tolist() == [2, 3, 4, 5] and set(reads) == {"x.0.qkv.w"}
    assert (made.layout, made.config, made.folder) == ("torch", {"a": 1}, tmp_path)
    assert made.ignored == ("before",)


def test_the_first_rule_wins_and_none_drops(tmp_path):
    tensors = {f"layer{i}.{j}": np.full(1, i) for i in (1, 2) for j in ("w", "b")}
    rules = [
        ("layer2[.]b", None),
        (r"layer(\d)[.](.*)", lambda match: f"stages.{int(match[1]) - 1}.{match[2]}"),
        (".*", "never"),
    ]
    made = renamed(_checkpoint(tensors, tmp_path)[0], rules)
    assert _values(made) == {"stages.0.w": [1], "stages.0.b": [1], "stages.1.w": [2]}
    assert made.ignored == ("before", "layer2.b")


def test_a_rule_is_for_the_whole_name_and_other_names_stay(tmp_path):
    made = renamed(_checkpoint({"a.b": np.ones(1)}, tmp_path)[0], [("a", "c"), ("b", None)])
    assert list(made.names) == ["a.b"]


def test_two_tensors_of_one_name_are_an_error(tmp_path):
    checkpoint, _ = _checkpoint({"a": np.ones(1), "b": np.ones(1)}, tmp_path)
    with pytest.raises(ValueError, match="'a' and 'b' of .* both be named 'c'; correct"):
        renamed(checkpoint, [(".", "c")])
    with pytest.raises(ValueError, match="'a' and 'b' of .* both be named 'b'"):
        renamed(checkpoint, [("a", "b")])


def test_a_prefix_that_is_not_there_is_an_error(tmp_path):
    checkpoint, _ = _checkpoint({"visual.w": np.ones(1), "text.w": np.ones(1)}, tmp_path)
    with pytest.raises(ValueError, match=r"with 'vision.'; the names .*\['text', 'visual'\]"):
        nested(checkpoint, "vision.")
    assert nested(checkpoint, "text.").ignored == ("before", "visual.w")


@pytest.mark.parametrize(("axis", "shape"), [(0, (6, 4)), (1, (4, 6)), (-1, (4, 6)), (-2, (6, 4))])
def test_split_and_join_are_inverse(tmp_path, axis, shape):
    whole = np.arange(24.0).reshape(shape)
    checkpoint, _ = _checkpoint({"a.qkv.w": whole}, tmp_path)
    parts = split(checkpoint, r"(.*)[.]qkv[.](.*)", PARTS, axis)
    for i, name in enumerate(("a.q.w", "a.k.w", "a.v.w")):
        want = np.take(whole, (2 * i, 2 * i + 1), axis)
        np.testing.assert_array_equal(parts.get(name), want)
        assert parts.names[name].shape == want.shape
        assert parts.get(name).base is None, "a view would keep the fused tensor alive"
    patterns = [rf"(.*)[.]{letter}[.](.*)" for letter in "qkv"]
    again = joined(parts, patterns, r"\1.qkv.\2", axis)
    assert _values(again) == {"a.qkv.w": whole.tolist()}


def test_unequal_parts_have_sizes(tmp_path):
    checkpoint, _ = _checkpoint({"qkv": np.arange(8)}, tmp_path)
    made = split(checkpoint, "qkv", ("q", "k", "v"), sizes=(4, 2, 2))
    assert _values(made) == {"q": [0, 1, 2, 3], "k": [4, 5], "v": [6, 7]}


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("q", "k", "v"), {}),
        (("q", "k"), {"sizes": (4, 2)}),
        (("q", "k"), {"sizes": (8,)}),
        (("q", "k"), {"axis": 1}),
    ],
)
def test_a_tensor_that_cannot_be_split_so_is_an_error(tmp_path, names, options):
    checkpoint, _ = _checkpoint({"qkv": np.arange(8)}, tmp_path)
    with pytest.raises(ValueError, match=r"'qkv' cannot be split into . parts.*shape is \(8,\)"):
        split(checkpoint, "qkv", names, **options)


def test_a_part_that_lacks_or_does_not_fit_is_an_error(tmp_path):
    tensors = {"a.q": np.ones(2), "a.k": np.ones(2), "b.q": np.ones(2)}
    patterns = ("(.)[.]q", "(.)[.]k")
    with pytest.raises(ValueError, match=r"'b.qk'.*has \['b.q'\] and nothing.*correct"):
        joined(_checkpoint(tensors, tmp_path)[0], patterns, r"\1.qk")
    for other in (np.ones(2, np.float32), np.ones((2, 2)), np.ones(())):
        checkpoint, _ = _checkpoint({"a.q": np.ones(2), "a.k": other}, tmp_path)
        with pytest.raises(ValueError, match="'a.qk' cannot be joined along axis 0"):
            joined(checkpoint, patterns, r"\1.qk")


def test_mapped_holds_the_function_to_its_shape(tmp_path):
    checkpoint, _ = _checkpoint({"w": np.arange(6.0).reshape(2, 3), "b": np.ones(1)}, tmp_path)
    made = mapped(checkpoint, "w", lambda x: x[::-1])
    assert _values(made) == {"w": [[3, 4, 5], [0, 1, 2]], "b": [1]}
    assert made.get("w").dtype == np.float64
    with pytest.raises(ValueError, match=r"for 'w' gives shape \(3,\) and was said to give \(2, 3"):
        mapped(checkpoint, "w", lambda x: x.sum(0)).get("w")


def test_a_tree_in_memory_frozen_or_plain():
    from flax.core import freeze

    kernel, mean = jnp.ones((2, 3)), np.zeros(3, np.float32)
    tree = {"params": {"a": {"kernel": kernel}}, "batch_stats": {"n": {"mean": mean}}}
    for given in (tree, freeze(tree)):
        checkpoint = from_tree(given, {"model_type": "resnet"})
        assert checkpoint.get("params/a/kernel") is kernel
        assert checkpoint.config == {"model_type": "resnet"}
        template = {"params": {"a": {"kernel": kernel}}, "stats": {"n": {"mean": mean}}}
        assert fill(template, checkpoint)[1].loaded == ("a/kernel", "n/mean")
    with pytest.raises(ValueError, match="'a/b' is to be an array and is a str; give"):
        from_tree({"a": {"b": "c"}})


def test_checkpoints_become_one(tmp_path):
    body, reads = _checkpoint({"body": np.ones(2), "both": np.ones(1)}, tmp_path / "a")
    head, _ = _checkpoint({"head": np.zeros(1), "both": np.zeros(1)}, tmp_path / "b")
    with pytest.raises(ValueError, match=r"1 names stand in both .*: \['both'\]; say by renamed"):
        united(body, head)
    whole = united(body, renamed(head, [("both", None)]))
    assert list(whole.names) == ["body", "both", "head"] and whole.ignored[-1] == "both"
    assert reads == [] and whole.folder == body.folder
    assert whole.get("both").tolist() == [1.0] and whole.get("head").tolist() == [0.0]
    with pytest.raises(ValueError, match=r"2 checkpoints of the layouts \['flax', 'torch'\]"):
        united(body._replace(layout="torch"), head._replace(layout="flax"))
    with pytest.raises(ValueError, match="0 checkpoints"):
        united()


def test_timms_vit_loads_by_one_table(tmp_path):
    """A folder as timm writes it: fused qkv, `norm1`, a patch embedding."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    stored = {
        "blocks.0.attn.qkv.weight": rng.normal(size=(6, 2)).astype(np.float32),
        "blocks.0.attn.qkv.bias": np.arange(6, dtype=np.float32),
        "blocks.0.norm1.weight": np.ones(2, np.float32),
        "head.weight": np.ones((3, 2), np.float32),
    }
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny"}')
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = split(read(tmp_path), r"(.*)[.]qkv[.](.*)", PARTS)
    rules = [(r"blocks[.](\d)[.](?:attn|norm1)[.](.*)", r"layer.\1.\2"), ("head.*", None)]
    checkpoint = renamed(checkpoint, rules)
    leaf = {"kernel": np.zeros((2, 2), np.float32), "bias": np.zeros(2, np.float32)}
    template = {"layer": {"0": {"q": leaf, "k": leaf, "v": leaf, "scale": np.zeros(2, np.float32)}}}
    trees, report = fill({"params": template}, checkpoint)
    assert len(report.loaded) == 7 and report.unexpected == () == report.fresh
    want = stored["blocks.0.attn.qkv.weight"][2:4].T
    np.testing.assert_array_equal(trees["params"]["layer"]["0"]["k"]["kernel"], want)
