import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import masks
from jtl.penalties.l2sp import decay_to_start, l2_sp
from jtl.train.optimizer import phase_optimizer

PARAMS = {"body": jnp.array([1.0, 2.0]), "head": jnp.array([9.0])}
ANCHOR = {"body": jnp.array([0.0, 4.0]), "head": jnp.array([0.0])}


def test_by_hand_and_zero_at_the_anchor():
    assert float(l2_sp(PARAMS, ANCHOR)) == 0.5 * (1 + 4 + 81)
    assert float(l2_sp(ANCHOR, ANCHOR)) == 0.0


def test_gradient_is_the_distance_and_none_comes_from_masked_leaves():
    np.testing.assert_array_equal(jax.grad(l2_sp)(PARAMS, ANCHOR)["body"], [1.0, -2.0])
    mask = {"body": True, "head": False}
    anchor = {"body": ANCHOR["body"], "head": None}
    value, gradient = jax.value_and_grad(lambda p: l2_sp(p, anchor, mask=mask))(PARAMS)
    assert float(value) == 2.5
    np.testing.assert_array_equal(gradient["head"], 0.0)


def test_a_fresh_head_without_a_mask_is_an_error():
    with pytest.raises(ValueError, match="only the tree has 'head'"):
        l2_sp(PARAMS, {"body": ANCHOR["body"]})


def test_bfloat16_leaves_are_summed_in_float32():
    value = l2_sp({"w": jnp.ones(1000, jnp.bfloat16)}, {"w": jnp.zeros(1000, jnp.bfloat16)})
    assert value.dtype == jnp.float32
    assert float(value) == 500.0


def test_decay_to_start_takes_back_a_share_of_the_way_and_forgets_no_start():
    tx, params = decay_to_start(0.25), {"w": jnp.array([4.0, -2.0])}
    state = tx.init(params)
    away = {"w": params["w"] + jnp.array([8.0, -4.0])}
    for left in (0.75, 0.75**2):
        updates, state = tx.update({"w": jnp.zeros(2)}, state, away)
        away = optax.apply_updates(away, updates)
        np.testing.assert_allclose(away["w"] - params["w"], [8.0 * left, -4.0 * left])
    with pytest.raises(ValueError, match="params=None is given"):
        tx.update(away, state)


def test_decay_to_zero_is_what_it_is_from_a_start_at_zero():
    away, zeros = {"w": jnp.array([4.0, -2.0])}, {"w": jnp.zeros(2)}
    tx = decay_to_start(0.1)
    ours, _ = tx.update(zeros, tx.init(zeros), away)
    theirs, _ = optax.add_decayed_weights(-0.1).update(zeros, optax.EmptyState(), away)
    np.testing.assert_allclose(ours["w"], theirs["w"])


def test_the_pull_is_the_same_whatever_adam_does():
    # As a loss the same pull would pass through Adam's moments and be a step of the rate.
    body = optax.chain(optax.adam(1.0), decay_to_start(0.5))
    labels = {"body": "body", "head": "head", "stem": "stem"}
    params = dict.fromkeys(labels, jnp.array([1.0]))
    tx = masks.optimizer({"body": body, "head": optax.sgd(1.0)}, labels)
    state = tx.init(params)
    moved = dict.fromkeys(labels, jnp.array([7.0]))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, moved)
    assert {name: float(update[0]) for name, update in updates.items()} == {
        "body": -3.0,
        "head": 0.0,
        "stem": 0.0,
    }


def test_a_phase_that_holds_a_label_keeps_its_start():
    labels = {"body": "body", "head": "head"}
    txs = {"body": decay_to_start(0.5), "head": optax.sgd(1.0)}
    phases = [phase_optimizer(txs, labels, live, set(labels)) for live in ({"head"}, set(labels))]
    params, zeros = dict.fromkeys(labels, jnp.array([1.0])), dict.fromkeys(labels, jnp.zeros(1))
    _, state = phases[0].update(zeros, phases[0].init(params), params)
    updates, _ = phases[1].update(zeros, state, dict.fromkeys(labels, jnp.array([3.0])))
    assert float(updates["body"][0]) == -1.0


def test_leaves_outside_the_mask_pass_as_they_are_and_keep_no_start():
    tx = decay_to_start(0.5, {"body": True, "head": False})
    state = tx.init(PARAMS)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2
    updates, _ = tx.update(ANCHOR, state, jax.tree.map(lambda x: x + 2.0, PARAMS))
    np.testing.assert_allclose(updates["body"], [-1.0, 3.0])
    np.testing.assert_allclose(updates["head"], ANCHOR["head"])


def test_it_keeps_an_array_of_its_own():
    # The step donates the parameters: a start that shared their buffer would be gone.
    params = {"w": jnp.ones(3)}
    state = decay_to_start(0.5).init(params)
    params["w"].delete()
    assert state.start["w"].tolist() == [1.0, 1.0, 1.0]
