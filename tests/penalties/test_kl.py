import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.penalties.kl import kl

OURS = jnp.log(jnp.array([[0.8, 0.2], [0.5, 0.5]]))
REFERENCE = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.5]]))
FIRST = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)


def test_by_hand_is_the_mean_over_rows():
    assert float(kl(OURS, REFERENCE)) == pytest.approx(FIRST / 2, rel=1e-5)


def test_the_direction_is_reference_first():
    forward = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    assert float(kl(REFERENCE[:1], OURS[:1])) == pytest.approx(forward, rel=1e-5)


def test_temperature_by_hand():
    # at T = 2 the probabilities are those of square roots: sqrt(0.8) : sqrt(0.2) = 2 : 1
    expected = 4 * (0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3)))
    assert float(kl(OURS[:1], REFERENCE[:1], temperature=2.0)) == pytest.approx(expected, rel=1e-5)


def test_zero_at_the_reference_with_zero_gradient():
    logits = jnp.array([[3.0, -1.0, 0.5]])
    value, gradient = jax.value_and_grad(kl)(logits, logits)
    assert float(value) == 0.0
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)


def test_gradient_by_hand():
    # d/d logits of T^2 KL = T (softmax(ours / T) - softmax(reference / T)), over the number of rows
    gradient = jax.grad(lambda x: kl(x, REFERENCE, temperature=2.0))(OURS)
    np.testing.assert_allclose(gradient, [[1 / 6, -1 / 6], [0, 0]], atol=1e-6)


def test_temperature_squared_keeps_the_gradient_for_small_logits():
    small = 1e-2 * jnp.array([[1.0, -2.0, 1.5]])
    norms = [
        float(
            jnp.linalg.norm(jax.grad(lambda x, t=t: kl(x, jnp.zeros((1, 3)), temperature=t))(small))
        )
        for t in (1.0, 10.0)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_masked_rows_give_nothing_even_where_nan():
    mask = jnp.array([True, False])
    bad, reference = OURS.at[1].set(jnp.nan), REFERENCE.at[1].set(jnp.nan)
    value, gradient = jax.value_and_grad(lambda x: kl(x, reference, mask=mask))(bad)
    assert float(value) == pytest.approx(FIRST, rel=1e-5)
    np.testing.assert_array_equal(gradient[1], 0.0)
    assert float(kl(bad, REFERENCE, mask=jnp.zeros(2, bool))) == 0.0


def test_a_class_that_the_reference_rules_out():
    reference = jnp.array([[0.0, -jnp.inf]])
    value, gradient = jax.value_and_grad(kl)(jnp.zeros((1, 2)), reference)
    assert float(value) == pytest.approx(math.log(2), rel=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5, 0.5]], rtol=1e-6)


def test_bfloat16_logits_give_float32():
    assert kl(OURS.astype(jnp.bfloat16), REFERENCE.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(ValueError, match="take T > 0"):
        kl(OURS, REFERENCE, temperature=temperature)
