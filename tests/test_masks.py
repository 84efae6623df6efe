import inspect
import subprocess
import sys
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st

from jtl import masks
from jtl.masks import Count


class Pair(NamedTuple):
    first: object
    value: object


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="head")(nn.Dense(2, name="encoder")(x))


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)])
        self.head = nnx.Linear(2, 1, rngs=rngs)


def linen():
    return Mlp().init(jax.random.key(0), jnp.ones((1, 3)))["params"]


def nnx_state():
    return nnx.state(NnxMlp(nnx.Rngs(0)), nnx.Param)


def equinox():
    return eqx.filter(eqx.nn.MLP(3, 1, 2, 1, key=jax.random.key(0)), eqx.is_array)


def haiku():
    net = hk.transform(lambda x: hk.nets.MLP([2, 1])(x))
    return net.init(jax.random.key(0), jnp.ones((1, 3)))


def nested():
    return [Pair(jnp.ones(2), (jnp.ones(3), {"b": jnp.ones(1)})), jnp.ones(())]


def optax_state():
    return optax.adam(1e-3).init(linen())


EXPECTED = {
    linen: ("encoder/bias", "encoder/kernel", "head/bias", "head/kernel"),
    nnx_state: (
        *("head/bias", "head/kernel", "layers/0/bias", "layers/0/kernel"),
        *("layers/1/bias", "layers/1/kernel"),
    ),
    equinox: ("layers/0/weight", "layers/0/bias", "layers/1/weight", "layers/1/bias"),
    haiku: ("mlp/~/linear_0/b", "mlp/~/linear_0/w", "mlp/~/linear_1/b", "mlp/~/linear_1/w"),
    nested: ("0/first", "0/value/0", "0/value/1/b", "1"),
    optax_state: (
        *("0/count", "0/mu/encoder/bias", "0/mu/encoder/kernel", "0/mu/head/bias"),
        *("0/mu/head/kernel", "0/nu/encoder/bias", "0/nu/encoder/kernel", "0/nu/head/bias"),
        "0/nu/head/kernel",
    ),
}
trees = pytest.mark.parametrize("make", EXPECTED, ids=lambda make: make.__name__)


def halves(tree):
    """Label the first leaf "one" and all others "other"."""
    first = masks.names(tree)[0]
    return masks.label(tree, [(first, "one"), (".*", "other")])


@trees
def test_names(make):
    assert masks.names(make()) == EXPECTED[make]


def test_names_of_a_frozen_dict_a_single_array_and_nothing():
    assert masks.names(FrozenDict({"a": {"b": 1}})) == ("a/b",)
    assert masks.names(jnp.ones(2)) == ("",)
    assert masks.names({"a": None, "b": {}}) == ()


def test_names_keep_a_field_called_value_where_it_is_no_nnx_variable():
    assert masks.names(Pair(first={"value": 1}, value=2)) == ("first/value", "value")


def test_names_of_an_nnx_variable_that_holds_a_tree():
    state = nnx.State({"a": nnx.Param({"x": jnp.ones(1), "y": jnp.ones(1)})})
    assert masks.names(state) == ("a/x", "a/y")


@trees
def test_labels_have_the_structure_of_the_tree(make):
    tree = make()
    labels = halves(tree)
    assert jax.tree.structure(labels) == jax.tree.structure(tree)
    assert type(labels) is type(tree)
    assert jax.tree.leaves(labels) == ["one"] + ["other"] * (len(EXPECTED[make]) - 1)


@trees
def test_split_and_merge_are_inverse(make):
    tree = make()
    chosen, rest = masks.split(tree, masks.mask(halves(tree), "one"))
    assert len(jax.tree.leaves(chosen)) == 1
    assert len(jax.tree.leaves(rest)) == len(EXPECTED[make]) - 1
    for merged in (masks.merge(chosen, rest), masks.merge(rest, chosen)):
        assert jax.tree.structure(merged) == jax.tree.structure(tree)
        pairs = zip(jax.tree.leaves(merged), jax.tree.leaves(tree), strict=True)
        assert all(a is b for a, b in pairs)


leaf = st.integers(0, 9).map(np.float32)
anything = st.recursive(
    leaf,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        | st.builds(Pair, inner, inner)
        | st.none()
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(anything, st.randoms(use_true_random=False))
def test_split_and_merge_any_tree_by_any_mask(tree, random):
    mask = jax.tree.map(lambda _: random.random() < 0.5, tree)
    chosen, rest = masks.split(tree, mask)
    assert len(jax.tree.leaves(chosen)) == sum(jax.tree.leaves(mask))
    merged = masks.merge(chosen, rest)
    assert jax.tree.structure(merged) == jax.tree.structure(tree)
    assert jax.tree.leaves(merged) == jax.tree.leaves(tree)


@settings(deadline=None, max_examples=100)
@given(anything)
def test_there_is_a_name_for_each_leaf_and_a_label_for_each_name(tree):
    names = masks.names(tree)
    assert len(names) == len(jax.tree.leaves(tree))
    rules = [(name.replace("/", "[/]"), name) for name in dict.fromkeys(names)]
    assert jax.tree.leaves(masks.label(tree, rules)) == list(names)


def test_gradient_of_the_chosen_leaves_under_jit():
    params = linen()
    live, held = masks.split(params, masks.mask(halves(params), "one"))

    @jax.jit
    def gradient(live, held):
        return jax.grad(lambda live: jnp.sum(Mlp().apply({"params": masks.merge(live, held)}, x)))(
            live
        )

    x = jnp.ones((2, 3))
    (only,) = jax.tree.leaves(gradient(live, held))
    np.testing.assert_allclose(only, 2 * params["head"]["kernel"][:, 0], rtol=1e-6)


def test_the_first_rule_that_matches_wins_and_must_match_all_of_the_name():
    tree = {"a": {"w": 0}, "ab": {"w": 0}, "c": 0}
    labels = masks.label(tree, [("a/.*", "first"), ("a.*", "second"), (".*", "third")])
    assert labels == {"a": {"w": "first"}, "ab": {"w": "second"}, "c": "third"}


def test_two_rules_may_give_one_label():
    assert masks.label({"a": 0, "b": 0}, [("a", "x"), ("b", "x")]) == {"a": "x", "b": "x"}


def test_a_rule_marked_optional_may_match_nothing():
    rules = [("pooler/.*", "top"), (".*", "body")]
    assert masks.label({"a": 0}, rules, optional=("pooler/.*",)) == {"a": "body"}
    with pytest.raises(ValueError, match=r"(?s)1 of 3 rules label nothing.*pooler"):
        masks.label({"a": 0}, [*rules[:1], ("head", "h"), rules[1]], optional=("head",))


@pytest.mark.parametrize(
    ("rules", "optional", "words"),
    [
        ([("head/.*", "h")], (), "2 leaves match no rule: 'body/kernel', 'body/scale'.*add a rule"),
        ([("body", "b"), ("head/.*", "h")], (), "'body' matches only a part of 'body/kernel'"),
        ([("bodi/kernel", "b"), ("head/.*", "h")], (), "the nearest rule is 'bodi/kernel'"),
        ([("heads/.*", "h"), (".*", "b")], (), r"'heads/\.\*'.*the nearest is 'head/bias'"),
        ([("zzz", "h"), (".*", "b")], (), "the tree has 'body/kernel', 'body/scale', 'head/bias'"),
        (
            [(".*", "b"), ("head/.*", "h")],
            (),
            r"its 1 leaves are taken by earlier rules \['\.\*'\]",
        ),
        ([(".*", "b")], ("pooler",), r"optional names \['pooler'\].*the rules are \['\.\*'\]"),
        ([("((", "b")], (), "is no regex: .*re.escape"),
        ([("a", "b", "c")], (), "a pair .regex, label. of strings"),
        ({"head/.*": "h"}, (), "a pair .regex, label. of strings"),
        ([(".*", 3)], (), "a pair .regex, label. of strings"),
    ],
)
def test_label_says_what_is_wrong_and_what_is_near(rules, optional, words):
    tree = {"body": {"kernel": 0, "scale": 0}, "head": {"bias": 0}}
    with pytest.raises(ValueError, match=f"(?s){words}"):
        inspect.unwrap(masks.label)(tree, rules, optional=optional)


def test_long_lists_in_messages_are_cut():
    with pytest.raises(ValueError, match=r"20 leaves match no rule: .*'5' and 14 more"):
        masks.label([0] * 20, [])


def dense(*more):
    return dict.fromkeys(("bias", "kernel", *more), 0)


def encoder():
    """Return a tree with the names of a BERT of twelve layers."""
    norm = {"bias": 0, "scale": 0}
    layer = {
        "attention": {"output": {"LayerNorm": norm, "dense": dense()}},
        "output": {"LayerNorm": norm, "dense": dense()},
    }
    layers = {str(depth): layer for depth in range(12)}
    embeddings = {"LayerNorm": norm, "word_embeddings": {"embedding": 0}}
    return {"embeddings": embeddings, "encoder": {"layer": layers}, "head": dense()}


# What users ask for, each as its rules: all leaves that it names, and no other.
WISHES = {
    "bias only": ([(".*/bias", "live"), (".*", "held")], lambda n: n.endswith("bias"), 50),
    "norms only": ([(".*/LayerNorm/.*", "live"), (".*", "held")], lambda n: "LayerNorm" in n, 50),
    "norms and head": (
        [(".*/LayerNorm/.*|head/.*", "live"), (".*", "held")],
        lambda n: "LayerNorm" in n or n.startswith("head"),
        52,
    ),
    "last two layers": (
        [(r"encoder/layer/1[01]/.*", "live"), (".*", "held")],
        lambda n: n.split("/")[2:3] in (["10"], ["11"]),
        16,
    ),
    "all but norms": (
        [("(?!.*LayerNorm).*", "live"), (".*", "held")],
        lambda n: "LayerNorm" not in n,
        51,
    ),
    "kernels of attention": (
        [(".*/attention/.*/kernel", "live"), (".*", "held")],
        lambda n: "attention" in n and n.endswith("kernel"),
        12,
    ),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["dict", "FrozenDict"])
@pytest.mark.parametrize("wish", WISHES)
def test_what_users_ask_for_is_a_rule(wish, frozen):
    rules, meant, leaves = WISHES[wish]
    tree = FrozenDict(encoder()) if frozen else encoder()
    labels = masks.label(tree, rules)
    assert type(labels) is type(tree)
    pairs = zip(masks.names(tree), jax.tree.leaves(labels), strict=True)
    live = {name for name, label in pairs if label == "live"}
    assert live == {name for name in masks.names(tree) if meant(name)}
    assert len(live) == leaves


def test_labels_by_shape_are_a_plain_map():
    params = linen()
    labels = jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params)
    assert masks.count(params, labels) == {"vector": Count(2, 3), "matrix": Count(2, 8)}


def test_labels_by_depth():
    # A name's groups are at hand: one label for each layer.
    depth = [(rf"encoder/layer/{i}/.*", f"layer_{i}") for i in range(12)]
    labels = masks.label(encoder(), [("embeddings/.*", "stem"), *depth, ("head/.*", "head")])
    assert set(jax.tree.leaves(labels["encoder"]["layer"]["11"])) == {"layer_11"}
    assert set(jax.tree.leaves(labels["encoder"]["layer"]["1"])) == {"layer_1"}


def test_mask_takes_one_label_several_or_none():
    labels = {"a": "x", "b": "y", "c": "z"}
    assert masks.mask(labels, "x") == {"a": True, "b": False, "c": False}
    assert masks.mask(labels, ["x", "z"]) == {"a": True, "b": False, "c": True}
    assert masks.mask(labels, ()) == {"a": False, "b": False, "c": False}


def test_mask_refuses_a_label_that_no_leaf_bears():
    with pytest.raises(ValueError, match=r"\['haed'\].*\['body', 'head'\]; did you mean 'head'\?"):
        masks.mask({"a": "head", "b": "body"}, {"haed", "body"})


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ({"a": True}, "only the tree has 'b', only mask has nothing"),
        ({"a": True, "b": True, "c": True}, "only the tree has nothing, only mask has 'c'"),
        (FrozenDict({"a": True, "b": False}), "names agree, containers do not"),
        ({"a": 1, "b": True}, "holds True and False, and this one holds something else at 'a'"),
        ({"a": None, "b": True}, "holds something else at 'a'"),
    ],
)
def test_split_refuses_another_mask(mask, words):
    with pytest.raises(ValueError, match=words):
        masks.split({"a": 1.0, "b": 2.0}, mask)


def test_a_dict_of_labels_does_not_fit_an_nnx_state():
    state = nnx_state()
    with pytest.raises(ValueError, match="mask has not the structure of the tree"):
        masks.split(state, jax.tree.map(lambda _: True, nnx.to_pure_dict(state)))


def test_merge_refuses_two_leaves_in_one_place_and_other_trees():
    with pytest.raises(ValueError, match="both have a leaf at 'a/0'"):
        masks.merge({"a": [1.0], "b": None}, {"a": [2.0], "b": 3.0})
    with pytest.raises(ValueError, match="only the tree has 'b'"):
        masks.merge({"a": 1.0, "b": None}, {"a": None})


def test_count_of_arrays_and_of_shapes():
    params = linen()
    labels = masks.label(params, [("encoder/.*", "body"), (".*", "head")])
    expected = {"body": Count(2, 3 * 2 + 2), "head": Count(2, 2 + 1)}
    assert masks.count(params, labels) == expected
    assert masks.count(jax.eval_shape(linen), labels) == expected
    assert list(masks.count(params, labels)) == ["body", "head"]


def frozen_dict():
    return FrozenDict(linen())


@pytest.mark.parametrize(
    "make", [linen, frozen_dict, nnx_state, equinox, haiku, nested], ids=lambda m: m.__name__
)
def test_optimizer_moves_the_named_label_alone(make):
    params = make()
    tx = masks.optimizer({"one": optax.adamw(0.1, weight_decay=0.1)}, halves(params))
    state = tx.init(params)
    assert len(jax.tree.leaves(state)) == 3  # count, mu and nu of one leaf
    grads = jax.tree.map(jnp.ones_like, params)
    moved = params
    for _ in range(3):
        updates, state = jax.jit(tx.update)(grads, state, moved)
        moved = optax.apply_updates(moved, updates)
    held = masks.mask(halves(params), "other")
    masks.assert_held(params, moved, held)
    (before, _), (after, _) = (
        masks.split(tree, masks.mask(halves(params), "one")) for tree in (params, moved)
    )
    gap = jax.tree.leaves(before)[0] - jax.tree.leaves(after)[0]
    assert np.all(np.abs(gap - 0.3) < 0.05)  # three steps of Adam at rate 0.1


def test_optimizer_holds_a_leaf_whose_gradient_is_not_finite():
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    tx = masks.optimizer({"a": optax.sgd(1.0)}, {"a": "a", "b": "b"})
    updates, _ = tx.update({"a": jnp.ones(1), "b": jnp.full(1, jnp.nan)}, tx.init(params), params)
    assert updates == {"a": -1.0, "b": 0.0}


def test_optimizer_refuses_a_label_that_no_leaf_bears():
    with pytest.raises(ValueError, match=r"txs names \['heads'\].*did you mean 'head'\?"):
        masks.optimizer({"heads": optax.sgd(1.0)}, {"a": "head"})


def test_hold_keeps_the_state_of_adam_and_the_structure():
    params = {"w": jnp.ones(2)}
    tx = optax.adam(0.1)
    _, state = tx.update(params, tx.init(params), params)
    updates, kept = jax.jit(masks.hold(tx).update)(params, state, params)
    masks.assert_held(state, kept)
    assert jax.tree.structure(masks.hold(tx).init(params)) == jax.tree.structure(state)
    np.testing.assert_array_equal(updates["w"], 0.0)


def payload(bits):
    return np.array([bits], np.uint32).view(np.float32)


def test_assert_held_compares_bits():
    tree = {"w": jnp.array([1.0, jnp.nan, -0.0]), "half": jnp.ones(2, jnp.bfloat16), "n": 3}
    masks.assert_held(tree, jax.tree.map(lambda x: x, tree))
    masks.assert_held({"x": payload(0x7FC00001)}, {"x": payload(0x7FC00001)})
    with pytest.raises(ValueError, match="1 of 1 held leaves changed: 'x: 1 of 1 numbers"):
        masks.assert_held({"x": payload(0x7FC00001)}, {"x": payload(0x7FC00002)})
    with pytest.raises(ValueError, match="1 of 3 held leaves changed: 'w: 2 of 3 numbers"):
        masks.assert_held(tree, tree | {"w": jnp.array([1.0000001, jnp.nan, 0.0])})
    with pytest.raises(ValueError, match=r"half: was bfloat16\[2\], is float32\[2\]"):
        masks.assert_held(tree, tree | {"half": jnp.ones(2)})
    with pytest.raises(ValueError, match="only the tree has 'n'"):
        masks.assert_held(tree, {name: tree[name] for name in ("w", "half")})


def test_assert_held_looks_at_the_mask_alone():
    before, after = {"a": jnp.ones(1), "b": jnp.ones(1)}, {"a": jnp.ones(1), "b": jnp.zeros(1)}
    masks.assert_held(before, after, {"a": True, "b": False})
    with pytest.raises(ValueError, match="1 of 1 held leaves changed: 'b: 1 of 1"):
        masks.assert_held(before, after, {"a": False, "b": True})


def test_assert_held_takes_keys_and_arrays_on_several_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    rows = np.arange(8.0)
    tree = {"key": jax.random.key(1), "rows": jax.device_put(rows, spread)}
    masks.assert_held(tree, tree | {"rows": jnp.asarray(rows)})
    with pytest.raises(ValueError, match="'key: .*rows: 1 of 8"):
        other = jax.device_put(np.where(rows == 5, -1, rows), spread)
        masks.assert_held(tree, {"key": jax.random.key(2), "rows": other})


def test_masks_alone_load_no_heavy_library():
    code = "import sys; from jtl import masks; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"jax", "optax", "jtl.masks"} <= loaded
    assert not {"flax", "transformers", "orbax", "grain", "torch"} & loaded
