"""Synaptic intelligence by hand, and the identity that makes it: it adds up to the loss's fall."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl.penalties import si

CURVATURE = jnp.array([[3.0, 0.5, 0.0], [0.5, 2.0, 0.25], [0.0, 0.25, 1.0]])
TARGET = jnp.array([1.0, -2.0, 0.5])


def quadratic(w):
    return 0.5 * (w - TARGET) @ CURVATURE @ (w - TARGET)


SLOPE = jax.grad(quadratic)


def walked(tx, start, steps, *, gradient=SLOPE):
    """Return the weights after so many steps, and omega."""
    tx = optax.chain(tx, si.path_integral())

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(gradient(w), state, w, task_grads=gradient(w))
        return (w + updates, state), None

    (w, state), _ = jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), None, length=steps))(
        start
    )
    return w, state[-1].omega


CHAINS = {
    "sgd": optax.sgd(2e-3),
    "momentum": optax.sgd(2e-4, momentum=0.9),
    "adam": optax.adam(2e-3),
    "clipped adamw": optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(2e-3, weight_decay=0.1)
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_path_integral_is_the_fall_of_the_loss(name):
    start = jnp.array([-1.0, 1.0, 2.0])
    w, omega = walked(CHAINS[name], start, 800)
    fall = quadratic(start) - quadratic(w)
    assert float(fall) > 1.0
    assert float(jnp.sum(omega)) == pytest.approx(float(fall), rel=0.01)


def test_sgd_on_one_weight_by_hand():
    # Loss w^2 / 2, rate 1/2: 1 -> 1/2 -> 1/4, gradients 1 and 1/2: omega 1/2 + 1/8.
    w, omega = walked(optax.sgd(0.5), jnp.array([1.0]), 2, gradient=lambda w: w)
    assert float(w[0]) == 0.25 and float(omega[0]) == 0.625
    strength = si.importance({"w": omega}, {"w": jnp.ones(1)}, {"w": w}, damping=0.0625)
    assert float(strength["w"][0]) == pytest.approx(0.625 / (0.5625 + 0.0625))


def test_a_weight_that_does_not_move_gathers_nothing():
    held = optax.partition(
        {"live": optax.adam(1e-2), "held": optax.set_to_zero()}, {"a": "live", "b": "held"}
    )
    tx = optax.chain(held, si.path_integral())
    w = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = tx.init(w)
    for _ in range(3):
        _, state = tx.update(w, state, w, task_grads=w)
    assert np.all(np.asarray(state[-1].omega["a"]) > 0)
    assert not np.any(np.asarray(state[-1].omega["b"]))


def test_the_gradient_times_rate_is_wrong_under_adam():
    # What peers add up, rate * gradient^2, is not the fall of the loss where Adam makes the steps.
    start = jnp.array([-1.0, 1.0, 2.0])

    def step(carry, _):
        w, state, omega = carry
        grads = jax.grad(quadratic)(w)
        updates, state = optax.adam(2e-3).update(grads, state, w)
        return (w + updates, state, omega + 2e-3 * grads**2), None

    begin = (start, optax.adam(2e-3).init(start), jnp.zeros(3))
    (w, _, wrong), _ = jax.lax.scan(step, begin, None, length=800)
    fall = float(quadratic(start) - quadratic(w))
    assert abs(float(jnp.sum(wrong)) - fall) > 0.25 * fall


def test_omega_is_float32_whatever_the_weights_are():
    tx = si.path_integral()
    w = {"w": jnp.full(4, 0.5, jnp.bfloat16), "hole": None}
    updates, state = tx.update(w, tx.init(w), w, task_grads=w)
    assert state.omega["w"].dtype == jnp.float32 and state.omega["hole"] is None
    assert updates["w"].dtype == jnp.bfloat16


def test_importance_leaves_holes_and_takes_no_rise():
    omega = {"a": jnp.array([2.0, -3.0]), "hole": None}
    began = {"a": jnp.array([0.0, 0.0]), "hole": jnp.ones(1)}
    ended = {"a": jnp.array([1.0, 0.0]), "hole": jnp.ones(1)}
    found = si.importance(omega, began, ended, damping=1.0)
    np.testing.assert_array_equal(found["a"], [1.0, 0.0])
    assert found["hole"] is None


def test_zero_at_the_anchor_and_by_hand_beside_it():
    anchor = {"w": jnp.array([1.0, 2.0]), "head": jnp.zeros(2)}
    strength = {"w": jnp.array([2.0, 0.5]), "head": None}
    mask = {"w": True, "head": False}
    assert float(si.si(anchor, anchor, strength, mask=mask)) == 0.0
    moved = {"w": jnp.array([2.0, 4.0]), "head": jnp.ones(2)}
    assert float(si.si(moved, anchor, strength, mask=mask)) == 2.0 * 1 + 0.5 * 4
    slope = jax.grad(lambda p: si.si(p, anchor, strength, mask=mask))(moved)
    np.testing.assert_array_equal(slope["w"], [4.0, 2.0])  # 2 importance times the way
    assert not np.any(np.asarray(slope["head"]))


def test_errors():
    w = {"w": jnp.ones(1)}
    with pytest.raises(ValueError, match="damping is 0.0, and a weight that did not move"):
        si.importance(w, w, w, damping=0.0)
    with pytest.raises(ValueError, match="began has not the structure"):
        si.importance(w, {}, w)
