"""Held means held, over every optimizer, clip, decay, accumulation, average and dtype together.

One network has a block and a head for each optimizer, so that one compiled step tries them all.
"""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jtl import masks, trees
from jtl.recipes.optimizers import OPTIMIZERS
from jtl.train.optimizer import phase_optimizer
from jtl.train.state import create
from jtl.train.step import make_step

# The stem never moves, the heads move now, the blocks move in a later phase.
LIVE = frozenset(f"head/{name}" for name in OPTIMIZERS)
EVER = LIVE | {f"block/{name}" for name in OPTIMIZERS}
START = jnp.int32(0)
# Six cases in which every two choices of two axes meet.
F32, MIXED, BF16 = ("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")
AXES = ("clip", "decay", "accumulate", "ema", "dtypes")
CASES = [
    (None, 0.0, 1, None, F32),
    (0.1, 0.1, 2, 0.9, F32),
    (None, 0.0, 2, 0.9, MIXED),
    (0.1, 0.1, 1, None, MIXED),
    (None, 0.1, 1, 0.9, BF16),
    (0.1, 0.0, 2, None, BF16),
]

# A NaN with a payload, an infinity, -0.0 and the smallest number: what arithmetic does not keep.
ODD = np.array([0x7FC12345, 0x7F800000, 0x80000000, 0x00000001], np.uint32).view(np.float32)


def network(dtype="float32"):
    """Return params, stats and labels."""
    rng = np.random.default_rng(0)

    def kernel(rows, columns):
        return jnp.asarray(rng.normal(size=(rows, columns)), dtype)

    params = {
        "stem": {"kernel": kernel(3, 4), "shift": jnp.full(4, -0.0, dtype), "unused": ODD},
        "block": {name: {"kernel": kernel(4, 4)} for name in OPTIMIZERS},
        "head": {
            name: {"kernel": kernel(4, 2), "shift": jnp.zeros(2, dtype)} for name in OPTIMIZERS
        },
    }
    stats = {
        "stem": {"mean": np.full(4, -0.0, np.float32), "unused": ODD},
        "head": {name: {"mean": np.zeros(2, np.float32)} for name in OPTIMIZERS},
    }
    rules = [("stem/.*", "stem"), *((f"{label}/.*", label) for label in sorted(EVER))]
    return *jax.tree.map(jnp.asarray, (params, stats)), masks.label(params, rules)


def make_apply(dtype):
    """Return a forward pass in which stem and heads centre by the means of the batch where live."""

    def centred(hidden, shift, stats, live):
        if not live:
            return hidden - stats["mean"].astype(dtype)[None] + shift[None], stats
        mean = jnp.mean(hidden, 0)
        moved = 0.9 * stats["mean"] + 0.1 * mean.astype(jnp.float32)
        return hidden - mean[None] + shift[None], {**stats, "mean": moved}

    def apply(params, stats, batch, *, key, live):
        p, out, heads = jax.tree.map(lambda x: x.astype(dtype), params), {}, {}
        hidden = batch["x"].astype(dtype) @ p["stem"]["kernel"]
        hidden, stem = centred(hidden, p["stem"]["shift"], stats["stem"], "stem" in live)
        for name in OPTIMIZERS:
            above = jnp.tanh(hidden) @ p["block"][name]["kernel"]
            above = jnp.tanh(above) @ p["head"][name]["kernel"]
            out[name], heads[name] = centred(
                above, p["head"][name]["shift"], stats["head"][name], f"head/{name}" in live
            )
        return out, {"stem": stem, "head": heads}

    return apply


def squares(context):
    y = context.batch["y"]
    gaps = [jnp.tanh(out.astype(jnp.float32)) - y for out in context.out.values()]
    return sum(jnp.sum(gap**2) for gap in gaps), jnp.float32(len(y))


def batch(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(8, 3)), 1.0 + rng.normal(size=(8, 2))
    return {"x": np.float32(x), "y": np.float32(y)}


# bfloat16 cannot tell their usual updates of leaves with small gradients.
LARGER = {"adagrad": {"initial": 1e-6}, "lars": {"trust_coefficient": 1.0}}


def transforms(decay=0.0):
    """Return {label: transform}: to each optimizer its block and its head."""
    txs = {}
    for name, make in OPTIMIZERS.items():
        options = dict(LARGER.get(name, {}))
        if "weight_decay" in inspect.signature(make).parameters:
            options["weight_decay"] = decay
        txs |= dict.fromkeys((f"block/{name}", f"head/{name}"), make(**options))
    return txs


def odd_slots(state):
    """Return the state with the slots of the blocks filled with what arithmetic does not keep."""

    def odd(slot):
        is_float = slot.dtype == jnp.float32
        return jnp.asarray(np.resize(ODD, slot.shape)) if is_float else slot

    slots = {
        label: jax.tree.map(odd, slot) if label.startswith("block") else slot
        for label, slot in state.opt_state.inner_states.items()
    }
    return state._replace(opt_state=state.opt_state._replace(inner_states=slots))


def trained(*, clip, decay, accumulate, ema, dtypes):
    """Return the state before and after three steps in which the heads are live."""
    params, stats, labels = network(dtypes[0])
    tx = phase_optimizer(transforms(decay), labels, LIVE, EVER)
    step = make_step(
        make_apply(dtypes[1]),
        {"fit": squares},
        tx,
        labels,
        dict.fromkeys(LIVE, 0.1),
        clip=clip,
        accumulate=accumulate,
        ema=ema,
    )
    averaged = None if ema is None else masks.mask(labels, EVER)
    state = create(params, stats, tx, averaged=averaged, key=jax.random.key(0))
    before = after = odd_slots(state)
    step = jax.jit(step)
    for seed in range(3):
        after, metrics = step(after, batch(seed), START)
        assert bool(metrics["finite"])
    return before, after


def parts(state, groups):
    """Return all that belongs to some of stem, block and head."""
    whole = {"params": state.params, "stats": state.stats}
    whole |= {f"ema of {kind}": tree for kind, tree in state.ema.items()}
    found = {kind: {g: tree[g] for g in groups if g in tree} for kind, tree in whole.items()}
    slots = state.opt_state.inner_states.items()
    return found | {"slots": {n: s for n, s in slots if n.startswith(tuple(groups))}}


def test_the_cases_are_all_pairs():
    columns = list(zip(*CASES, strict=True))
    for one, two in itertools.combinations(columns, 2):
        assert set(zip(one, two, strict=True)) == set(itertools.product(set(one), set(two)))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_held_means_held(case):
    before, after = trained(**dict(zip(AXES, case, strict=True)))
    masks.assert_held(*(parts(state, ("stem", "block")) for state in (before, after)))
    moving = [parts(state, ("head",)) for state in (before, after)]
    for part in moving:
        part.pop("slots")
    still = set(masks.names(moving[0])) - set(trees.changes(*moving))
    assert not still


@settings(derandomize=True, deadline=None, max_examples=30, database=None)
@given(st.lists(st.sampled_from(["never", "later", "now"]), min_size=2, max_size=6), st.data())
def test_any_plan_holds_what_it_does_not_name(when, data):
    # A leaf for each label: what is held keeps its slots, what never moves has none.
    labels = {f"p{i}": f"l{i}" for i in range(len(when))}
    params = {name: np.float32(i + 1) for i, name in enumerate(labels)}
    groups = dict(zip(labels.values(), when, strict=True))
    ever = {label for label, at in groups.items() if at != "never"}
    live = {label for label, at in groups.items() if at == "now"}
    makes = [lambda: optax.sgd(1.0, momentum=0.9), lambda: optax.adamw(1.0, weight_decay=0.5)]
    txs = {label: data.draw(st.sampled_from(makes))() for label in sorted(ever)}
    tx = phase_optimizer(txs, labels, live, ever)
    start = tx.init(params)
    updates, state = tx.update(params, start, params)
    assert {labels[name] for name, update in updates.items() if update != 0} == live
    for label in groups:
        before, after = start.inner_states[label], state.inner_states[label]
        assert bool(trees.changes(before, after)) == (label in live)
        assert bool(jax.tree.leaves(after)) == (label in ever)


def test_what_never_moves_takes_no_slot_and_what_moves_takes_its_own():
    params, stats, labels = network()
    txs = transforms(0.1)
    tx = phase_optimizer(txs, labels, LIVE, EVER)
    averaged = masks.mask(labels, EVER)
    state = create(params, stats, tx, averaged=averaged, key=jax.random.key(0))
    assert not jax.tree.leaves(state.opt_state.inner_states["stem"])
    assert not jax.tree.leaves(state.ema["params"]["stem"])
    own = {label: params[label.split("/")[0]][label.split("/")[1]] for label in EVER}
    alone = {label: trees.size_bytes(txs[label].init(own[label])) for label in EVER}
    slots = {label: trees.size_bytes(state.opt_state.inner_states[label]) for label in EVER}
    assert slots == alone
    assert trees.size_bytes(state.opt_state) == sum(alone.values())


def test_over_a_border_moments_go_on_and_a_new_group_starts_as_if_alone():
    params, _, labels = network()
    txs = transforms(0.1)
    now, later = (phase_optimizer(txs, labels, live, EVER) for live in (LIVE, EVER))
    grads = jax.tree.map(lambda p: jnp.cos(3 * p), params)
    closing, opening = jax.jit(now.update), jax.jit(later.update)
    _, state = closing(grads, now.init(params), params)
    closed, opened = closing(grads, state, params), opening(grads, state, params)
    fresh = opening(grads, later.init(params), params)
    masks.assert_held(fresh[0]["block"], opened[0]["block"])  # of one program, so of the same bits
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(near, closed[0]["head"], opened[0]["head"])
    for name in OPTIMIZERS:
        for label, one in ((f"head/{name}", closed), (f"block/{name}", fresh)):
            jax.tree.map(near, one[1].inner_states[label], opened[1].inner_states[label])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_and_clip_are_over_the_live_leaves_alone(dtype, accumulate):
    # SGD at rate 1 under a clip of 0.01 takes a step of that length.
    params, stats, labels = network(dtype)
    live, held = frozenset({"head/sgd"}), frozenset({"head/adam"})
    tx = phase_optimizer(dict.fromkeys(live, optax.sgd(1.0)), labels, live, live)

    def taken(live, tx):
        step = make_step(
            make_apply(dtype),
            {"fit": squares},
            tx,
            labels,
            dict.fromkeys(live, 1.0),
            clip=0.01,
            accumulate=accumulate,
        )
        state = create(params, stats, tx, key=jax.random.key(0))
        new, metrics = jax.jit(step)(state, batch(0), START)
        return state, new, float(metrics["grad_norm"])

    before, after, norm = taken(live, tx)
    both = live | held
    *_, more = taken(both, phase_optimizer(dict.fromkeys(both, optax.sgd(1.0)), labels, both, both))
    assert more > 1.1 * norm > 0.01  # the other head's gradient is not small, and does not count
    gaps = jax.tree.map(
        lambda p, q: p.astype(jnp.float32) - q.astype(jnp.float32), before.params, after.params
    )
    tolerance = 1e-4 if dtype == "float32" else 0.3  # spacing of bfloat16 beside a step of 0.01
    assert float(trees.norm(gaps["head"]["sgd"])) == pytest.approx(0.01, rel=tolerance)
