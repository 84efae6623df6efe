import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.penalties.ewc import ewc
from jtl.penalties.fisher import fisher_diagonal
from jtl.penalties.l2sp import l2_sp

PARAMS = {"body": jnp.array([1.0, 2.0]), "head": jnp.array([9.0])}
ANCHOR = {"body": jnp.array([0.0, 4.0]), "head": jnp.array([0.0])}
FISHER = {"body": jnp.array([10.0, 0.5]), "head": jnp.array([2.0])}
MASK = {"body": True, "head": False}


def test_by_hand_and_zero_at_the_anchor():
    assert float(ewc(PARAMS, ANCHOR, FISHER)) == 0.5 * (10 + 2 + 162)
    assert float(ewc(ANCHOR, ANCHOR, FISHER)) == 0.0


def test_gradient_is_fisher_times_distance():
    gradient = jax.grad(ewc)(PARAMS, ANCHOR, FISHER)
    np.testing.assert_array_equal(gradient["body"], [10.0, -1.0])


def test_it_is_l2_sp_where_all_weights_are_one():
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    assert float(ewc(PARAMS, ANCHOR, ones)) == float(l2_sp(PARAMS, ANCHOR))


def test_masked_leaves_stay_out_and_may_be_holes():
    holes = {"body": FISHER["body"], "head": None}
    value, gradient = jax.value_and_grad(lambda p: ewc(p, ANCHOR, holes, mask=MASK))(PARAMS)
    assert float(value) == 6.0
    np.testing.assert_array_equal(gradient["head"], 0.0)
    with pytest.raises(ValueError, match="leaf 'head' has the shapes"):
        ewc(PARAMS, ANCHOR, holes)


def test_the_result_of_fisher_diagonal_goes_in_as_it_is():
    def log_prob(params, example, label):
        logits = params["head"] * jnp.dot(params["body"], example)
        return jax.nn.log_softmax(jnp.array([0.0, 1.0]) * logits)[label]

    batches = [(jnp.array([[1.0, 0.0], [0.0, 1.0]]), None)]
    anchor = {"body": jnp.zeros(2), "head": jnp.array(2.0)}
    fisher = fisher_diagonal(log_prob, anchor, batches, labels="exact", classes=2, mask=MASK)
    # at zero logits p = 1/2: (head x / 2)^2 = 1 for the one example that has the feature, of two
    np.testing.assert_allclose(fisher["body"], [0.5, 0.5], rtol=1e-6)
    moved = {"body": jnp.array([2.0, 0.0]), "head": jnp.array(7.0)}
    assert float(ewc(moved, anchor, fisher, mask=MASK)) == pytest.approx(1.0)
