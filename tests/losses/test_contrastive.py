"""Losses of pairs: masked pairs are as if they were not there, and give no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.losses.contrastive import contrastive, sigmoid_pairs

LOSSES = pytest.mark.parametrize("loss", [contrastive, sigmoid_pairs])
SCORES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
KEPT = jnp.array([True, False, True, True])


@LOSSES
def test_masked_pairs_are_as_if_they_were_not_there(loss):
    whole = jnp.where(KEPT[:, None] & KEPT[None, :], SCORES, jnp.nan)
    total, weight = loss(whole, KEPT)
    rows = jnp.array([0, 2, 3])
    expected, count = loss(SCORES[rows][:, rows])
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert float(weight) == float(count) == 3.0
    gradient = jax.grad(lambda scores: loss(scores, KEPT)[0])(whole)
    assert bool(jnp.isfinite(gradient).all())
    assert float(jnp.abs(gradient[1]).sum() + jnp.abs(gradient[:, 1]).sum()) == 0.0
    assert float(loss(whole, jnp.zeros(4, bool))[0]) == 0.0


def test_values_by_hand():
    # Equal scores: each pair is one of four candidates, each pairing a coin.
    total, _ = contrastive(jnp.zeros((4, 4)))
    np.testing.assert_allclose(total, 4 * np.log(4.0), rtol=1e-6)
    total, _ = sigmoid_pairs(jnp.zeros((4, 4)))
    np.testing.assert_allclose(total, 16 * np.log(2.0), rtol=1e-6)
    only_row = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]]))
    np.testing.assert_allclose(contrastive(only_row)[0], contrastive(only_row.T)[0], rtol=1e-6)
