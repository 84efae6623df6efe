"""Binary cross entropy and mean average precision: by hand, and against known libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.losses.multi_label import binary_cross_entropy, mean_average_precision


def test_binary_cross_entropy_by_hand():
    logits = jnp.array([[np.log(3.0), 0.0], [50.0, -50.0]])
    labels = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    mask = jnp.array([True, False])
    total, count = binary_cross_entropy(logits, labels, mask=mask)
    assert float(total) == pytest.approx((np.log(4 / 3) + np.log(2)) / 2) and float(count) == 1
    weighted, _ = binary_cross_entropy(
        logits, labels, mask=mask, positive_weights=jnp.array([3.0, 9.0])
    )
    assert float(weighted) == pytest.approx((3 * np.log(4 / 3) + np.log(2)) / 2)
    gradient = jax.grad(lambda x: binary_cross_entropy(x, labels, mask=mask)[0])(logits)
    assert bool(jnp.isfinite(gradient).all()) and not gradient[1].any()


def test_average_precision_is_that_of_scikit_learn():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (40, 3)).astype(np.float32)  # ties on purpose
    labels = (rng.random((40, 3)) < 0.3).astype(np.float32)
    expected = average_precision_score(labels, scores, average="macro")
    assert mean_average_precision(scores, labels) == pytest.approx(expected)
    without = labels.copy()
    without[:, 1] = 0
    expected = average_precision_score(labels[:, [0, 2]], scores[:, [0, 2]], average="macro")
    assert mean_average_precision(scores, without) == pytest.approx(expected)
    with pytest.raises(ValueError, match="none of the 3 classes has an example among 40 rows"):
        mean_average_precision(scores, 0 * labels)


@pytest.mark.parity
def test_binary_cross_entropy_is_that_of_pytorch():
    import torch

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 3)).astype(np.float32) * 4
    labels = rng.integers(0, 2, (5, 3)).astype(np.float32)
    weights = np.array([1.0, 2.0, 5.0], np.float32)
    total, count = binary_cross_entropy(
        jnp.asarray(logits), jnp.asarray(labels), positive_weights=jnp.asarray(weights)
    )
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights))
    expected = loss(torch.tensor(logits), torch.tensor(labels)).item()
    assert float(total / count) == pytest.approx(expected, abs=1e-6)
