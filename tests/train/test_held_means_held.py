"""Held means held, over every optimizer, clip, decay, accumulation, average and dtype together.

One network has a block and a head for each optimizer, so that one compiled step tries them all.
"""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import Phase, given, settings
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
AXES = {
    "clip": (None, 0.1),
    "decay": (0.0, 0.1),
    "accumulate": (1, 2),
    "ema": (None, 0.9),
    "dtypes": (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")),
}
CASES = [dict(zip(AXES, case, strict=True)) for case in itertools.product(*AXES.values())]

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


def transforms(decay=0.0):
    """Return {label: transform}: to each optimizer its block and its head."""
    txs = {}
    for name, make in OPTIMIZERS.items():
        options = (
            {"weight_decay": decay} if "weight_decay" in inspect.signature(make).parameters else {}
        )
        if name == "lars":
            options["trust_coefficient"] = 1.0  # bfloat16 cannot tell its usual updates
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


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=5, phases=(Phase.generate,), database=None)
@given(case=st.sampled_from(CASES))
def test_held_means_held(case):
    before, after = trained(**case)
    masks.assert_held(*(parts(state, ("stem", "block")) for state in (before, after)))
    moving = [parts(state, ("head",)) for state in (before, after)]
    for part in moving:
        part.pop("slots")
    still = set(masks.names(moving[0])) - set(trees.changes(*moving))
    assert not still


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
    update = jax.jit(now.update)
    _, state = update(grads, now.init(params), params)
    closed, opened = update(grads, state, params), jax.jit(later.update)(grads, state, params)
    masks.assert_held(closed[0]["head"], opened[0]["head"])
    for label in LIVE:
        masks.assert_held(closed[1].inner_states[label], opened[1].inner_states[label])

    @jax.jit
    def first(grads, params):
        starts = {name: txs[f"block/{name}"] for name in OPTIMIZERS}
        return {
            name: tx.update(grads[name], tx.init(params[name]), params[name])
            for name, tx in starts.items()
        }

    for name, alone in first(grads["block"], params["block"]).items():
        ours = opened[0]["block"][name], opened[1].inner_states[f"block/{name}"]
        pairs = zip(jax.tree.leaves(alone), jax.tree.leaves(ours), strict=True)
        for a, b in pairs:  # another program: equal to rounding
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("accumulate", AXES["accumulate"])
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
