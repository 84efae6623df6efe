import numpy as np
import pytest

from jtl.losses.bootstrap import bootstrap_interval, paired_bootstrap


def test_the_interval_is_that_of_the_normal_approximation():
    values = np.array([1.0] * 300 + [0.0] * 100)
    deviation = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    low, high = bootstrap_interval(values, samples=4000)
    assert low == pytest.approx(0.75 - deviation, abs=0.004)
    assert high == pytest.approx(0.75 + deviation, abs=0.004)


def test_a_lower_level_is_narrower_and_a_constant_has_no_width():
    values = np.arange(50.0)
    wide, narrow = bootstrap_interval(values), bootstrap_interval(values, level=0.5)
    assert wide[0] < narrow[0] < 24.5 < narrow[1] < wide[1]
    assert bootstrap_interval(np.full(9, 0.3)) == pytest.approx((0.3, 0.3))


def test_the_seed_decides_the_interval():
    values = np.arange(20.0)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_coverage_of_the_mean():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        low, high = bootstrap_interval(rng.normal(2.0, 1.0, 60), samples=300)
        hits += low < 2.0 < high
    assert 88 <= hits <= 99


def test_pairs_remove_what_both_sides_share():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 10, 200)
    a, b = shared + 0.5 + rng.normal(0, 0.1, 200), shared
    low, high = paired_bootstrap(a, b)
    assert 0.45 < low < 0.5 < high < 0.55
    unpaired = bootstrap_interval(a)
    assert unpaired[0] < 0 < unpaired[1]


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ([], {}, "0 values were given"),
        ([1.0, np.nan], {}, r"not finite at rows \[1\]"),
        ([1.0], {"level": 95.0}, "take 0 < level < 1"),
        ([1.0], {"samples": 0}, "samples >= 1"),
    ],
)
def test_bad_input(values, options, words):
    with pytest.raises(ValueError, match=words):
        bootstrap_interval(np.array(values), **options)
