"""The learning-rate finder by hand: rates, smoothing, where it stops, what it leaves alone."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import run_toy as toy

from jtl.train import sweep as finder
from jtl.train.compile import make_compiled
from jtl.train.optimizer import phase_optimizer
from jtl.train.schedules import Curve
from jtl.train.state import create
from jtl.train.step import make_step
from jtl.train.sweep import Reading, conclude, suggest, sweep, sweep_rates

RANGE = {"lowest": 0.01, "highest": 1.0, "steps": 3}


def scripted(*losses):
    """Return a step whose losses are these; NaN is a step that was not finite."""
    left = list(losses)

    def step(state, batch, start):
        loss = left.pop(0)
        return state, {"loss": np.float32(loss), "finite": np.bool_(not math.isnan(loss))}

    return step


def empty():
    return create({}, {}, optax.sgd(1.0), key=jax.random.key(0))


def swept(losses, **changes):
    given = {"lowest": 1.0, "highest": 1e3, "steps": len(losses), "smoothing": 0.0, **changes}
    return list(sweep(empty(), itertools.repeat({}), scripted(*losses), **given))


def test_all_labels_rise_in_the_proportions_of_their_peaks():
    rates = {"head": Curve("one_cycle", 0.4), "top": 0.1, "stem": Curve("constant", 0.04, 0.5)}
    made = sweep_rates(rates, lowest=1e-3, highest=10.0, steps=5)
    for label, part in {"head": 1.0, "top": 0.25, "stem": 0.1}.items():
        got = [float(made[label](step)) for step in range(5)]
        assert got == pytest.approx([part * 10.0**k for k in (-3, -2, -1, 0, 1)], rel=1e-5)


def test_readings_by_hand():
    # means 2 and 0.5 * 2 + 0.5 * 2 = 2 and 0.5 * 2 + 0.5 * 6 = 4, over 1/2, 3/4 and 7/8
    got = swept([4.0, 2.0, 6.0], smoothing=0.5, lowest=0.1, highest=10.0)
    assert [reading.rate for reading in got] == pytest.approx([0.1, 1.0, 10.0])
    assert [reading.loss for reading in got] == [4.0, 2.0, 6.0]
    assert [reading.smoothed for reading in got] == pytest.approx([4.0, 8 / 3, 32 / 7])


def test_the_sweep_stops_past_four_times_its_best():
    assert len(swept([1.0, 2.0, 4.0, 0.5, 2.0, 2.1, 9.0, 9.0])) == 6
    assert len(swept([1.0, 2.0, 2.1, 1.0], limit=2.0)) == 3
    # three times |best| above it: -4 + 12 = 8 is the bound, not 4 * -4
    assert len(swept([1.0, -4.0, -3.0, 8.0, 8.1, 1.0])) == 5


def test_the_sweep_stops_at_a_step_that_is_not_finite():
    assert [reading.loss for reading in swept([1.0, 2.0, math.nan, 1.0])] == [1.0, 2.0]


def test_batches_that_end_too_early_are_an_error():
    with pytest.raises(ValueError, match="ended after 2 of 3 steps; give batches without end"):
        list(sweep(empty(), [{}, {}], scripted(1.0, 1.0), **RANGE))


def test_a_sweep_trains_as_the_step_does_from_the_step_of_its_state():
    # loss w^2 / 2, slope w: w is 4, then 4 (1 - 0.01), then 4 (1 - 0.01) (1 - 0.1)
    def apply(params, stats, batch, *, key, live):
        return params["w"] + 0.0 * params["held"], stats

    terms = {"fit": lambda c: (c.out**2 / 2, 1.0)}
    labels, tx = {"w": "w", "held": "held"}, optax.sgd(1.0)
    step = make_compiled(make_step(apply, terms, tx, labels, sweep_rates({"w": 7.0}, **RANGE)))
    state = create({"w": 4.0, "held": 1.0}, {}, tx, key=jax.random.key(0))
    state = state._replace(step=state.step + 50)
    got = list(sweep(state, itertools.repeat({"x": np.zeros(1)}), step, **RANGE))
    by_hand = [4.0, 4 * 0.99, 4 * 0.99 * 0.9]
    assert [reading.loss for reading in got] == pytest.approx([w**2 / 2 for w in by_hand])
    assert len(step.compiled) == 1


def test_what_was_given_keeps_every_bit():
    live = frozenset({"head", "norm"})
    rates = sweep_rates({"head": 1.0, "norm": 0.5}, lowest=0.1, highest=10.0, steps=6)
    tx = phase_optimizer(toy.TXS, toy.labels(), live, live)
    state = create(toy.make_params(), toy.make_stats(), tx, key=jax.random.key(5))
    # moments and a step that are not at their start
    warm = make_compiled(make_step(toy.apply, {"error": toy.error}, tx, toy.labels(), rates))
    state, _ = warm(state, toy.batch_at(0), 0)
    before = toy.copied(state)
    batches = toy.feed(live, None, None).batches(1)
    got = list(sweep(state, batches, warm, lowest=0.1, highest=10.0, steps=6, limit=math.inf))
    assert len(got) == 6 and got[0].loss != got[-1].loss
    for leaf in jax.tree.leaves(state):
        assert not leaf.is_deleted()
    jax.tree.map(np.testing.assert_array_equal, before, toy.copied(state))


def test_the_ends_are_left_out():
    readings = [Reading(10.0**k, 0.0, float(-k)) for k in range(30)]
    found = conclude(readings, 40)  # a tenth of 40 from the start, five from the end
    assert found.rates == tuple(10.0**k for k in range(4, 25))
    assert found.losses[0] == -4.0 and found.suggestions["minimum/10"] == pytest.approx(1e23)
    for count in (0, 4, 11):
        with pytest.raises(ValueError, match=f"ended after {count} of 40 steps.*more steps"):
            conclude(readings[:count], 40)


def test_the_four_rules_on_a_curve_by_hand():
    # flat, a fall that is steepest from 10^4 on, a bottom at 10^8, and away
    losses = [10, 10, 10, 9.5, 9, 7, 6, 5.5, 5, 12, 30]
    found = suggest([10.0**k for k in range(11)], losses)
    assert found["minimum/10"] == 1e7
    assert found["steepest"] == 1e4
    # 10 9.5 9 7 6 5.5 5: 7 long, ends at position 8: 8 - 7 + 2 + 1
    assert found["valley"] == 1e4
    assert set(found) == set(finder.RULES)


def test_slide_by_hand():
    rates = 10.0 ** np.arange(8)
    losses = np.array([5.0, 5.0, 5.0, 5.0, 4.0, 3.0, 5.0, 9.0])
    # slopes 0 0 0 -0.5 -1 0.5 3 4; from the right, three apart: 4 - -1, 3 - -0.5, 0.5 - 0 and
    # -1 - 0 differ, and so does -0.5 - 0 of positions 3 and 0
    assert finder.slide(rates, losses, width=3) == 1.0
    # differences 5, 3.5, 0.5: the last one is below the bound, so the left end before it
    assert finder.slide(rates, losses, width=3, threshold=0.6) == 1e3
    assert finder.slide(rates, losses) == 1.0  # 15 steps do not fit: the ends


def test_valley_takes_the_longest_fall_even_with_bumps_in_it():
    # 8 7 6 5 4 3 across the bump of 9 at position 3; 6 long, ends at 6: 6 - 6 + 2 + 1
    losses = np.array([8.0, 7.0, 6.0, 9.0, 5.0, 4.0, 3.0])
    assert finder.valley(10.0 ** np.arange(7), losses) == 1e3
    assert finder.valley(np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0])) == 1.0


def test_rates_that_no_sweep_can_scale_are_refused():
    with pytest.raises(ValueError, match=r"rates of \['head'\] are schedules"):
        sweep_rates({"head": optax.constant_schedule(1.0)}, **RANGE)
    for change in ({"lowest": 0.0}, {"highest": 0.01}, {"steps": 1}):
        with pytest.raises(ValueError, match="the sweep goes from"):
            sweep_rates({"head": 1.0}, **{**RANGE, **change})
    with pytest.raises(ValueError, match="there are 2 rates and 3 losses"):
        suggest([1.0, 2.0], jnp.ones(3).tolist())
