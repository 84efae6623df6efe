"""Losses and figures of maps: values by hand, what does not count, parity with PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.losses.classification import cross_entropy
from jtl.losses.dense import OverlapSums, counted, dice_loss, mean_iou, overlap_sums


def _maps(seed=0, classes=3):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(size=(2, 4, 5, classes)), jnp.float32)
    labels = rng.integers(0, classes, (2, 4, 5))
    labels[0, 0] = 255
    return logits, jnp.asarray(labels, jnp.int32)


def test_places_to_ignore_and_rows_of_padding_do_not_count():
    labels = jnp.array([[[0, 255]], [[1, 1]]])
    assert counted(labels).tolist() == [[[True, False]], [[True, True]]]
    mask = jnp.array([True, False])
    assert counted(labels, mask=mask).tolist() == [[[True, False]], [[False, False]]]
    assert counted(labels, None).all() and not counted(labels, 1)[1].any()


def test_dice_by_hand():
    # Two places of class 0 and 1, both said to be 0 with certainty: 2 1 / (2 + 1) and 0 / 1.
    logits = jnp.array([[[50.0, 0.0], [50.0, 0.0]]])
    total, count = dice_loss(logits, jnp.array([[0, 1]]), epsilon=0.0)
    np.testing.assert_allclose(total, 1 - (2 / 3 + 0) / 2, rtol=1e-6)
    assert count == 1
    # Right and sure is no loss, and a class that is nowhere does not spoil it.
    right = jnp.array([[[50.0, 0.0, 0.0], [50.0, 0.0, 0.0]]])
    assert float(dice_loss(right, jnp.array([[0, 0]]))[0]) < 1e-6


def test_masked_places_change_neither_dice_nor_its_gradient():
    logits, labels = _maps()
    mask = counted(labels)
    own = dice_loss(logits[:, 1:], labels[:, 1:])
    rest = dice_loss(logits[:1, 1:], labels[:1, 1:])
    both = dice_loss(logits, labels, mask=mask)
    alone = dice_loss(logits[1:], labels[1:])
    np.testing.assert_allclose(both[0], rest[0] + alone[0], rtol=1e-5)
    assert own[1] == both[1] == 2
    broken = logits.at[0, 0].set(jnp.nan)
    value, gradient = jax.value_and_grad(lambda x: dice_loss(x, labels, mask=mask)[0])(broken)
    np.testing.assert_allclose(value, both[0], rtol=1e-6)
    assert not gradient[0, 0].any() and jnp.isfinite(gradient).all() and gradient[1].any()
    empty = dice_loss(logits, labels, mask=jnp.zeros_like(mask))
    assert float(empty[0]) == 0.0 and float(empty[1]) == 0.0


def test_overlaps_add_up_and_give_the_mean_iou():
    logits, labels = _maps()
    mask = counted(labels)
    whole = overlap_sums(logits, labels, mask=mask)
    parts = [
        overlap_sums(logits[i : i + 1], labels[i : i + 1], mask=mask[i : i + 1]) for i in (0, 1)
    ]
    added = OverlapSums(*(a + b for a, b in zip(*parts, strict=True)))
    jax.tree.map(np.testing.assert_array_equal, whole, added)
    guess, truth = np.argmax(logits, -1)[np.asarray(mask)], np.asarray(labels)[np.asarray(mask)]
    shares = [
        np.sum((guess == c) & (truth == c)) / np.sum((guess == c) | (truth == c)) for c in range(3)
    ]
    np.testing.assert_allclose(mean_iou(whole), np.mean(shares), rtol=1e-6)


def test_a_class_that_is_nowhere_stays_out_of_the_mean():
    sums = OverlapSums(jnp.array([3.0, 0.0, 1.0]), jnp.array([4.0, 0.0, 4.0]))
    assert float(mean_iou(sums)) == 0.5
    assert float(mean_iou(OverlapSums(jnp.zeros(2), jnp.zeros(2)))) == 0.0


@pytest.mark.parity
def test_cross_entropy_over_maps_is_pytorchs():
    import torch

    logits, labels = _maps()
    weights = np.array([0.5, 1.0, 2.0], np.float32)

    def mean(logits):
        total, weight = cross_entropy(
            logits, labels, mask=counted(labels), class_weights=jnp.asarray(weights)
        )
        return total / weight

    value, gradient = jax.value_and_grad(mean)(logits)
    theirs = torch.tensor(np.array(logits)).permute(0, 3, 1, 2).requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        theirs, torch.tensor(np.array(labels)).long(), torch.tensor(weights), ignore_index=255
    )
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.permute(0, 2, 3, 1).numpy(), atol=1e-7)
