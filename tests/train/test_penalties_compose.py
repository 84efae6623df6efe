"""Penalties beside every mask and every way over the devices: one loss, one step, held bits."""

import jax
import jax.numpy as jnp
import network
import numpy as np
import optax
import pytest

from jtl import masks
from jtl.penalties import ewc, kl, l2sp, si
from jtl.train import parallel, watched
from jtl.train.compile import make_compiled
from jtl.train.optimizer import phase_optimizer
from jtl.train.state import create
from jtl.train.step import make_step

DIM = 16
LIVES = {
    "one label": frozenset({"block_1"}),
    "all": frozenset({"head", "block_0", "block_1"}),
}
WATCH = si.path_integral()


def covered(live):
    """Return the mask that a penalty is given: the body's live leaves."""
    labels = network.labelled(network.parameters(dim=DIM, blocks=2))
    return jax.tree.map(lambda label: label in live, labels["body"])


def terms(live):
    mask = covered(live)

    def on_weights(formula, *names, **options):
        def term(c):
            trees = [c.refs[name] for name in names]
            return 0.3 * formula(c.params["body"], *trees, mask=mask, **options), 1.0

        return term

    def on_outputs(c):
        rows = jnp.sum(c.batch["mask"].astype(jnp.float32))
        options = {"temperature": 2.0, "mask": c.batch["mask"]}
        return kl.kl(c.out["head"], c.batch["reference"], **options) * rows, rows

    return {
        "l2_sp": on_weights(l2sp.l2_sp, "anchor"),
        "ewc": on_weights(ewc.ewc, "anchor", "importance"),
        "si": on_weights(si.si, "anchor", "importance"),
        "kl": on_outputs,
    }


def ready(live, penalty, **options):
    """Return state and step; what is held has a NaN, so that a gradient there would show."""
    params = network.parameters(dim=DIM, blocks=2)
    labels = network.labelled(params)
    tx = phase_optimizer(dict.fromkeys(live, optax.sgd(1.0, momentum=0.9)), labels, live, live)
    mask = covered(live)
    whole = {
        "anchor": jax.tree.map(lambda p: p + 0.1, params["body"]),
        "importance": jax.tree.map(lambda p: jnp.abs(p) + 0.5, params["body"]),
    }
    refs = {name: masks.split(tree, mask)[0] for name, tree in whole.items()}
    seen = watched.begin(WATCH, params, labels, live)
    state = create(params, {}, tx, refs=refs, watch=seen, key=jax.random.key(0))
    chosen = {"task": network.cross_entropy, penalty: terms(live)[penalty]}
    rates = dict.fromkeys(live, 0.05)
    step = make_step(
        network.make_apply(), chosen, tx, labels, rates, clip=1.0, watch=WATCH, **options
    )
    return state, step, labels


def batch():
    """Return 32 rows of which each device and microbatch has another number of real ones."""
    real = np.random.default_rng(1).random(32) < 0.6
    found = network.batch(32, dim=DIM, real=real)
    reference = np.random.default_rng(2).normal(size=(32, network.CLASSES))
    return found | {"reference": reference.astype(np.float32)}


def two_steps(live, penalty, kind=None, **options):
    spread = parallel.Spread("jit", None, None, 1)
    if kind is not None:
        spread = parallel.make_spread(kind, threshold=64)
    state, step, labels = ready(live, penalty, **options)
    state = parallel.place(spread, state)
    begin = parallel.fetch(state)
    steps = make_compiled(step) if kind is None else parallel.compiled(spread, step)
    found = []
    for _ in range(2):
        state, metrics = steps(state, parallel.put(spread, batch()), 0)
        found.append(jax.device_get(metrics))
    return begin, state, found, labels


@pytest.mark.parametrize(
    ("penalty", "live"),  # of weights and of outputs, each under both masks
    [("l2_sp", "one label"), ("ewc", "all"), ("si", "all"), ("kl", "one label"), ("kl", "all")],
)
def test_penalties_compose_with_masks_microbatches_and_devices(penalty, live):
    live = LIVES[live]
    begin, alone, one, labels = two_steps(live, penalty)
    assert one[0][f"loss/{penalty}"] > 0
    assert one[1][f"loss/{penalty}"] < one[0][f"loss/{penalty}"]
    for how in ({"accumulate": 2}, {"kind": "fsdp"}):
        before, state, metrics, _ = two_steps(live, penalty, **how)
        network.close(metrics, one, 1e-5)
        network.close(state.watch, alone.watch, 1e-5)
        moved = masks.mask(labels, live)
        network.close(*(masks.split(s.params, moved)[0] for s in (state, alone)), 1e-5)
        held = jax.tree.map(lambda keep: not keep, moved)
        after = parallel.fetch(state)
        masks.assert_held(before.params, after.params, held)
        masks.assert_held(before.refs, after.refs)
        if "kind" in how:  # what a penalty keeps takes an eighth on each device, as the weights do
            weights, anchor = state.params["body"], state.refs["anchor"]
            where = jax.tree.map(
                lambda p, keep: p.sharding if keep else None, weights, covered(live)
            )
            assert where == jax.tree.map(lambda x: x.sharding, anchor)
            assert not anchor["block_1"]["kernel"].sharding.is_fully_replicated
    masks.assert_held(begin.params["unused"], parallel.fetch(alone.params["unused"]))


def test_what_is_held_has_no_gradient():
    # No state of a held leaf in the optimizer, no leaf of it in the watch: there is nothing to add.
    _, state, _, labels = two_steps(LIVES["one label"], "ewc")
    names = {name for name in masks.names(state.watch.omega) if name}
    assert names == {"body/block_1/bias", "body/block_1/kernel"}
    slots = state.opt_state.inner_states
    assert [label for label, slot in slots.items() if jax.tree.leaves(slot)] == ["block_1"]
