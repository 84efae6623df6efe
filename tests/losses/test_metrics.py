import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, f1_score

from jtl.losses import metrics


def probable(*rows):
    return jnp.log(jnp.array(rows))


# predictions 0, 1, 1, 2; labels 0, 0, 1, 2
LOGITS = probable([0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.05, 0.9, 0.05], [0.1, 0.1, 0.8])
LABELS = jnp.array([0, 0, 1, 2])
REAL = jnp.array([True, True, True, False])


def test_accuracy_by_hand_with_and_without_the_mask():
    assert tuple(map(int, metrics.accuracy_sums(LOGITS, LABELS))) == (3, 4)
    assert tuple(map(int, metrics.accuracy_sums(LOGITS, LABELS, mask=REAL))) == (2, 3)


def test_confusion_by_hand_with_and_without_the_mask():
    table = metrics.confusion(LOGITS, LABELS, 3)
    assert table.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    masked = metrics.confusion(LOGITS, LABELS, 3, mask=REAL)
    assert masked.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_confusion_does_not_count_labels_outside_the_classes():
    assert metrics.confusion(LOGITS[:2], jnp.array([-1, 3]), 3).sum() == 0


def test_confusion_refuses_logits_of_other_classes():
    with pytest.raises(ValueError, match="logits have 3 columns for 4 classes"):
        metrics.confusion(LOGITS, LABELS, 4)


def test_macro_f1_by_hand():
    # f1 per class: 2/3, 2/3, 1
    table = metrics.confusion(LOGITS, LABELS, 3)
    assert float(metrics.macro_f1(table)) == pytest.approx(7 / 9)


def test_macro_f1_leaves_out_a_class_that_never_occurs():
    # class 2 is neither label nor prediction
    table = jnp.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    assert float(metrics.macro_f1(table)) == pytest.approx(2 / 3)
    assert float(metrics.macro_f1(jnp.zeros((2, 2), jnp.int32))) == 0.0


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20)


@settings(deadline=None, max_examples=40)
@given(pairs, st.integers(1, 20))
def test_figures_equal_scikit_learn_however_the_batches_are_cut(rows, cut):
    labels, predicted = (np.array(column) for column in zip(*rows, strict=True))
    logits = jnp.asarray(np.eye(4)[predicted], jnp.float32)
    table = sum(
        metrics.confusion(logits[part], jnp.asarray(labels[part]), 4)
        for part in (slice(None, cut), slice(cut, None))
    )
    np.testing.assert_array_equal(table, confusion_matrix(labels, predicted, labels=range(4)))
    expected = f1_score(labels, predicted, average="macro", zero_division=0.0)
    assert float(metrics.macro_f1(table)) == pytest.approx(expected, abs=1e-6)


def test_calibration_by_hand():
    # confidences 0.6 (right), 0.7 (wrong), 0.9 and 0.8 (right)
    sums = metrics.calibration_sums(LOGITS, LABELS, bins=4)
    assert sums.count.tolist() == [0, 0, 2, 2]
    assert sums.correct.tolist() == [0, 0, 1, 2]
    np.testing.assert_allclose(sums.confidence, [0, 0, 1.3, 1.7], rtol=1e-5)
    # (|1 - 1.3| + |2 - 1.7|) / 4
    assert float(metrics.calibration_error(sums)) == pytest.approx(0.15)


def test_a_confidence_on_the_border_of_two_bins_is_in_the_lower_one():
    assert metrics.calibration_sums(jnp.zeros((1, 2)), LABELS[:1], bins=2).count.tolist() == [1, 0]


def test_calibration_sums_add_up_and_skip_masked_rows():
    whole = metrics.calibration_sums(LOGITS, LABELS, mask=REAL)
    parts = [metrics.calibration_sums(LOGITS[i : i + 1], LABELS[i : i + 1]) for i in range(3)]
    added = jax.tree.map(lambda *bins: sum(bins), *parts)
    for ours, theirs in zip(added, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    nan = metrics.calibration_sums(LOGITS.at[3].set(jnp.nan), LABELS, mask=REAL)
    assert float(metrics.calibration_error(nan)) == float(metrics.calibration_error(whole))


def test_a_certain_and_right_classifier_is_calibrated():
    sums = metrics.calibration_sums(100 * jnp.eye(3), jnp.arange(3))
    assert float(metrics.calibration_error(sums)) == 0.0
    assert float(sums.count[-1]) == 3


def test_class_weights_balance_the_sum():
    counts = np.array([10, 30, 60])
    weights = metrics.class_weights(counts)
    np.testing.assert_allclose(weights, [100 / 30, 100 / 90, 100 / 180], rtol=1e-6)
    np.testing.assert_allclose(weights * counts, 100 / 3, rtol=1e-6)


def test_class_weights_refuse_a_class_without_examples():
    with pytest.raises(ValueError, match=r"classes \[1\] have no examples.*\[3, 0, 2\]"):
        metrics.class_weights(np.array([3, 0, 2]))
