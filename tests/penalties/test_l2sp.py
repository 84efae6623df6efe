import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.penalties.l2sp import l2_sp

PARAMS = {"body": jnp.array([1.0, 2.0]), "head": jnp.array([9.0])}
ANCHOR = {"body": jnp.array([0.0, 4.0]), "head": jnp.array([0.0])}


def test_by_hand_and_zero_at_the_anchor():
    assert float(l2_sp(PARAMS, ANCHOR)) == 0.5 * (1 + 4 + 81)
    assert float(l2_sp(ANCHOR, ANCHOR)) == 0.0


def test_gradient_is_the_distance_and_none_comes_from_masked_leaves():
    np.testing.assert_array_equal(jax.grad(l2_sp)(PARAMS, ANCHOR)["body"], [1.0, -2.0])
    mask = {"body": True, "head": False}
    anchor = {"body": ANCHOR["body"], "head": None}
    value, gradient = jax.value_and_grad(lambda p: l2_sp(p, anchor, mask=mask))(PARAMS)
    assert float(value) == 2.5
    np.testing.assert_array_equal(gradient["head"], 0.0)


def test_a_fresh_head_without_a_mask_is_an_error():
    with pytest.raises(ValueError, match="only the tree has 'head'"):
        l2_sp(PARAMS, {"body": ANCHOR["body"]})


def test_bfloat16_leaves_are_summed_in_float32():
    value = l2_sp({"w": jnp.ones(1000, jnp.bfloat16)}, {"w": jnp.zeros(1000, jnp.bfloat16)})
    assert value.dtype == jnp.float32
    assert float(value) == 500.0
