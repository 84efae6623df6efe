import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jtl import masks, trees

A = {"x": jnp.array([1.0, 2.0]), "y": [jnp.array([[3.0]])]}
B = {"x": jnp.array([4.0, -5.0]), "y": [jnp.array([[0.5]])]}


def test_dot_and_norm_by_hand():
    assert float(trees.dot(A, B)) == 4 - 10 + 1.5
    assert float(trees.norm(A)) == pytest.approx(14**0.5)
    assert float(trees.norm({})) == 0.0


def test_sums_are_in_float32_for_bfloat16_leaves():
    ones = {"w": jnp.ones(1000, jnp.bfloat16), "n": jnp.array([2], jnp.int32)}
    assert trees.dot(ones, ones).dtype == jnp.float32
    assert float(trees.dot(ones, ones)) == 1004.0
    assert float(trees.norm(ones)) == pytest.approx(1004**0.5)
    assert float(trees.weighted_squared_distance(ones, jax.tree.map(jnp.zeros_like, ones))) == 1004


# XLA flushes subnormals to zero.
numbers = st.floats(-8, 8, width=32, allow_subnormal=False)


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1, width=32), st.lists(numbers, min_size=1, max_size=5))
def test_lerp_is_exact_at_the_ends_and_at_rest(t, row):
    a, b = {"w": np.array(row, np.float32)}, {"w": np.array(row[::-1], np.float32)}
    np.testing.assert_array_equal(trees.lerp(a, b, 0.0)["w"], a["w"])
    np.testing.assert_array_equal(trees.lerp(a, b, 1.0)["w"], b["w"])
    np.testing.assert_allclose(trees.lerp(a, a, t)["w"], a["w"], rtol=1e-6, atol=1e-6)


def test_lerp_keeps_the_dtype_and_takes_a_traced_t():
    half = {"w": jnp.zeros(2, jnp.bfloat16)}, {"w": jnp.ones(2, jnp.bfloat16)}
    mixed = jax.jit(trees.lerp)(*half, jnp.float32(0.25))
    assert mixed["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(mixed["w"], np.float32), 0.25)


def test_weighted_squared_distance_by_hand():
    assert float(trees.weighted_squared_distance(A, B)) == 9 + 49 + 6.25
    weight = {"x": jnp.array([2.0, 1.0]), "y": [jnp.array([[4.0]])]}
    assert float(trees.weighted_squared_distance(A, B, weight=weight)) == 18 + 49 + 25
    assert float(trees.weighted_squared_distance(A, A, weight=weight)) == 0.0
    mask = {"x": False, "y": [True]}
    assert float(trees.weighted_squared_distance(A, B, weight=weight, mask=mask)) == 25


def test_leaves_outside_the_mask_may_be_holes_of_any_kind():
    mask = {"x": True, "y": [False]}
    anchor, _ = masks.split(B, mask)
    gradient = jax.grad(lambda a: trees.weighted_squared_distance(a, anchor, mask=mask))(A)
    np.testing.assert_array_equal(gradient["x"], [-6.0, 14.0])
    np.testing.assert_array_equal(gradient["y"][0], 0.0)
    odd = {"x": B["x"], "y": [jnp.ones(7)]}
    assert float(trees.weighted_squared_distance(A, odd, mask=mask)) == 58.0


def test_distance_of_states_with_holes():
    state = nnx.state(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
    mask = masks.mask(masks.label(state, [("bias", "b"), ("kernel", "k")]), "k")
    moved = jax.tree.map(lambda x: x + 1, state)
    anchor, _ = masks.split(state, mask)
    assert float(trees.weighted_squared_distance(moved, anchor, mask=mask)) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("b", "weight", "mask", "words"),
    [
        ({"x": B["x"]}, None, None, "b has not the structure.*only the tree has 'y/0'"),
        ({"x": B["x"], "y": [None]}, None, None, r"leaf 'y/0' has the shapes .*None"),
        ({"x": jnp.ones(3), "y": B["y"]}, None, None, r"leaf 'x' .*\(2,\), \(3,\)"),
        (B, {"x": 1.0, "y": B["y"]}, None, r"leaf 'x' .*\(2,\), \(2,\), \(\)"),
        (B, {"x": B["x"]}, None, "weight has not the structure"),
        (B, None, {"x": True}, "mask has not the structure"),
    ],
)
def test_distance_refuses_trees_that_differ(b, weight, mask, words):
    with pytest.raises(ValueError, match=words):
        trees.weighted_squared_distance(A, b, weight=weight, mask=mask)


def test_dot_and_lerp_refuse_other_trees():
    for wrong in (lambda: trees.dot(A, {"x": B["x"]}), lambda: trees.lerp(A, {"x": B["x"]}, 0.5)):
        with pytest.raises(ValueError, match="b has not the structure of the tree"):
            wrong()


def test_size_in_bytes():
    assert trees.size_bytes({"a": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros((2, 2))}) == 6 + 16
    assert trees.size_bytes(jax.eval_shape(lambda: A)) == 12


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite(bad):
    tree = {"w": jnp.ones(3), "step": jnp.int32(1), "key": jax.random.key(0)}
    assert bool(jax.jit(trees.all_finite)(tree))
    assert not bool(jax.jit(trees.all_finite)(tree | {"w": jnp.array([1.0, bad, 0.0])}))
    assert bool(trees.all_finite({}))


def test_changes_name_the_leaves():
    assert trees.changes(A, A) == {}
    assert trees.changes(A, A | {"y": [jnp.array([[4.0]])]}) == {"y/0": "1 of 1 numbers changed"}
    assert trees.changes({"e": np.zeros((0, 3))}, {"e": np.zeros((0, 3))}) == {}
    assert trees.changes({"a": None}, {"a": None}) == {}
    assert trees.changes({"a": jnp.ones(2)}, {"a": None}) == {"a": "was float32[2], is NoneType[]"}
