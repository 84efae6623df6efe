import jax
import jax.numpy as jnp
import network
import numpy as np
import optax
import pytest

from jtl import masks
from jtl.train.optimizer import phase_optimizer, reset
from jtl.train.state import create
from jtl.train.step import make_step

START = jnp.int32(0)
EVER = frozenset({"head", "block_4", "block_5"})


def transform(live):
    labels = network.labelled(network.parameters())
    return phase_optimizer(dict.fromkeys(EVER, optax.adamw(1.0)), labels, live, EVER)


def step_of(live, rate=1e-3):
    labels = network.labelled(network.parameters())
    return jax.jit(
        make_step(
            network.make_apply(),
            {"task": network.cross_entropy},
            transform(live),
            labels,
            dict.fromkeys(live, rate),
        )
    )


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_all_phases_share_one_structure():
    params = network.parameters()
    states = [transform(live).init(params) for live in ({"head"}, {"head", "block_5"}, EVER)]
    assert shapes(states[0]) == shapes(states[1]) == shapes(states[2])


def test_labels_that_never_move_have_no_slots():
    state = transform({"head"}).init(network.parameters())
    sizes = {label: len(jax.tree.leaves(part)) for label, part in state.inner_states.items()}
    moving = 1 + 2 * 2  # count; mu and nu of kernel and bias
    assert sizes == {
        **dict.fromkeys(EVER, moving),
        **dict.fromkeys(("block_0", "block_1", "block_2", "block_3", "unused"), 0),
    }
    numbers = sum(x.size for x in jax.tree.leaves(state))
    block, head = network.DIM**2 + network.DIM, (network.DIM + 1) * network.CLASSES
    assert numbers == 2 * (2 * block + head) + len(EVER)


def test_moments_of_a_label_held_now_keep_their_bits():
    state = create(network.parameters(), {}, transform(EVER), key=jax.random.key(0))
    state, _ = step_of(EVER)(state, network.batch(), START)
    before = state.opt_state.inner_states
    held = step_of({"head"})
    after = state
    for seed in range(3):
        after, _ = held(after, network.batch(seed=seed), START)
    now = after.opt_state.inner_states
    masks.assert_held(before["block_5"], now["block_5"])
    masks.assert_held(before["block_4"], now["block_4"])
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(now["block_5"]))
    counts = {label: now[label].inner_state[0].count.item() for label in EVER}
    assert counts == {"head": 4, "block_4": 1, "block_5": 1}


def test_a_label_that_joins_late_takes_a_first_step_of_its_rate():
    # With the count of those that moved before, Adam would not correct its bias, and the first
    # update would be (1 - b1) / sqrt(1 - b2) = 3.2 times the rate.
    rate = 1e-3
    labels = network.labelled(network.parameters())
    txs = dict.fromkeys(EVER, optax.adam(1.0, eps=1e-20))

    def step(live):
        tx = phase_optimizer(txs, labels, live, EVER)
        terms = {"task": network.cross_entropy}
        return jax.jit(
            make_step(network.make_apply(), terms, tx, labels, dict.fromkeys(live, rate))
        )

    tx = phase_optimizer(txs, labels, {"head"}, EVER)
    state, head = create(network.parameters(), {}, tx, key=jax.random.key(0)), step({"head"})
    for seed in range(20):
        state, _ = head(state, network.batch(seed=seed), START)
    new, _ = step({"head", "block_5"})(state, network.batch(seed=99), START)
    before, after = (s.params["body"]["block_5"]["kernel"] for s in (state, new))
    np.testing.assert_allclose(np.abs(after - before), rate, rtol=1e-3)


def test_a_schedule_of_the_user_own_chain_goes_in_as_it_is():
    # Momentum by hand: gradients 1, 1 give updates 1 and 1.9 at unit rate.
    labels = {"w": "w"}
    tx = phase_optimizer({"w": optax.sgd(1.0, momentum=0.9)}, labels, {"w"}, {"w"})
    step = make_step(
        lambda params, stats, batch, *, key, live: ({"y": params["w"]}, stats),
        {"sum": lambda c: (c.out["y"], 1.0)},
        tx,
        labels,
        {"w": 0.1},
    )
    state = create({"w": jnp.float32(3.0)}, {}, tx, key=jax.random.key(0))
    for _ in range(2):
        state, _ = step(state, {"x": np.zeros(1)}, START)
    assert float(state.params["w"]) == pytest.approx(3 - 0.1 * (1 + 1.9))


@pytest.mark.parametrize(
    ("live", "ever", "message"),
    [
        ({"head", "block_0"}, {"head"}, r"live names \['block_0'\], which ever_live \['head'\]"),
        ({"head"}, {"head", "block_0"}, r"labels \['block_0'\] move and have no transform"),
        ({"haed"}, {"haed"}, r"labels \['haed'\] move and have no transform; txs has \['head'\]"),
    ],
)
def test_errors(live, ever, message):
    with pytest.raises(ValueError, match=message):
        phase_optimizer(
            {"head": optax.sgd(1.0)}, network.labelled(network.parameters()), live, ever
        )


def test_a_label_that_no_leaf_bears_is_an_error():
    with pytest.raises(ValueError, match="which no leaf bears"):
        phase_optimizer(
            {"haed": optax.sgd(1.0)}, network.labelled(network.parameters()), {"haed"}, {"haed"}
        )


def test_a_label_is_reset_and_the_others_go_on():
    tx = transform(EVER)
    state, step = create(network.parameters(), {}, tx, key=jax.random.key(0)), step_of(EVER)
    for seed in range(2):
        state, _ = step(state, network.batch(seed=seed), START)
    before = state.opt_state
    after = reset(before, "head", transform({"head"}), state.params)
    assert shapes(after) == shapes(before)
    fresh = tx.init(state.params).inner_states["head"]
    masks.assert_held(fresh, after.inner_states["head"])
    for label in EVER - {"head"}:
        masks.assert_held(before.inner_states[label], after.inner_states[label])
    new, _ = step(state._replace(opt_state=after), network.batch(seed=2), START)
    counts = {n: new.opt_state.inner_states[n].inner_state[0].count.item() for n in EVER}
    assert counts == {"head": 1, "block_4": 3, "block_5": 3}


def test_reset_refuses_what_has_no_slots():
    params, tx = network.parameters(), transform(EVER)
    with pytest.raises(
        ValueError, match=r"'block_0' has no slots; \['block_4', 'block_5', 'head'\]"
    ):
        reset(tx.init(params), "block_0", tx, params)
    with pytest.raises(ValueError, match="a tuple, which has no labels"):
        reset(optax.adam(1.0).init(params), "head", tx, params)
