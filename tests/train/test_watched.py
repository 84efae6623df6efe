"""What a watch sees: the update as it was applied, and the gradient of the task alone."""

import jax
import jax.numpy as jnp
import network
import numpy as np
import optax
import pytest
import run_toy as toy

from jtl import masks, trees
from jtl.penalties.si import path_integral
from jtl.train import checkpoint, parallel, run, watched
from jtl.train.compile import compile_step, make_compiled
from jtl.train.optimizer import phase_optimizer
from jtl.train.plan import Phase
from jtl.train.state import create
from jtl.train.step import make_step

START = jnp.int32(0)


def noted():
    """Return a watch whose state is what it was given last."""

    def init(params):
        zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params)
        return {"applied": zeros, "task": zeros, "params": zeros}

    def update(updates, state, params, *, task_grads):
        del state
        return updates, {"applied": updates, "task": task_grads, "params": params}

    return optax.GradientTransformationExtraArgs(init, update)


# By hand


def line(params, stats, batch, *, key, live):
    return {"y": params["w"] * batch["x"]}, stats


def fit(c):
    return jnp.sum(0.5 * c.out["y"] ** 2), jnp.float32(len(c.out["y"]))


def pull(c):
    return 0.5 * (c.params["w"] - 1.0) ** 2, 1.0


def line_step(tx, **options):
    labels, params = {"w": "w", "b": "b"}, {"w": jnp.float32(2.0), "b": jnp.float32(5.0)}
    seen = watched.begin(noted(), params, labels, options.get("ever_live", {"w"}))
    state = create(params, {}, tx, watch=seen, key=jax.random.key(0))
    terms = {"fit": fit, "pull": pull}
    return state, make_step(line, terms, tx, labels, {"w": 0.125}, watch=noted(), **options)


BATCH = {"x": np.array([1.0, 2.0, 0.0, 1.0], np.float32)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_values_by_hand(accumulate):
    # Fit: (1 + 4 + 0 + 1) / 4 w = 3 at w = 2. Pull: 1. The clip to norm 2 halves their sum, and
    # the step is 1/8 of 2. The watch sees 3, not 4, 1.5 or 2.
    state, step = line_step(optax.sgd(1.0), clip=2.0, accumulate=accumulate)
    new, metrics = jax.jit(step)(state, BATCH, START)
    assert float(metrics["grad_norm"]) == 4.0
    assert float(new.params["w"]) == 1.75
    assert float(new.watch["task"]["w"]) == 3.0
    assert float(new.watch["applied"]["w"]) == -0.25
    assert float(new.watch["params"]["w"]) == 2.0
    assert new.watch["task"]["b"] is None


def test_what_waits_for_its_phase_sees_zeros():
    state, step = line_step(optax.sgd(1.0), ever_live={"w", "b"})
    new, _ = jax.jit(step)(state, BATCH, START)
    assert float(new.watch["applied"]["b"]) == float(new.watch["task"]["b"]) == 0.0
    assert float(new.watch["params"]["b"]) == 5.0


def test_the_update_is_what_the_weights_moved_by():
    # 2 and a step of 1e-9 is 2: nothing was applied, whatever the optimizer asked for.
    state, step = line_step(optax.scale(-1e-8))
    new, _ = jax.jit(step)(state, BATCH, START)
    assert float(new.watch["applied"]["w"]) == 0.0 == float(new.params["w"]) - 2.0


def test_a_step_that_is_not_finite_is_not_seen():
    state, step = line_step(optax.sgd(1.0))
    new, metrics = jax.jit(step)(state, {"x": np.full(4, np.inf, np.float32)}, START)
    assert not bool(metrics["finite"])
    masks.assert_held(state.watch, new.watch)


def test_errors():
    state, step = line_step(optax.sgd(1.0))
    with pytest.raises(ValueError, match="watch is given and the state keeps nothing"):
        step(state._replace(watch={}), BATCH, START)
    with pytest.raises(ValueError, match=r"live has \['w'\], which ever_live \['b'\] lacks"):
        line_step(optax.sgd(1.0), ever_live={"b"})


# Synaptic intelligence on a network


def anchored(c):
    return 0.05 * trees.weighted_squared_distance(c.params["body"], c.refs["anchor"]), 1.0


def ready(live=network.ALL, *, watch=True, optimizer=None, terms=None, **options):
    params, labels = network.parameters(dim=16, blocks=2), None
    labels = network.labelled(params)
    live = frozenset(live) & set(jax.tree.leaves(labels))
    tx = phase_optimizer(dict.fromkeys(live, optimizer or optax.adam(1.0)), labels, live, live)
    seen = watched.begin(path_integral(), params, labels, live) if watch else None
    anchor = jax.tree.map(lambda p: p + 0.1, params["body"])
    state = create(params, {}, tx, refs={"anchor": anchor}, watch=seen, key=jax.random.key(0))
    terms = terms or {"task": network.cross_entropy, "pull": anchored}
    rates = dict.fromkeys(live, options.pop("rate", 1e-3))
    watch = path_integral() if watch else None
    step = make_step(network.make_apply(), terms, tx, labels, rates, watch=watch, **options)
    return state, step


def trained(state, step, steps=2, batch=None):
    batch = network.batch(32, dim=16) if batch is None else batch
    for _ in range(steps):
        state, metrics = step(state, batch, 0)
    return state, metrics


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"clip": 0.05}])
def test_the_path_integral_is_the_fall_of_the_task_alone(options):
    # Adam, a penalty on weights, a clip: the sum is the fall of the task's loss, not of all terms'.
    state, step = ready(rate=2e-4, **options)
    step = make_compiled(step)
    first = float(step(jax.tree.map(jnp.copy, state), network.batch(32, dim=16), 0)[1]["loss/task"])
    state, _ = trained(state, step, 100)
    last = float(step(jax.tree.map(jnp.copy, state), network.batch(32, dim=16), 0)[1]["loss/task"])
    omega = sum(float(jnp.sum(x)) for x in jax.tree.leaves(state.watch.omega))
    assert first - last > 0.05
    assert omega == pytest.approx(first - last, rel=0.02)
    assert state.watch.omega["unused"]["bias"] is None


def test_watching_changes_no_weight_and_costs_no_pass():
    results = {}
    for watch in (False, True):
        state, step = ready(watch=watch, clip=1.0)
        compiled = compile_step(step, state, network.batch(256, dim=16), START)
        results[watch] = *trained(state, make_compiled(step)), compiled.flops
    assert results[True][2] < 1.02 * results[False][2]
    network.close(results[True][1], results[False][1])
    network.close(results[True][0].params["body"], results[False][0].params["body"], 1e-6)


@pytest.mark.parametrize(("kind", "accumulate"), [("fsdp", 1), ("fsdp", 2), ("pmap", 2)])
def test_eight_devices_see_what_one_sees(kind, accumulate):
    # SGD: Adam makes 1e-3 of the rounding where a gradient is nearly 0.
    options = {"optimizer": optax.sgd(1.0, momentum=0.9), "accumulate": accumulate, "clip": 0.5}
    state, step = ready(rate=0.05, **options)
    alone, _ = trained(state, make_compiled(step))
    spread = parallel.make_spread(kind, threshold=64)
    state, step = ready(rate=0.05, axis_name=spread.axis_name, **options)
    state = parallel.place(spread, state)
    batch = parallel.put(spread, network.batch(32, dim=16))
    state, _ = trained(state, parallel.compiled(spread, step), batch=batch)
    network.close(state.watch, alone.watch, 1e-6)
    network.close(state.params["body"], alone.params["body"], 1e-6)
    kernel = state.watch.omega["body"]["block_0"]["kernel"]
    assert kernel.sharding == state.params["body"]["block_0"]["kernel"].sharding
    assert kernel.sharding.is_fully_replicated == (kind != "fsdp")


# Over a run


def plan():
    return [
        Phase("head", {"head": 0.05}, epochs=1),
        Phase("all", {"body": 0.01, "norm": 0.01, "head": 0.02}, epochs=1.5),
    ]


def events(folder=None, **changes):
    """Return the events of a run under a watch; `stop` is the step after which it is cut off."""
    stop = changes.pop("stop", None)
    saved = None if folder is None else checkpoint.open_checkpoints(folder, fingerprint={})
    begin = toy.begin(plan(), watch=WATCH, ema=changes.get("ema"))
    options = toy.options(watch=WATCH, checkpoints=saved, **changes)
    found = []
    for event in run.run(begin, plan(), **options):
        found.append(event._replace(state=toy.copied(event.state)))
        if event.kind == "step" and event.step == stop:
            break
    if saved is not None:
        checkpoint.close(saved)
    return found


WATCH = path_integral()


@pytest.fixture(scope="module")
def plain():
    return events()


def test_one_state_covers_all_phases(plain):
    first = next(e for e in plain if e.kind == "phase_end").state.watch.omega
    last = plain[-1].state.watch.omega
    assert not np.any(first["body"]["kernel"]) and np.any(last["body"]["kernel"])
    assert np.any(first["head"]["kernel"])
    assert not np.array_equal(first["head"]["kernel"], last["head"]["kernel"])


@pytest.mark.parametrize("stop", [2, 6])
def test_a_run_that_was_cut_off_comes_to_the_same_bits(tmp_path, plain, stop):
    whole = plain[-1].state
    events(tmp_path, stop=stop, save_every=1)
    found = events(tmp_path)[-1].state
    masks.assert_held(whole, found)


def test_beside_a_moving_average(plain):
    # The path is that of the weights which the steps moved, with or without an average beside.
    first = next(e for e in events(ema=0.9) if e.kind == "phase_end")
    other = next(e for e in plain if e.kind == "phase_end")
    masks.assert_held(other.state.watch, first.state.watch)


def test_checkpoints_without_a_watch_are_refused_by_name(tmp_path):
    saved = checkpoint.open_checkpoints(tmp_path, fingerprint={})
    for event in run.run(toy.begin(plan()), plan(), **toy.options(checkpoints=saved)):
        if event.kind == "evaluation" and event.step:
            break
    checkpoint.close(saved)
    with pytest.raises(ValueError, match="state/watch/omega"):
        events(tmp_path)
