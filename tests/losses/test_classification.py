import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.losses.classification import cross_entropy

# softmax = (1/2, 1/4, 1/4), (1/8, 1/8, 3/4)
LOGITS = jnp.log(jnp.array([[2.0, 1.0, 1.0], [0.5, 0.5, 3.0]]))
LABELS = jnp.array([0, 1])
LN2, LN34 = math.log(2), math.log(4 / 3)


def values(result):
    return tuple(float(part) for part in result)


def test_by_hand():
    assert values(cross_entropy(LOGITS, LABELS)) == pytest.approx((LN2 + 3 * LN2, 2.0))


def test_adding_a_constant_to_the_logits_changes_nothing():
    shifted = cross_entropy(LOGITS + 1000.0, LABELS)
    assert values(shifted) == pytest.approx((4 * LN2, 2.0), rel=1e-4)


def test_smoothing_by_hand():
    total, weight = cross_entropy(LOGITS, LABELS, smoothing=0.3)
    # 0.7 own + 0.3 times the mean over classes of -log p
    expected = 0.7 * LN2 + 0.3 * 5 * LN2 / 3 + 0.7 * 3 * LN2 + 0.3 * (6 * LN2 + LN34) / 3
    assert values((total, weight)) == pytest.approx((expected, 2.0))


def test_class_weights_by_hand():
    weights = jnp.array([2.0, 0.5, 7.0])
    result = cross_entropy(LOGITS, LABELS, class_weights=weights)
    assert values(result) == pytest.approx((2 * LN2 + 0.5 * 3 * LN2, 2.5))


def test_weights_and_smoothing_together_by_hand():
    weights = jnp.array([2.0, 1.0, 4.0])
    total, weight = cross_entropy(LOGITS[:1], LABELS[:1], class_weights=weights, smoothing=0.3)
    expected = 0.7 * 2 * LN2 + 0.1 * (2 * LN2 + 1 * 2 * LN2 + 4 * 2 * LN2)
    assert values((total, weight)) == pytest.approx((expected, 2.0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_rows_give_no_loss_and_no_gradient_even_where_nan(smoothing):
    logits = jnp.concatenate([LOGITS, jnp.full((1, 3), jnp.nan)])
    labels, mask = jnp.array([0, 1, -1]), jnp.array([True, True, False])

    def total(logits):
        return cross_entropy(logits, labels, mask=mask, smoothing=smoothing)[0]

    np.testing.assert_allclose(
        total(logits), cross_entropy(LOGITS, LABELS, smoothing=smoothing)[0], rtol=1e-6
    )
    gradient = jax.grad(total)(logits)
    np.testing.assert_array_equal(gradient[2], 0.0)
    assert np.isfinite(gradient).all()
    assert float(cross_entropy(logits, labels, mask=mask)[1]) == 2.0


def test_sums_add_up_over_batches_of_unequal_size():
    weights = jnp.array([2.0, 0.5, 7.0])
    options = {"smoothing": 0.1, "class_weights": weights}
    whole = cross_entropy(LOGITS, LABELS, **options)
    parts = [cross_entropy(LOGITS[i : i + 1], LABELS[i : i + 1], **options) for i in (0, 1)]
    added = [sum(float(part[k]) for part in parts) for k in (0, 1)]
    assert added == pytest.approx(values(whole))


def test_tokens_have_more_leading_axes():
    logits, labels = LOGITS.reshape(1, 2, 3), LABELS.reshape(1, 2)
    assert values(cross_entropy(logits, labels)) == pytest.approx((4 * LN2, 2.0))


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.tile(jnp.zeros((1, 2), jnp.bfloat16), (3000, 1))
    total, _ = cross_entropy(logits, jnp.zeros(3000, jnp.int32))
    assert total.dtype == jnp.float32
    assert float(total) == pytest.approx(3000 * LN2, rel=1e-5)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes_is_nan_and_never_a_quiet_number(label):
    assert math.isnan(values(cross_entropy(LOGITS[:1], jnp.array([label])))[0])


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_outside_its_range(smoothing):
    with pytest.raises(ValueError, match="smoothing is a share.*take 0 <= smoothing < 1"):
        cross_entropy(LOGITS, LABELS, smoothing=smoothing)


@pytest.mark.parity
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_equal_to_pytorch(smoothing, weighted):
    import torch

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(7, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 7)
    weights = np.array([0.5, 1.0, 2.0, 3.0], np.float32)
    loss = torch.nn.CrossEntropyLoss(
        weight=torch.tensor(weights) if weighted else None, label_smoothing=smoothing
    )
    expected = loss(torch.tensor(logits), torch.tensor(labels)).item()
    total, weight = cross_entropy(
        jnp.asarray(logits),
        jnp.asarray(labels),
        smoothing=smoothing,
        class_weights=jnp.asarray(weights) if weighted else None,
    )
    assert float(total / weight) == pytest.approx(expected, rel=1e-6)
