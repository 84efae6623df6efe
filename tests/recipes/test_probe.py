"""The probe against scikit-learn, and its choice of strength."""

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge

from jtl.recipes.probe import fit_probe


def _blobs(rows: int, dim: int = 8, seed: int = 0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, dim)) * np.arange(1, dim + 1)
    labels = (features @ np.linspace(1, -1, dim) + rng.normal(size=rows) * 8 > 0).astype(int)
    return features, labels


def test_one_strength_is_logistic_regression():
    features, labels = _blobs(300)
    probe = fit_probe(
        features, labels, outputs=2, choose=lambda _: 0.0, validation=features, strengths=(0.1,)
    )
    scaled = (features - probe.mean) / probe.scale
    # two softmax columns w, -w carry the penalty twice for half the margin: C = 2 / (n strength)
    peer = LogisticRegression(C=2 / (300 * 0.1), tol=1e-8, max_iter=5000).fit(scaled, labels)
    logits = probe(features)
    np.testing.assert_allclose(
        logits[:, 1] - logits[:, 0], peer.decision_function(scaled), atol=2e-2
    )


def test_regression_is_ridge():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(200, 4))
    target = features @ np.array([1.0, -2.0, 0.5, 0.0]) + 3.0
    probe = fit_probe(
        features, target, outputs=0, choose=lambda _: 0.0, validation=features, strengths=(0.5,)
    )
    scaled = (features - probe.mean) / probe.scale
    peer = Ridge(alpha=0.5 * 200).fit(scaled, target)
    np.testing.assert_allclose(probe(features)[:, 0], peer.predict(scaled), atol=1e-2)


def test_strength_is_chosen_on_validation_data_alone():
    features, labels = _blobs(60)
    held, truth = _blobs(400, seed=1)
    figures = []

    def accuracy(logits):
        figures.append(float((logits.argmax(1) == truth).mean()))
        return figures[-1]

    probe = fit_probe(features, labels, outputs=2, choose=accuracy, validation=held)
    assert float((probe(held).argmax(1) == truth).mean()) == max(figures)
