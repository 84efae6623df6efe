import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jtl.penalties import features as formulas

KINDS = formulas.KINDS
features = jax.jit(formulas.features, static_argnames=("kind",))

OURS = jnp.array([[3.0, 4.0], [1.0, 1.0]])
REFERENCE = jnp.array([[1.0, 0.0], [1.0, -1.0]])
# In eighths: half of the smallest float is no longer one, and the vector loses its direction.
_EIGHTHS = st.integers(-800, 800).map(lambda number: number / 8)
VECTORS = arrays.arrays(np.float32, (2, 3, 4), elements=_EIGHTHS)


def test_by_hand():
    assert float(features(OURS, REFERENCE)) == (0.5 * (4 + 16) + 0.5 * 4) / 2
    assert float(features(OURS, REFERENCE, kind="cosine")) == pytest.approx((0.4 + 1) / 2, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_with_zero_gradient_at_the_reference(kind):
    value, gradient = jax.value_and_grad(lambda x: features(x, OURS, kind=kind))(OURS)
    assert float(value) == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)


@given(pair=VECTORS, scale=st.floats(0.5, 8.0))
@settings(deadline=None, max_examples=30)
def test_cosine_has_no_length_and_is_bounded(pair, scale):
    ours, reference = jnp.asarray(pair)
    value = float(features(ours, reference, kind="cosine"))
    assert 0.0 <= value <= 2.0 + 1e-5
    scaled = features(scale * ours, reference, kind="cosine")
    assert float(scaled) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_give_nothing_even_where_nan(kind):
    ours, reference = jax.random.normal(jax.random.key(0), (2, 2, 3, 4))
    mask = jnp.array([[True, True, False], [True, False, False]])
    bad = jnp.where(mask[..., None], ours, jnp.nan)
    call = lambda x, y: features(x, y, kind=kind, mask=mask)  # noqa: E731
    value, (gradient, other) = jax.value_and_grad(call, (0, 1))(bad, reference)
    expected = features(ours[mask], reference[mask], kind=kind)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_array_equal(gradient[~mask], 0.0)
    np.testing.assert_array_equal(other, 0.0)
    assert float(features(bad, reference, kind=kind, mask=jnp.zeros((2, 3), bool))) == 0.0


def test_cosine_of_zeros_and_of_large_vectors_is_finite():
    ours = jnp.array([[0.0, 0.0], [1e30, 1e30], [1e-30, 0.0]])
    reference = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: features(x, reference, kind="cosine"))(ours)
    assert float(value) == pytest.approx(0.5 / 3, rel=1e-5)
    assert np.all(np.isfinite(gradient))


def test_bfloat16_is_computed_in_float32():
    ours = jax.random.normal(jax.random.key(1), (5, 700)).astype(jnp.bfloat16)
    for kind in KINDS:
        exact = features(ours.astype(jnp.float32), jnp.ones((5, 700)), kind=kind)
        assert float(features(ours, jnp.ones((5, 700)), kind=kind)) == float(exact)


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="kind 'l1' of feature distance is not known"):
        features(OURS, REFERENCE, kind="l1")
