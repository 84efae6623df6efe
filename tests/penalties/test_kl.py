import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jtl.penalties import kl as formulas

STATIC = ("temperature", "direction")
kl = jax.jit(formulas.kl, static_argnames=STATIC)  # one compile, not one for each operation
kl_top_k = jax.jit(formulas.kl_top_k, static_argnames=STATIC)
top_k = jax.jit(formulas.top_k, static_argnames=("k", "temperature"))

OURS = jnp.log(jnp.array([[0.8, 0.2], [0.5, 0.5]]))
REFERENCE = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.5]]))
LOGITS = arrays.arrays(np.float32, (2, 5), elements=st.floats(-20, 20, width=32))
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


DIRECTIONS = ("forward", "reverse", "js")
P, Q = np.array([0.8, 0.2]), np.array([0.5, 0.5])
BY_HAND = {
    "forward": 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2),
    "reverse": 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5),
    "js": (  # the mixture is 0.65, 0.35
        0.5 * (0.5 * math.log(0.5 / 0.65) + 0.5 * math.log(0.5 / 0.35))
        + 0.5 * (0.8 * math.log(0.8 / 0.65) + 0.2 * math.log(0.2 / 0.35))
    ),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_direction_by_hand(direction):
    value = kl(jnp.log(P), jnp.log(Q), direction=direction)
    assert float(value) == pytest.approx(BY_HAND[direction], rel=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_at_a_high_temperature_it_is_a_squared_logit_difference(direction):
    ours = jnp.array([[2.0, -1.0, 0.5, 0.0], [0.0, 3.0, 1.0, -2.0]])
    reference = jnp.array([[-1.0, 0.0, 1.0, 2.0], [1.0, 1.0, 0.0, 0.0]])
    rows, classes = ours.shape

    def squared(x):
        gap = x - reference
        gap = gap - jnp.mean(gap, axis=1, keepdims=True)
        return jnp.sum(gap**2) / (2 * classes * rows)

    scale = 0.25 if direction == "js" else 1.0
    found = jax.grad(lambda x: kl(x, reference, temperature=300.0, direction=direction))(ours)
    np.testing.assert_allclose(found, scale * jax.grad(squared)(ours), rtol=0.02, atol=1e-3)


@given(pair=LOGITS, temperature=st.sampled_from([0.5, 4.0]))
@settings(deadline=None, max_examples=40)
def test_js_is_symmetric_and_bounded(pair, temperature):
    one, other = (jnp.asarray(x)[None] for x in pair)
    value = float(kl(one, other, temperature=temperature, direction="js"))
    back = float(kl(other, one, temperature=temperature, direction="js"))
    bound = temperature**2 * math.log(2)
    assert value == pytest.approx(back, abs=1e-5 * bound)
    assert -1e-6 * bound <= value <= bound * (1 + 1e-6)
    assert float(kl(one, one, temperature=temperature, direction="js")) == 0.0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_are_those_of_differences(direction):
    key = jax.random.key(3)
    ours, reference = jax.random.normal(key, (2, 3, 4))
    call = lambda x: kl(x, reference, temperature=1.5, direction=direction)  # noqa: E731
    gradient, step = jax.grad(call)(ours), 1e-2
    for place in ((0, 1), (2, 3)):
        moved = jnp.zeros_like(ours).at[place].set(step)
        slope = (call(ours + moved) - call(ours - moved)) / (2 * step)
        assert float(gradient[place]) == pytest.approx(float(slope), abs=1e-3)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [0.1, 5.0])
def test_gradients_are_finite_everywhere(direction, temperature):
    inf, high = jnp.inf, 3e38
    ours = jnp.array([[0.0, 1.0, 2.0], [high, -high, 0.0], [0.0, 0.0, 0.0], [-1e30, 1e30, 0.0]])
    reference = jnp.array(
        [[-inf, 0.0, 0.0], [-high, high, 0.0], [0.0, -inf, -inf], [1e4, 0.0, 5.0]]
    )
    for columns in ((reference,), top_k(reference, 2, temperature=temperature)):
        formula = kl if len(columns) == 1 else kl_top_k
        call = lambda x, f=formula, c=columns: f(  # noqa: E731
            x, *c, temperature=temperature, direction=direction
        )
        assert np.all(np.isfinite(jax.grad(call)(ours)))
        assert np.all(np.isfinite(jax.grad(call)(ours.at[0].set(jnp.array([0.0, -inf, 0.0])))))


@pytest.mark.parametrize("direction", ["reverse", "js"])
def test_mass_where_the_reference_has_none_is_driven_away(direction):
    reference = jnp.array([[0.0, -jnp.inf]])
    value, gradient = jax.value_and_grad(lambda x: kl(x, reference, direction=direction))(
        jnp.zeros((1, 2))
    )
    least = math.log(np.finfo(np.float32).tiny)
    # mixture 3/4, 1/4: 1/2 log(4/3) + 1/2 (1/2 log(2/3) + 1/2 log 2)
    js = 0.5 * math.log(4 / 3) + 0.25 * (math.log(2 / 3) + math.log(2))
    expected = {"reverse": math.log(0.5) - 0.5 * least, "js": js}
    assert float(value) == pytest.approx(expected[direction], rel=1e-5)
    assert float(gradient[0, 1]) > 0.1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_masked_tokens_and_the_reference_give_no_gradient(direction):
    key = jax.random.key(0)
    ours, reference = jax.random.normal(key, (2, 2, 3, 5))
    mask = jnp.array([[True, True, False], [True, False, False]])
    real = kl(ours[mask], reference[mask], direction=direction)
    bad = jnp.where(mask[..., None], ours, jnp.nan)

    def call(ours, reference):
        return kl(ours, reference, direction=direction, mask=mask)

    value, (gradient, other) = jax.value_and_grad(call, (0, 1))(bad, reference)
    assert float(value) == pytest.approx(float(real), rel=1e-5)
    np.testing.assert_array_equal(gradient[~mask], 0.0)
    np.testing.assert_array_equal(other, 0.0)
    whole, likeliest = top_k(reference, 2)
    spoilt = likeliest.at[1, 2].set(-7)
    value, gradient = jax.value_and_grad(
        lambda x: kl_top_k(x, whole, spoilt, direction=direction, mask=mask)
    )(bad)
    expected = kl_top_k(ours[mask], whole[mask], likeliest[mask], direction=direction)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_array_equal(gradient[~mask], 0.0)


def test_bfloat16_is_computed_in_float32():
    ours, reference = jax.random.normal(jax.random.key(1), (2, 4, 3000)).astype(jnp.bfloat16)
    for direction in DIRECTIONS:
        exact = kl(*(x.astype(jnp.float32) for x in (ours, reference)), direction=direction)
        assert float(kl(ours, reference, direction=direction)) == float(exact)


def test_top_k_by_hand_is_one_bucket_more():
    reference = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
    ours = jnp.log(jnp.array([[0.25, 0.25, 0.25, 0.25]]))
    kept = top_k(reference, 2)
    np.testing.assert_array_equal(kept.classes, [[1, 3]])
    np.testing.assert_allclose(jnp.exp(kept.log_probabilities), [[0.4, 0.3, 0.3]], rtol=1e-6)
    expected = 0.4 * math.log(0.4 / 0.25) + 0.3 * math.log(0.3 / 0.25) + 0.3 * math.log(0.3 / 0.5)
    assert float(kl_top_k(ours, *kept)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("direction", ["forward", "js"])
def test_all_classes_kept_is_the_full_divergence_with_its_gradient(direction):
    ours, reference = 3 * jax.random.normal(jax.random.key(2), (2, 5, 7))
    reference = reference.at[0, 2].set(-jnp.inf)
    options = {"temperature": 2.0, "direction": direction}
    kept = top_k(reference, 7, temperature=2.0)
    full = jax.value_and_grad(lambda x: kl(x, reference, **options))(ours)
    found = jax.value_and_grad(lambda x: kl_top_k(x, *kept, **options))(ours)
    for one, other in zip(full, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@given(pair=LOGITS, direction=st.sampled_from(DIRECTIONS))
@settings(deadline=None, max_examples=20)
def test_a_bucket_hides_and_never_adds(pair, direction):
    ours, reference = (jnp.asarray(x)[None] for x in pair)
    values = [float(kl_top_k(ours, *top_k(reference, k), direction=direction)) for k in (1, 3)]
    full = float(kl(ours, reference, direction=direction))
    for one, other in zip(values, [*values[1:], full], strict=True):
        assert -1e-5 <= one <= other + 1e-5 + 1e-5 * abs(other)


def test_wrong_options_say_what_to_take():
    with pytest.raises(ValueError, match="direction 'backward' is not known; take one of"):
        kl(OURS, REFERENCE, direction="backward")
    with pytest.raises(ValueError, match="k=3 classes are to be kept, and there are 2"):
        top_k(REFERENCE, 3)
    kept = top_k(REFERENCE, 1)
    with pytest.raises(ValueError, match="1 entries for 1 classes; it must have one more"):
        kl_top_k(OURS, kept.log_probabilities[..., :1], kept.classes)
