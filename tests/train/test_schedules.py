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
