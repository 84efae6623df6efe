"""Lengths and warm-ups in epochs and examples, as a whole run keeps them."""

import jax
import numpy as np
import optax
import pytest
import run_toy as toy

from jtl.train import run, spans
from jtl.train.plan import Phase
from jtl.train.schedules import Curve, resolve

PER_EPOCH = {"steps_per_epoch": toy.PER_EPOCH, "examples_per_epoch": toy.PER_EPOCH * toy.ROWS}


def feed(live, params, stats):
    return run.Feed(toy.feed(live, params, stats).batches, **PER_EPOCH)


def rates_of(plan):
    """Return {phase: rates of the head, step by step} of a run."""
    txs = dict.fromkeys(("body", "norm", "head"), optax.sgd(1.0))
    options = toy.options(feed=feed, txs=txs, evaluate=toy.script(*[0.5] * 9))
    events = list(run.run(toy.begin(plan, txs=txs), plan, **options))
    found = {phase.name: [] for phase in plan}
    for event in events:
        if event.kind == "step":
            found[event.phase].append(float(event.metrics["rate/head"]))
    return found


def test_a_run_counts_epochs_and_examples():
    # an epoch is 4 steps and 32 examples: 64 examples are 8 steps, half an epoch is 2, 24 are 3
    plan = [
        Phase("a", {"head": Curve("warmup_linear", 0.06, warmup="0.5 epochs")}, examples=64),
        Phase("b", {"head": Curve("constant", 0.06, warmup="24 examples")}, epochs=1.25),
        Phase("c", {"head": Curve("flat_cosine", 0.06, flat="2 steps", end=0.5)}, steps=4),
    ]
    found = rates_of(plan)
    assert found["a"] == pytest.approx([0, 0.03, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01], abs=1e-7)
    assert found["b"] == pytest.approx([0, 0.02, 0.04, 0.06, 0.06], abs=1e-7)
    assert found["c"] == pytest.approx([0.06, 0.06, 0.06, 0.045], abs=1e-7)


def test_fractions_round_and_stay_inside_the_phase():
    assert [spans.in_steps(part, 10, "warmup") for part in (0, 0.04, 0.06, 0.99)] == [0, 0, 1, 9]
    assert spans.in_steps(0.9, 1, "warmup") == 0
    assert spans.in_steps("0.26 epochs", 10, "warmup", steps_per_epoch=10) == 3


def test_a_traced_rate_is_that_of_the_host():
    schedule = Curve("one_cycle", 0.5, warmup="3 steps")
    made = resolve(schedule, 9)
    steps = np.arange(12)
    traced = jax.jit(jax.vmap(made))(steps)
    np.testing.assert_allclose(traced, [float(made(int(step))) for step in steps], rtol=1e-6)
