import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.penalties.ewc import Quadratic, decayed, ewc, merged
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


T1, T2, T3 = (
    {"body": jnp.array(body), "head": jnp.array(head)}
    for body, head in (([0.0, 4.0], [1.0]), ([1.0, -2.0], [3.0]), ([5.0, 0.5], [-1.0]))
)
F1, F2, F3 = (
    {"body": jnp.array(body), "head": jnp.array(head)}
    for body, head in (([10.0, 0.5], [2.0]), ([0.0, 4.0], [0.0]), ([1.0, 0.0], [6.0]))
)


def penalty(quadratic, params):
    return ewc(params, quadratic.anchor, quadratic.fisher) + quadratic.constant


def test_one_quadratic_has_the_value_and_the_gradient_of_the_sum_of_three():
    one = merged(merged(Quadratic(T1, F1, 0.0), T2, F2), T3, F3)
    explicit = lambda p: ewc(p, T1, F1) + ewc(p, T2, F2) + ewc(p, T3, F3)  # noqa: E731
    for params in (PARAMS, T1, T2, T3):
        value, gradient = jax.value_and_grad(explicit)(params)
        found, slope = jax.value_and_grad(lambda p: penalty(one, p))(params)
        np.testing.assert_allclose(found, value, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_merge_by_hand():
    # 3 (t - 1)^2 + 1 (t - 5)^2 = 4 (t - 2)^2 + 12, halved
    both = merged(Quadratic(jnp.float32(1.0), jnp.float32(3.0), 0.0), 5.0, 1.0)
    assert jax.tree.map(float, both) == Quadratic(2.0, 4.0, 6.0)


def test_what_no_task_informs_takes_the_newest_anchor_and_gives_no_nan():
    zero = jnp.zeros(1)
    both = merged(Quadratic(jnp.array([1.0]), zero, 0.0), jnp.array([7.0]), zero)
    assert both.anchor.tolist() == [7.0]
    assert float(penalty(both, jnp.array([100.0]))) == 0.0


def test_a_merge_of_many_tasks_stays_exact_in_float32():
    # Expanded around 0, the squares of 1000 would leave nothing of a distance of 0.01.
    # A unit in the last place of 1000 is 6e-5, of which the bound leaves room for one.
    anchors = 1000.0 + 0.01 * np.arange(50)
    both = Quadratic(jnp.array([anchors[0]]), jnp.ones(1), 0.0)
    for anchor in anchors[1:]:
        both = merged(both, jnp.array([anchor]), jnp.ones(1))
    expected = 0.5 * ((np.float32(anchors).astype(float) - 1000.25) ** 2).sum()
    assert float(penalty(both, jnp.array([1000.25]))) == pytest.approx(expected, rel=1e-2)


def test_leaves_that_only_one_of_the_tasks_covers_keep_its_own():
    first = Quadratic({"a": T1["body"], "b": None}, {"a": F1["body"], "b": None}, 0.0)
    new = {"a": None, "b": jnp.array([3.0])}
    both = merged(first, {"a": T2["body"], "b": T2["head"]}, new)
    assert both.anchor["a"] is T1["body"] and both.fisher["a"] is F1["body"]
    assert both.anchor["b"] is T2["head"] and float(both.constant) == 0.0
    online = decayed({"a": jnp.array(8.0), "b": None}, new, 0.25)
    assert float(online["a"]) == 2.0 and online["b"] is new["b"]


def test_online_information_by_hand():
    # 0.5 (0.5 4 + 2) + 1
    found = jnp.float32(4.0)
    for new in (2.0, 1.0):
        found = decayed(found, jnp.float32(new), 0.5)
    assert float(found) == 3.0


def test_trees_that_differ_are_an_error():
    with pytest.raises(ValueError, match=r"earlier\.anchor has not the structure"):
        merged(Quadratic({"body": T1["body"]}, F1, 0.0), T2, F2)
    with pytest.raises(ValueError, match="earlier has not the structure"):
        decayed({"body": F1["body"]}, F2, 0.5)
