"""How much of the gradient is each term's, and that to look changes nothing."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import run_toy as toy

from jtl import masks
from jtl.train import checkpoint, parallel, run
from jtl.train.compile import shapes_of
from jtl.train.optimizer import phase_optimizer
from jtl.train.plan import Phase
from jtl.train.shares import compiled, make_shares
from jtl.train.state import create
from jtl.train.step import make_step

PLAN = [
    Phase("head", {"head": 0.05}, epochs=1),
    Phase("all", {"body": 0.01, "norm": 0.01, "head": 0.02}, epochs=1.5),
]


def pull(c):
    return 0.05 * sum(jnp.sum(x**2) for x in jax.tree.leaves(c.params)), jnp.float32(1.0)


TERMS = {"error": toy.error, "pull": pull}


def test_values_by_hand():
    # w = (3, 4) is pulled to 0: slope (3, 4), norm 5. The data pull w[0] by 15, and b, held, by 7.
    def apply(params, stats, batch, *, key, live):
        return 15.0 * params["w"][0] * batch["x"] + 7.0 * params["b"], stats

    terms = {
        "data": lambda c: (jnp.sum(c.out), jnp.float32(c.out.size)),
        "pull": lambda c: (0.5 * jnp.sum(c.params["w"] ** 2), 1.0),
        "none": lambda c: (jnp.float32(3.0), 1.0),
    }
    params, labels = {"w": jnp.array([3.0, 4.0]), "b": jnp.ones(1)}, {"w": "w", "b": "b"}
    state = create(params, {}, optax.sgd(1.0), key=jax.random.key(0))
    batch = {"x": jnp.ones(2)}
    for accumulate in (1, 2):
        live = frozenset({"w"})
        found = make_shares(apply, terms, labels, live, accumulate=accumulate)(state, batch)
        found = {name: float(value) for name, value in found.items()}
        norms = {"grad_norm/data": 15.0, "grad_norm/pull": 5.0, "grad_norm/none": 0.0}
        shares = {"share/data": 0.75, "share/pull": 0.25, "share/none": 0.0}
        assert found == pytest.approx(norms | shares)
    found = make_shares(apply, terms, labels, frozenset({"w"}), reference=("pull",))(state, batch)
    assert float(found["share/data"]) == 1.0 and float(found["grad_norm/pull"]) == 5.0
    assert "share/pull" not in found


def test_no_gradient_at_all_is_no_share():
    state = create({"w": jnp.ones(1)}, {}, optax.sgd(1.0), key=jax.random.key(0))
    apply = lambda params, stats, batch, *, key, live: (batch["x"], stats)  # noqa: E731
    terms = {name: lambda c: (jnp.sum(c.out), 1.0) for name in "ab"}
    found = make_shares(apply, terms, {"w": "w"}, frozenset({"w"}))(state, {"x": jnp.ones(1)})
    assert set(map(float, found.values())) == {0.0}


# In a run


def events(folder=None, *, stop=None, terms=TERMS, **changes):
    """Return the events of a run; `stop` is the step after which it is cut off."""
    saved = None if folder is None else checkpoint.open_checkpoints(folder, fingerprint={})
    begin = toy.begin(PLAN)
    found = []
    for event in run.run(begin, PLAN, **toy.options(terms=terms, checkpoints=saved, **changes)):
        found.append(event._replace(state=toy.copied(event.state), metrics=dict(event.metrics)))
        if event.kind == "step" and event.step == stop:
            break
    if saved is not None:
        checkpoint.close(saved)
    return found


@pytest.fixture(scope="module")
def probed():
    return events(shares_every=3)


def shares_of(found):
    return {event.step: event.metrics for event in found if event.kind == "shares"}


def test_they_come_at_the_first_step_of_each_phase_and_every_so_many(probed):
    # The phases have 4 and 6 steps: 1, 4 of the first, and 5, 8 in the second.
    assert list(shares_of(probed)) == [1, 4, 5, 8]
    for number, event in enumerate(probed):
        if event.kind == "shares":
            assert (probed[number - 1].kind, probed[number - 1].step) == ("step", event.step)


def test_to_look_changes_no_bit(probed):
    plain = events()
    masks.assert_held(plain[-1].state, probed[-1].state)
    for a, b in zip(*([e for e in x if e.kind == "step"] for x in (plain, probed)), strict=True):
        assert a.metrics == b.metrics
        masks.assert_held(a.state, b.state)


def test_they_are_of_the_step_of_the_same_number(probed):
    # The gradient of all terms is the sum of what each gives, so its norm lies between.
    norms = {event.step: event.metrics["grad_norm"] for event in probed if event.kind == "step"}
    for step, found in shares_of(probed).items():
        a, b = found["grad_norm/error"], found["grad_norm/pull"]
        assert abs(a - b) - 1e-5 <= norms[step] <= a + b + 1e-5
        assert found["share/error"] == pytest.approx(a / (a + b))
    one = events(terms={"error": toy.error})
    first = next(event for event in one if event.kind == "step")
    assert shares_of(probed)[1]["grad_norm/error"] == pytest.approx(first.metrics["grad_norm"])


@pytest.mark.parametrize("stop", [2, 6])
def test_a_run_that_was_cut_off_has_the_same_shares(tmp_path, probed, stop):
    events(tmp_path, stop=stop, shares_every=3, save_every=1)
    rest = shares_of(events(tmp_path, shares_every=3))
    whole = shares_of(probed)
    assert rest == {step: whole[step] for step in whole if step > stop}


def test_one_term_has_no_shares_and_costs_no_program():
    found = events(terms={"error": toy.error}, shares_every=1)
    assert not shares_of(found)


def test_they_are_compiled_with_the_step_before_a_phase_begins(probed):
    threads = []

    def apply(*args, **given):
        threads.append(threading.current_thread().name)
        return toy.apply(*args, **given)

    batch = {name: np.asarray(value) for name, value in toy.batch_at(0).items()}
    shapes = [{n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in batch.items()}]
    ahead = run.Ahead(lambda live: shapes, toy.PER_EPOCH)
    found = events(apply=apply, ahead=ahead, shares_every=3)
    assert set(threads) == {"jtl-compile_0"}
    masks.assert_held(probed[-1].state, found[-1].state)


@pytest.mark.parametrize("every", [0, -1])
def test_errors(every):
    with pytest.raises(ValueError, match=f"shares_every is {every}; give a number of steps"):
        events(shares_every=every)


# On devices


@pytest.mark.parametrize("kind", ["data", "fsdp", "pmap"])
def test_eight_devices_are_one(kind):
    begin = toy.begin(PLAN)
    live = frozenset({"head", "norm"})
    shares = make_shares(toy.apply, TERMS, toy.labels(), live)
    spread = parallel.make_spread(kind, threshold=4)
    state = parallel.place(spread, begin)
    batch = {name: np.asarray(value) for name, value in toy.batch_at(0).items()}
    call = compiled(shares)
    call.prepare(shapes_of(state), [parallel.shapes(spread, batch)])
    found = call(state, parallel.put(spread, batch), 0)
    assert len(call.compiled) == 1 and call.waits == []
    for name, value in jax.jit(shares)(begin, batch).items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-5), name


def test_they_follow_steps_of_pmap():
    live, spread = frozenset({"head"}), parallel.make_spread("pmap")
    plan = [Phase("head", {"head": 0.05}, epochs=1)]
    tx = phase_optimizer(toy.TXS, toy.labels(), live, live)
    rates = {"head": 0.05}
    step = make_step(toy.apply, TERMS, tx, toy.labels(), rates, axis_name=spread.axis_name)
    steps, state = parallel.compiled(spread, step), parallel.place(spread, toy.begin(plan))
    call, batch = compiled(make_shares(toy.apply, TERMS, toy.labels(), live)), toy.batch_at(0)
    for number in range(3):
        found = call(state, parallel.put(spread, batch), 0)
        state, metrics = steps(state, parallel.put(spread, batch), 0)
        norms = [float(found[f"grad_norm/{name}"]) for name in TERMS]
        assert abs(norms[0] - norms[1]) - 1e-5 <= float(metrics["grad_norm"]) <= sum(norms) + 1e-5
        assert len(call.compiled) == 1, number
