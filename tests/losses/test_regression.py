import jax
import jax.numpy as jnp
import numpy as np

from jtl.losses.regression import squared_error


def test_by_hand_and_in_parts():
    predictions, targets = jnp.array([1.0, 2.0, -3.0]), jnp.array([0, 4, 0])
    total, weight = squared_error(predictions, targets)
    assert (float(total), float(weight)) == (1 + 4 + 9, 3.0)
    head, tail = (
        squared_error(predictions[:1], targets[:1]),
        squared_error(predictions[1:], targets[1:]),
    )
    assert (float(head[0] + tail[0]), float(head[1] + tail[1])) == (14.0, 3.0)


def test_masked_rows_give_no_loss_and_no_gradient_even_where_nan():
    mask, targets = jnp.array([True, False]), jnp.array([1.0, jnp.nan])

    def total(predictions):
        return squared_error(predictions, targets, mask=mask)[0]

    predictions = jnp.array([3.0, jnp.nan])
    assert float(total(predictions)) == 4.0
    np.testing.assert_array_equal(jax.grad(total)(predictions), [4.0, 0.0])
    assert float(squared_error(predictions, targets, mask=mask)[1]) == 1.0


def test_bfloat16_predictions_are_summed_in_float32():
    total, weight = squared_error(jnp.ones(1000, jnp.bfloat16), jnp.zeros(1000))
    assert total.dtype == weight.dtype == jnp.float32
    assert float(total) == 1000.0
