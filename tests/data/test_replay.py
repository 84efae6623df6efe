"""Which examples are kept: chances counted, classes balanced, herding by hand; taken and joined."""

import collections
import dataclasses

import numpy as np
import pytest
from test_batches import make_images, make_texts

from jtl import data as jdata
from jtl.data import replay
from jtl.data.derive import with_columns


@pytest.mark.parametrize("cut", [6, 2])
def test_a_reservoir_keeps_each_row_with_the_same_chance(cut):
    runs, seen = 6000, 20
    counts = np.zeros(seen)
    for seed in range(runs):
        kept = replay.reservoir(seen, 6, seed=seed)
        assert len(set(kept.tolist())) == 6
        counts[kept[:cut]] += 1
    chance = cut / seen
    spread = np.sqrt(runs * chance * (1 - chance))
    assert np.abs(counts - runs * chance).max() < 4.5 * spread


def test_a_reservoir_takes_all_rows_of_a_short_stream():
    assert sorted(replay.reservoir(4, 9, seed=1).tolist()) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="at least 1"):
        replay.reservoir(4, 0, seed=1)


def test_classes_are_balanced_at_every_length():
    labels = np.repeat([0, 1, 2], [50, 20, 3])
    kept = replay.class_balanced(labels, 20, seed=0)
    assert len(set(kept.tolist())) == 20
    assert collections.Counter(labels[kept].tolist()) == {0: 9, 1: 8, 2: 3}
    for size in range(1, 10):
        counts = np.bincount(labels[kept[:size]], minlength=3)
        assert counts.max() - counts.min() <= 1
    assert (kept != replay.class_balanced(labels, 20, seed=1)).any()


def test_herding_by_hand():
    # Class 0: mean (2, 0); first (2, 1), nearest of all. Then |m - ((2, 1) + x) / 2| is 0.5 for
    # (2, 0), 0 for (2, -1), 2.24 for (6, -1) and 2.24 for (-2, 1): so (2, -1), and then (2, 0).
    first = np.array([[6.0, -1.0], [2.0, 1.0], [-2.0, 0.0], [2.0, -1.0], [2.0, 1.0]])
    # Class 1: mean 1; first 1, at distance 0. Then (1 + x) / 2: 0 and 2 both at 0.5, the first.
    second = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    labels = np.repeat([0, 1], [5, 3])
    features = np.concatenate([first, second])
    assert first.mean(axis=0).tolist() == [2.0, 0.0]
    assert replay.herding(features, labels, 5).tolist() == [1, 7, 3, 5, 4]
    assert replay.herding(features, labels, 2).tolist() == [1, 7]
    assert sorted(replay.herding(features, labels, 99).tolist()) == list(range(8))


def test_the_mean_of_what_herding_keeps_follows_the_mean():
    features = np.random.default_rng(0).normal(size=(200, 8))
    kept = features[replay.herding(features, np.zeros(200, int), 10)]
    means = [features[replay.reservoir(200, 10, seed=seed)].mean(axis=0) for seed in range(50)]
    apart = np.linalg.norm(np.asarray(means) - features.mean(axis=0), axis=1)
    assert np.linalg.norm(kept.mean(axis=0) - features.mean(axis=0)) < apart.min()


@pytest.mark.parametrize("memory_bytes", [0, 2**20])
def test_taken_images_are_the_same_ones_read_or_in_memory(memory_bytes):
    dataset = make_images(11, memory_bytes)
    rows = np.array([7, 2, 2, 9])
    taken = dataset.take(rows)
    assert (taken.read is None) == (memory_bytes > 0)
    pixels = taken.columns(np.array([3, 0, 1]))["pixel_values"][:, 0, 0, 0].round()
    assert pixels.tolist() == [9, 7, 2] and taken.labels.tolist() == [1, 0, 0, 1]
    assert taken.contents == dataset.take(rows).contents != dataset.take(rows[::-1]).contents
    again = taken.take([3, 1])
    assert again.columns(np.array([0, 1]))["pixel_values"][:, 0, 0, 0].round().tolist() == [9, 2]


def test_taken_texts_keep_their_buckets_and_derived_columns():
    dataset = make_texts(30)
    column = tuple(np.flatnonzero(dataset.bucket == b).astype(np.float32) for b in (0, 1))
    dataset = with_columns(dataset, {"row": column})
    rows = np.random.default_rng(0).permutation(30)[:20]
    taken = dataset.take(rows)
    assert taken.buckets == dataset.buckets and taken.derived == ("row",)
    np.testing.assert_array_equal(taken.bucket, dataset.bucket[rows])
    for batch in jdata.batches(taken, 4, stop=6):
        own = batch["index"][batch["mask"]]
        np.testing.assert_array_equal(batch["row"][batch["mask"]], rows[own])
        np.testing.assert_array_equal(batch["input_ids"][batch["mask"]][:, 1], rows[own])


@pytest.mark.parametrize("bytes_each", [(0, 0), (0, 2**20), (2**20, 2**20)])
def test_joined_images_are_those_of_each(bytes_each):
    datasets = [make_images(n, memory) for n, memory in zip((5, 3), bytes_each, strict=True)]
    whole = replay.join(datasets)
    assert whole.size == 8 and (whole.read is None) == all(bytes_each)
    rows = np.array([6, 1, 4, 5])
    assert whole.columns(rows)["pixel_values"][:, 0, 0, 0].round().tolist() == [1, 1, 4, 0]
    assert whole.contents is not None and whole.steady


def test_joined_texts_lie_in_the_buckets_of_both():
    one, other = make_texts(20), make_texts(20, seed=1)
    pad = ((0, 0), (0, 8))
    wide = {name: np.pad(column, pad) for name, column in other.parts[0].items()}
    other = dataclasses.replace(other, buckets=(16, 24), parts=(wide, other.parts[1]))
    whole = replay.join([one, other])
    assert whole.buckets == (8, 16, 24)
    for row in range(40):
        ids = whole.columns(np.array([row]))["input_ids"][0]
        source = (one, other)[row // 20]
        np.testing.assert_array_equal(ids, source.columns(np.array([row % 20]))["input_ids"][0])


def test_labels_of_two_kinds_are_numbers_and_other_columns_are_refused():
    images = make_images(5, 2**20)
    numbers = dataclasses.replace(images, labels=np.full(5, 0.5, np.float32), classes=None)
    assert replay.join([images, numbers]).labels.tolist() == [0, 1, 0, 1, 0, *[0.5] * 5]
    assert replay.join([images, images]).labels.dtype == np.int32
    other = dataclasses.replace(images, parts=({"pixels": images.parts[0]["pixel_values"]},))
    with pytest.raises(ValueError, match="inputs of the one backbone"):
        replay.join([images, other])


def test_what_is_read_is_kept_in_memory_where_it_fits_and_never_changes():
    lazy = make_images(9, 0)
    kept = lazy.loaded()
    assert lazy.read is not None and kept.read is None
    rows = np.arange(9)
    one, other = (d.columns(rows)["pixel_values"] for d in (lazy, kept))
    np.testing.assert_array_equal(one, other)
    assert lazy.loaded(memory_bytes=9 * 2 * 2 * 3 * 4 - 1) is lazy
    augmented = dataclasses.replace(lazy, augmented=True)
    assert augmented.loaded() is augmented and kept.loaded() is kept
