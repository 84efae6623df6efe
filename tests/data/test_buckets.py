"""Buckets against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jtl.data.buckets import bucket_of, choose_buckets


def _padded(lengths, buckets):
    return sum(min(b for b in buckets if b >= length) for length in lengths)


def test_by_hand():
    assert choose_buckets([1, 2, 3], 1, multiple=1) == (3,)
    # 3 short and 1 long: (2, 9) pads 3*2 + 9 = 15 tokens, (3, 9) would be absurd
    assert choose_buckets([2, 2, 1, 9], 2, multiple=1) == (2, 9)
    assert choose_buckets([5, 6], 4) == (8,)
    assert choose_buckets([5, 70], 2, limit=70) == (8, 70)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    count=st.integers(1, 4),
    multiple=st.sampled_from([1, 4, 8]),
)
def test_no_choice_pads_less(lengths, count, multiple):
    rounded = sorted({-(-length // multiple) * multiple for length in lengths})
    best = min(
        _padded(lengths, choice)
        for size in range(1, min(count, len(rounded)) + 1)
        for choice in itertools.combinations(rounded, size)
        if choice[-1] == rounded[-1]
    )
    buckets = choose_buckets(lengths, count, multiple=multiple)
    assert len(buckets) <= count and list(buckets) == sorted(set(buckets))
    assert _padded(lengths, buckets) == best
    held = np.asarray(buckets)[bucket_of(lengths, buckets)]
    assert (held >= lengths).all() and held.sum() == best


@pytest.mark.parametrize("options", [([], 2), ([3], 0)])
def test_refused(options):
    with pytest.raises(ValueError, match="give at least one of each"):
        choose_buckets(*options)
