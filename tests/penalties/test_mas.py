import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.penalties.mas import mas, output_importance

X = np.array([[1.0, 2.0], [-1.0, 0.5], [3.0, -1.0]], np.float32)
W = jnp.array([[0.5, -1.0], [1.0, 2.0]])


def linear(w, x):
    return x @ w


def by_hand():
    """Return the mean of |2 x_i f_j|, the gradient of ||x w||^2 with respect to w_ij."""
    gradients = [2 * np.outer(x, x @ np.asarray(W)) for x in X]
    return np.mean(np.abs(gradients), 0)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_importance_by_hand_for_every_batch(size):
    batches = [X[i : i + size] for i in range(0, 3, size)]
    np.testing.assert_allclose(output_importance(linear, W, batches), by_hand(), rtol=1e-5)


def test_it_is_not_the_absolute_value_of_the_mean_gradient():
    # x and -x give the gradients 2 w x^2 of one sign, +1 and -1 of the bias give opposite ones
    out = lambda p, x: p["w"] * x + p["b"]  # noqa: E731
    params = {"w": jnp.float32(2.0), "b": jnp.float32(0.0)}
    found = output_importance(out, params, [jnp.array([1.0, -1.0])])
    assert float(found["b"]) == 4.0  # |2 f| with f = 2 and -2; their mean is 0
    assert float(found["w"]) == 4.0


def test_held_leaves_are_holes_and_the_result_goes_in_as_it_is():
    params, mask = {"body": W, "head": jnp.ones(2)}, {"body": True, "head": False}
    out = lambda p, x: x @ p["body"] * p["head"]  # noqa: E731
    importance = output_importance(out, params, [X], mask=mask)
    assert importance["head"] is None
    np.testing.assert_allclose(importance["body"], by_hand(), rtol=1e-5)
    moved = {"body": W + 2.0, "head": jnp.zeros(2)}
    value = mas(moved, {"body": W, "head": None}, importance, mask=mask)
    assert float(value) == pytest.approx(4.0 * by_hand().sum(), rel=1e-5)


def test_penalty_by_hand_with_no_half_and_zero_at_the_anchor():
    params, anchor = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.0, 4.0])}
    importance = {"w": jnp.array([10.0, 0.5])}
    assert float(mas(params, anchor, importance)) == 12.0
    np.testing.assert_array_equal(jax.grad(mas)(params, anchor, importance)["w"], [20.0, -2.0])
    assert float(mas(anchor, anchor, importance)) == 0.0
