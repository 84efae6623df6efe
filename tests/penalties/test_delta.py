import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jtl.penalties.delta import channel_weights, delta

FEATURES = jnp.array([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
REFERENCE = jnp.array([[[1.0, 0.0], [3.0, 4.0]], [[5.0, 6.0], [3.0, 8.0]]])
WEIGHTS = jnp.array([0.25, 0.75])


def test_by_hand_is_a_mean_over_examples_and_positions():
    # channel 0 differs by 4 once, channel 1 by 2 once, of 4 positions
    assert float(delta(FEATURES, REFERENCE, WEIGHTS)) == 0.25 * 16 / 4 + 0.75 * 4 / 4


def test_its_size_does_not_depend_on_batch_or_image():
    # A sum, as TLL has it, is twice as much in each of these.
    once = float(delta(FEATURES, REFERENCE, WEIGHTS))
    for axis in (0, 1):
        twice = (jnp.concatenate([x, x], axis=axis) for x in (FEATURES, REFERENCE))
        assert float(delta(*twice, WEIGHTS)) == pytest.approx(once, rel=1e-6)


def test_zero_with_zero_gradient_at_the_start():
    value, gradient = jax.value_and_grad(delta)(FEATURES, FEATURES, WEIGHTS)
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_gradient_reaches_the_features_alone():
    gradient, other = jax.grad(delta, (0, 1))(FEATURES, REFERENCE, WEIGHTS)
    np.testing.assert_allclose(gradient, 2 * WEIGHTS[None, None] * (FEATURES - REFERENCE) / 4)
    np.testing.assert_array_equal(other, 0.0)


def test_padding_gives_nothing_even_where_nan():
    mask = jnp.array([[True, False], [True, True]])
    bad = FEATURES.at[0, 1].set(jnp.nan)
    value, gradient = jax.value_and_grad(lambda x: delta(x, REFERENCE, WEIGHTS, mask=mask))(bad)
    assert float(value) == pytest.approx(0.25 * 16 / 3 + 0.75 * 4 / 3)
    np.testing.assert_array_equal(gradient[0, 1], 0.0)
    assert float(delta(bad, REFERENCE, WEIGHTS, mask=jnp.zeros((2, 2), bool))) == 0.0


def test_bfloat16_features_are_computed_in_float32():
    low = FEATURES.astype(jnp.bfloat16)
    assert delta(low, REFERENCE, WEIGHTS).dtype == jnp.float32
    assert float(delta(low, REFERENCE, WEIGHTS)) == float(delta(FEATURES, REFERENCE, WEIGHTS))


def test_channel_weights_by_hand():
    losses = jnp.log(jnp.array([2.0, 6.0, 4.0]))
    np.testing.assert_allclose(
        channel_weights(losses, jnp.float32(0.1)), [2 / 12, 6 / 12, 4 / 12], rtol=1e-6
    )
    # standardised: mean 2, deviation sqrt(2/3), so -+ sqrt(3/2), times 2
    found = channel_weights(jnp.array([1.0, 2.0, 3.0]), jnp.float32(0.5), spread=2.0)
    parts = np.exp(np.array([-2.0, 0.0, 2.0]) * np.sqrt(1.5))
    np.testing.assert_allclose(found, parts / parts.sum(), rtol=1e-5)


@given(
    rises=arrays.arrays(np.float32, 6, elements=st.floats(-0.125, 1.0, width=32)),
    scale=st.floats(0.01, 100),
)
@settings(deadline=None, max_examples=30)
def test_channel_weights_are_a_distribution_and_spread_has_no_unit(rises, scale):
    rises = jnp.asarray(rises)
    found = channel_weights(rises + 0.5, jnp.float32(0.5), spread=0.2)
    assert float(found.sum()) == pytest.approx(1.0, rel=1e-5)
    worst, best = np.argmin(rises + 0.5), np.argmax(rises + 0.5)
    assert found[worst] <= found[best]
    if float(rises.std()) > 1e-2:  # rounding is little beside it
        again = channel_weights(scale * rises, jnp.float32(0.0), spread=0.2)
        np.testing.assert_allclose(found, again, rtol=1e-3)


def test_channels_that_are_all_alike_weigh_alike():
    np.testing.assert_allclose(
        channel_weights(jnp.full(4, 0.3), jnp.float32(0.3), spread=0.2), 0.25
    )
