import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.train import schedules
from jtl.train.schedules import Curve


def values(schedule, steps):
    return [float(schedule(step)) for step in steps]


def test_warmup_linear_by_hand():
    schedule = schedules.warmup_linear(10.0, 20, warmup=0.25, end=0.1)
    # five steps up by 2, then 15 steps down from 10 to 1 by 0.6
    assert values(schedule, (0, 1, 4, 5, 10, 20, 30)) == pytest.approx([0, 2, 8, 10, 7, 1, 1])


def test_warmup_cosine_by_hand():
    schedule = schedules.warmup_cosine(8.0, 10, warmup=0.2, end=0.5)
    # from 8 to 4: 4 + 4 (1 + cos(pi t)) / 2, and cos(pi / 4) = 0.7071
    expected = [0, 4, 8, 4 + 2 * 1.70710678, 6, 4, 4]
    assert values(schedule, (0, 1, 2, 4, 6, 10, 99)) == pytest.approx(expected)


def test_slanted_triangular_is_equation_3():
    peak, steps, cut_fraction, ratio = 0.01, 100, 0.1, 32
    schedule = schedules.slanted_triangular(peak, steps, warmup=cut_fraction, end=1 / ratio)
    cut = int(steps * cut_fraction)
    for t in range(steps + 1):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_fraction - 1))
        assert float(schedule(t)) == pytest.approx(peak * (1 + p * (ratio - 1)) / ratio, rel=1e-5)


def test_constant_with_warmup_stays_at_its_peak():
    schedule = schedules.constant(3.0, 9, warmup=1 / 3)
    assert values(schedule, (0, 1, 3, 8, 100)) == pytest.approx([0, 1, 3, 3, 3])


def test_one_cycle_by_hand():
    schedule = schedules.one_cycle(10.0, 20, warmup=0.2, start=0.1, end=0.01)
    # up from 1 to 10 in 4 steps: 1 + 9 (1 - cos(pi t / 4)) / 2, cos(pi / 4) = 0.7071
    # down from 10 to 0.1 in 16 steps: 0.1 + 9.9 (1 + cos(pi (t - 4) / 16)) / 2
    expected = [1, 1 + 4.5 * (1 - 0.70710678), 5.5, 10, 0.1 + 4.95 * (1 + 0.70710678), 5.05, 0.1]
    assert values(schedule, (0, 1, 2, 4, 8, 12, 20)) == pytest.approx(expected, rel=1e-5)
    assert values(schedule, (21, 99)) == pytest.approx([0.1, 0.1], rel=1e-5)


def test_one_cycle_without_options_starts_at_a_25th_and_ends_at_a_250000th():
    schedule = schedules.one_cycle(1.0, 10)
    assert values(schedule, (0, 3, 10)) == pytest.approx([0.04, 1.0, 4e-6], rel=1e-4)
    assert values(schedules.one_cycle(1.0, 10, end=0), (10,)) == [0.0]


@pytest.mark.parametrize("steps", [7, 29, 100, 1000])
def test_one_cycle_peaks_at_the_very_step_of_the_warmup(steps):
    for rise in range(0, steps, max(1, steps // 29)):
        schedule = schedules.one_cycle(2.0, steps, warmup=rise / steps)
        traced = jax.vmap(schedule)(jnp.arange(steps + 1))
        assert int(np.argmax(traced)) == rise, (rise, steps)


def test_flat_cosine_by_hand():
    schedule = schedules.flat_cosine(8.0, 20, warmup=0.1, flat=0.6, end=0.25)
    # 2 steps up by 4, flat until step 12, then 2 + 6 (1 + cos(pi (t - 12) / 8)) / 2
    expected = [0, 4, 8, 8, 8, 2 + 3 * (1 + 0.70710678), 5, 2, 2]
    assert values(schedule, (0, 1, 2, 7, 12, 14, 16, 20, 25)) == pytest.approx(expected, rel=1e-5)


def test_flat_cosine_without_options_falls_over_the_last_quarter():
    schedule = schedules.flat_cosine(1.0, 8)
    assert values(schedule, (0, 5, 6, 7, 8)) == pytest.approx([1, 1, 1, 0.5, 1e-5], abs=1e-5)


def test_a_warmup_that_rounds_up_to_the_whole_phase_leaves_its_last_step():
    # round(0.9 * 2) is 2; a fall over no steps divides by 0
    for kind in schedules.KINDS:
        schedule = schedules.resolve(Curve(kind, 4.0, warmup=0.9), 2)
        assert float(schedule(1)) == pytest.approx(4.0)


SPANS = {"5 steps": 5, "1 step": 1, "0.5 epochs": 4, "96 examples": 3, "1e1 steps": 10, 0.25: 5}


@pytest.mark.parametrize("span", SPANS)
def test_a_warmup_in_steps_epochs_and_examples(span):
    # 20 steps in the phase; an epoch is 8 steps and 250 examples, so 96 examples are 3.07 steps
    schedule = schedules.resolve(
        schedules.curve("warmup_linear", 60.0, warmup=span),
        20,
        steps_per_epoch=8,
        examples_per_epoch=250,
    )
    rise = SPANS[span]
    assert values(schedule, (0, 1, rise)) == pytest.approx([0, 60 / rise, 60])


def test_a_span_that_cannot_be_converted_or_does_not_fit_is_refused():
    def warm(span, steps=20, **known):
        return schedules.resolve(Curve("warmup_linear", 1.0, warmup=span), steps, **known)

    with pytest.raises(ValueError, match="'20 steps', 20 steps, and the phase has 20; take less"):
        warm("20 steps")
    with pytest.raises(ValueError, match="'2 epochs' counts epochs.*give steps_per_epoch, or"):
        warm("2 epochs")
    with pytest.raises(ValueError, match="give steps_per_epoch and examples_per_epoch"):
        warm("64 examples", steps_per_epoch=8)
    for text in ("5", "steps", "5 hours", "-5 steps", "1.2.3 steps", "5 steps more"):
        with pytest.raises(ValueError, match="number and a unit of .*'epochs'"):
            schedules.curve("warmup_linear", 1.0, warmup=text)
    with pytest.raises(ValueError, match="or give it a unit, '3 steps'"):
        schedules.curve("warmup_linear", 1.0, warmup=3)
    with pytest.raises(ValueError, match="warms up for 8 steps and falls from step 2 on"):
        schedules.flat_cosine(1.0, 10, warmup=0.8, flat=0.2)


def test_a_schedule_with_options_as_a_config_writes_it():
    shape = {"kind": "one_cycle", "start": 0.1, "warmup": "4 steps"}
    assert schedules.curve(shape, 2.0) == Curve("one_cycle", 2.0, warmup="4 steps", start=0.1)
    assert schedules.curve(shape, 2.0, warmup=0.5).warmup == 0.5
    with pytest.raises(ValueError, match="'warmup_linear' has no option 'start'; it has"):
        schedules.curve({"kind": "warmup_linear", "start": 0.1}, 1.0)
    with pytest.raises(ValueError, match="'one_cycle' has no option 'strat'.*mean 'start'"):
        schedules.curve({"kind": "one_cycle", "strat": 0.1}, 1.0)
    with pytest.raises(ValueError, match=r"fields \['start'\] and no kind"):
        schedules.curve({"start": 0.1}, 1.0)
    with pytest.raises(ValueError, match="take a fraction above 0"):
        schedules.one_cycle(1.0, 5, start=0)


@pytest.mark.parametrize("kind", sorted(schedules.KINDS))
@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_every_kind_reaches_its_peak_and_traces(kind, warmup):
    rate = schedules.curve(kind, 0.5, warmup=warmup)
    schedule = schedules.resolve(rate, 10)
    if not callable(schedule):
        assert (kind, schedule) == ("constant", 0.5)
        return
    traced = jax.jit(jax.vmap(schedule))(jnp.arange(11))
    assert np.max(traced) == pytest.approx(0.5) and int(np.argmax(traced)) == round(10 * warmup)


def test_resolve_spans_the_length_and_leaves_the_rest_alone():
    curve = Curve("warmup_linear", 1.0, warmup=0.5)
    assert float(schedules.resolve(curve, 4)(2)) == float(schedules.resolve(curve, 40)(20)) == 1.0
    own = lambda step: step * 2.0  # noqa: E731
    assert schedules.resolve(0.25, 7) == 0.25 and schedules.resolve(own, 7) is own


def test_scale_takes_every_kind_of_rate():
    assert schedules.scale(2.0, 0.5) == 1.0
    assert schedules.scale(Curve("constant", 2.0), 0.5) == Curve("constant", 1.0)
    assert schedules.scale(lambda step: step + 1.0, 3.0)(1) == 6.0


def test_unknown_kind_and_bad_fractions_are_refused():
    with pytest.raises(ValueError, match="no schedule 'cosine'; there are .*warmup_cosine"):
        schedules.curve("cosine", 1.0)
    with pytest.raises(ValueError, match="no schedule 'x'"):
        schedules.resolve(Curve("x", 1.0), 5)
    with pytest.raises(ValueError, match="fraction of the phase, and 100 is given"):
        schedules.resolve(schedules.curve("warmup_linear", 1.0, warmup=100), 1000)
    with pytest.raises(ValueError, match="ends at its peak"):
        schedules.constant(1.0, 5, end=0.1)
