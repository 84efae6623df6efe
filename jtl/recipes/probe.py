"""Linear probe: logistic or ridge regression on frozen features, the strong cheap baseline.

Its strength is chosen on validation data; every fine-tune shows it beside its own figure.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Probe(NamedTuple):
    """A fitted probe: `logits = ((features - mean) / scale) @ kernel + bias`."""

    mean: np.ndarray
    scale: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    strength: float

    def __call__(self, features: Any) -> np.ndarray:
        """Return logits (n, outputs) of features (n, dim)."""
        return ((features - self.mean) / self.scale) @ self.kernel + self.bias


def fit_probe(
    features: Any,
    labels: Any,
    *,
    outputs: int,
    choose: Callable[[np.ndarray], float],
    validation: Any,
    strengths: tuple[float, ...] = STRENGTHS,
) -> Probe:
    """Return the probe whose strength scores best on validation data.

    Minimises mean cross entropy (or squared error / 2 where `outputs` is 0) plus
    strength / 2 * |kernel|^2 on standardised features; by L-BFGS, from strong to weak, each started
    from the last.

    Args:
        features: (n, dim) of the training data.
        labels: (n,) classes, or numbers where `outputs` is 0.
        outputs: number of classes; 0 means one regressed number.
        choose: `validation logits -> figure`, higher is better.
        validation: (m, dim) features of the validation data.
        strengths: the path.
    """
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    mean, scale = features.mean(0), features.std(0) + 1e-6
    inputs = jnp.asarray((features - mean) / scale)
    weights = (jnp.zeros((features.shape[1], max(outputs, 1))), jnp.zeros((max(outputs, 1),)))
    best: tuple[float, Probe] | None = None
    for strength in sorted(strengths, reverse=True):
        weights = _minimise(weights, inputs, jnp.asarray(labels), strength, outputs > 0)
        kernel, bias = (np.asarray(part) for part in weights)
        probe = Probe(mean, scale, kernel, bias, strength)
        figure = choose(probe(np.asarray(validation, np.float32)))
        if best is None or figure > best[0]:
            best = (figure, probe)
    assert best is not None
    return best[1]


def _loss(weights: Any, inputs: Any, labels: Any, strength: Any, classify: bool) -> Any:
    kernel, bias = weights
    logits = inputs @ kernel + bias[None, :]
    if classify:
        fit = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    else:
        fit = 0.5 * jnp.mean((logits[:, 0] - labels) ** 2)
    return fit + 0.5 * strength * jnp.sum(kernel**2)


def _minimise(weights: Any, inputs: Any, labels: Any, strength: float, classify: bool) -> Any:
    return _lbfgs(weights, inputs, labels, jnp.float32(strength), classify)


@jax.jit(static_argnames="classify")
def _lbfgs(weights: Any, inputs: Any, labels: Any, strength: Any, classify: bool) -> Any:
    def value(w: Any) -> Any:
        return _loss(w, inputs, labels, strength, classify)

    tx = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(value)

    def advance(carry: Any) -> Any:
        w, state, _, step = carry
        loss, grad = value_and_grad(w, state=state)
        updates, state = tx.update(grad, state, w, value=loss, grad=grad, value_fn=value)
        return optax.apply_updates(w, updates), state, optax.tree.norm(grad), step + 1

    def going(carry: Any) -> Any:
        return (carry[3] < 300) & (carry[2] > 1e-5)

    start = (weights, tx.init(weights), jnp.float32(jnp.inf), jnp.int32(0))
    return jax.lax.while_loop(going, advance, start)[0]
