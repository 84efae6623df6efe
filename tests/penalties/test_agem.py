import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import trees
from jtl.penalties import agem


def pair(seed, *, agree=False):
    """Return two random trees whose dot product has a given sign."""
    keys = jax.random.split(jax.random.key(seed), 4)
    g = {"a": jax.random.normal(keys[0], (3, 2)), "b": jax.random.normal(keys[1], (5,))}
    r = {"a": jax.random.normal(keys[2], (3, 2)), "b": jax.random.normal(keys[3], (5,))}
    sign = jnp.where((trees.dot(g, r) >= 0) == agree, 1.0, -1.0)
    return g, jax.tree.map(lambda x: sign * x, r)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_left_does_not_raise_the_reference(seed):
    g, r = pair(seed)
    found = agem.project(g, r)
    assert float(trees.dot(g, r)) < 0
    assert float(trees.dot(found, r)) == pytest.approx(0.0, abs=1e-5)
    # The nearest such gradient: what was taken off is along r.
    off = jax.tree.map(lambda a, b: a - b, g, found)
    cosine = float(trees.dot(off, r) / (trees.norm(off) * trees.norm(r)))
    assert cosine == pytest.approx(-1.0, abs=1e-5)
    again = agem.project(found, r)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, found)


@pytest.mark.parametrize("seed", range(4))
def test_gradients_that_agree_keep_their_bits(seed):
    g, r = pair(seed, agree=True)
    jax.tree.map(np.testing.assert_array_equal, agem.project(g, r), g)


def test_the_product_runs_over_the_whole_tree():
    # Leaf by leaf the first would be projected; over both the product is +1.
    g = {"a": jnp.array([1.0]), "b": jnp.array([2.0])}
    r = {"a": jnp.array([-1.0]), "b": jnp.array([1.0])}
    jax.tree.map(np.testing.assert_array_equal, agem.project(g, r), g)


def test_a_reference_of_zeros_is_safe():
    g = {"a": jnp.array([1.0, -0.0])}
    found = jax.jit(agem.project)(g, {"a": jnp.zeros(2)})
    np.testing.assert_array_equal(found["a"], g["a"])
    assert np.signbit(np.asarray(found["a"])[1])


def test_holes_and_dtypes_stay():
    g = {"a": jnp.array([1.0, 2.0], jnp.bfloat16), "hole": None}
    r = {"a": jnp.array([-1.0, 0.0], jnp.bfloat16), "hole": None}
    found = agem.project(g, r)
    assert found["hole"] is None and found["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["a"].astype(jnp.float32), [0.0, 2.0])


def test_as_a_transform_before_the_clip():
    tx = optax.chain(agem.projection(), optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    w, r = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([-1.0, 0.0])}
    updates, _ = tx.update(w, tx.init(w), w, reference_grads=r)
    np.testing.assert_allclose(updates["w"], [0.0, -1.0])


def test_trees_of_two_kinds_are_an_error():
    with pytest.raises(ValueError, match="structure"):
        agem.project({"a": jnp.ones(1)}, {"b": jnp.ones(1)})
