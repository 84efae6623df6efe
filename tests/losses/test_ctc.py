"""CTC: values by hand, paddings, impossible rows, parity with PyTorch."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.losses.ctc import ctc, needed_frames


def _by_paths(logits, labels, blank):
    """-log of the sum over every path that collapses to the labels."""
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    total = 0.0
    for path in itertools.product(range(p.shape[1]), repeat=len(p)):
        collapsed = [k for k, _ in itertools.groupby(path) if k != blank]
        if collapsed == list(labels):
            total += math.prod(p[t, k] for t, k in enumerate(path))
    return -math.log(total)


def _logits(n=3, frames=4, size=3, seed=0):
    return np.random.default_rng(seed).normal(size=(n, frames, size)).astype(np.float32)


@pytest.mark.parametrize("blank", [0, 2])
def test_it_is_the_sum_over_paths(blank):
    logits = _logits()
    other = 1 if blank == 2 else 2
    labels = np.array([[1 - bool(blank), -100], [other, other], [-100, -100]])
    labels[0, 0] = 0 if blank else 1
    expected = [
        _by_paths(row, [label for label in own if label >= 0], blank)
        for row, own in zip(logits, labels, strict=True)
    ]
    total, weight = ctc(jnp.asarray(logits), jnp.asarray(labels), blank=blank)
    assert float(weight) == 3
    np.testing.assert_allclose(float(total), sum(expected), rtol=1e-5)
    each, _ = ctc(jnp.asarray(logits), jnp.asarray(labels), blank=blank, per="label")
    divided = expected[0] + expected[1] / 2 + expected[2]
    np.testing.assert_allclose(float(each), divided, rtol=1e-5)


def test_padding_frames_do_not_count():
    logits, labels = jnp.asarray(_logits(1)), jnp.array([[2]])
    short, _ = ctc(logits[:, :3], labels)
    real = jnp.array([[True, True, True, False]])
    padded, _ = ctc(logits.at[:, 3].set(9.0), labels, frame_mask=real)
    np.testing.assert_allclose(float(padded), float(short), rtol=1e-6)


def test_masked_and_impossible_rows():
    logits = jnp.asarray(_logits(2, frames=2))
    labels = jnp.array([[1, 1], [1, 2]])  # the first needs a blank between, so three frames
    assert needed_frames(labels).tolist() == [3, 2]
    assert float(ctc(logits, labels)[0]) == math.inf
    only, _ = ctc(logits[1:], labels[1:])
    for options in ({"skip_impossible": True}, {"mask": jnp.array([False, True])}):
        broken = logits if "mask" not in options else logits.at[0].set(jnp.nan)

        def loss(x, options=options):
            return ctc(x, labels, **options)[0]

        value, gradient = jax.value_and_grad(loss)(broken)
        np.testing.assert_allclose(float(value), float(only), rtol=1e-6)
        assert not gradient[0].any() and bool(jnp.isfinite(gradient[1]).all())
    assert float(ctc(logits, labels, mask=jnp.array([False, True]))[1]) == 1
    with pytest.raises(ValueError, match="per is 'batch'; there are"):
        ctc(logits, labels, per="batch")


@pytest.mark.parity
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_parity_with_pytorch(reduction):
    import torch

    logits = _logits(4, frames=9, size=5)
    labels = np.array([[1, 2, 3, -100], [2, 2, -100, -100], [4, 1, 1, 3], [3, -100, -100, -100]])
    frames = np.array([9, 5, 8, 2])
    theirs = torch.tensor(logits, requires_grad=True)
    loss = torch.nn.functional.ctc_loss(
        torch.log_softmax(theirs, -1).transpose(0, 1),
        torch.tensor(labels[labels >= 0]),
        torch.tensor(frames),
        torch.tensor((labels >= 0).sum(1)),
        reduction=reduction,
    )
    loss.backward()

    def ours(x):
        real = jnp.arange(9)[None, :] < jnp.asarray(frames)[:, None]
        per = {"sum": "example", "mean": "label"}[reduction]
        total, weight = ctc(x, jnp.asarray(labels), frame_mask=real, per=per)
        return total if reduction == "sum" else total / weight

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(logits))
    np.testing.assert_allclose(float(value), loss.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-5)
