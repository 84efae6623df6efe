"""Mixed batches: so many rows of each dataset, whatever their size, lengths, columns and labels."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from test_batches import make_images, make_texts

from jtl import data as jdata
from jtl.data import mix
from jtl.data.derive import with_columns


def _take(rows, *args, **options):
    return list(itertools.islice(jdata.mixed_batches(*args, **options), rows))


def _texts(rows, seed, base):
    """Return texts whose tokens and labels tell the rows: `base` + row."""
    dataset = make_texts(rows, seed)
    parts = [
        {
            **part,
            "input_ids": np.where(part["attention_mask"] > 0, part["input_ids"] + base, 0),
        }
        for part in dataset.parts
    ]
    labels = (np.arange(rows) + base).astype(np.int32)
    return dataclasses.replace(dataset, parts=tuple(parts), labels=labels)


def test_own_rows_come_first_and_all_of_them_in_an_epoch():
    own, other = make_images(11, 2**20), make_images(40, 2**20)
    steps = jdata.steps_per_epoch(own, 5)
    seen = collections.Counter()
    for batch in _take(steps, own, [(other, 3)], 8, seed=1):
        assert batch["stream"].dtype == np.int32 and batch["index"].dtype == np.int32
        assert batch["stream"].tolist() == [0] * 5 + [1] * 3
        assert batch["mask"][5:].all() and (batch["index"][5:] == -1).all()
        seen.update(batch["index"][batch["index"] >= 0].tolist())
    assert seen == collections.Counter(range(11))


def test_the_rows_of_the_task_are_those_of_plain_batches():
    own, other = make_texts(30), make_texts(20, seed=1)
    plain = jdata.batches(own, 5, seed=3)
    for batch in _take(9, own, [(other, 2)], 7, seed=3):
        expected = next(plain)
        width = expected["input_ids"].shape[1]
        assert (batch["input_ids"][:5, :width] == expected["input_ids"]).all()
        assert not batch["attention_mask"][:5, width:].any()
        for name in ("label", "mask", "index"):
            np.testing.assert_array_equal(batch[name][:5], expected[name])


def test_a_stream_goes_round_each_row_once_a_round():
    other = _texts(12, seed=2, base=100)
    batches = _take(mix.WINDOW * 3, make_texts(30), [(other, 4)], 8, seed=0)
    labels = np.concatenate([batch["label"][4:] for batch in batches])
    assert collections.Counter(labels.tolist()) == dict.fromkeys(range(100, 112), 16)
    for batch in batches:  # the columns of a row are its own: tokens 1 + 100 and then row + 100
        ids = batch["input_ids"][4:]
        np.testing.assert_array_equal(ids[:, 1], batch["label"][4:])
        assert ((ids > 0) == (batch["attention_mask"][4:] > 0)).all()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_stream_smaller_than_its_rows_repeats_them(size):
    own, other = make_images(11, 2**20), make_images(size, 2**20)
    batches = _take(8, own, [(other, 4)], 8)
    assert {batch["pixel_values"].shape for batch in batches} == {(8, 2, 2, 3)}
    last = np.concatenate([batch["pixel_values"][4:, 0, 0, 0].round() for batch in batches])
    assert collections.Counter(last.tolist()).keys() == set(range(size))


@pytest.mark.parametrize("make", [make_texts, make_images])
def test_a_resumed_run_reads_the_same_rows(make):
    own, streams = make(20), [(make(9), 3), (make(7), 1)]
    whole = _take(30, own, streams, 8, seed=4)
    for at in (1, 13, 29):
        batch = _take(1, own, streams, 8, seed=4, start=at)[0]
        assert batch.keys() == whole[at].keys()
        for name, column in batch.items():
            np.testing.assert_array_equal(column, whole[at][name])
    other = _take(30, own, streams, 8, seed=5)
    assert any((a["label"] != b["label"]).any() for a, b in zip(whole, other, strict=True))


def test_two_streams_of_one_dataset_have_orders_of_their_own():
    other = make_images(40, 2**20)
    batch = _take(1, make_images(11, 2**20), [(other, 3), (other, 3)], 8)[0]
    pixels = batch["pixel_values"][:, 0, 0, 0].round()
    assert batch["stream"].tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert pixels[2:5].tolist() != pixels[5:].tolist()


def test_lengths_are_those_of_the_task_and_one_more_where_a_stream_is_longer():
    own, other = make_texts(40), make_texts(30, seed=1)
    assert own.buckets == other.buckets == (8, 24)
    short = own.take(np.flatnonzero(own.bucket == 0))
    cases = {"alike": (own, other, {8, 24}), "longer": (short, other, {8, 24})}
    middle = dataclasses.replace(
        other, buckets=(16, 24), parts=(_wider(other.parts[0], 8), other.parts[1])
    )
    cases["between"] = (own, middle, {24})
    for name, (task, stream, lengths) in cases.items():
        batches = _take(64, task, [(stream, 3)], 8)
        assert {b["input_ids"].shape[1] for b in batches} == lengths, name
        expected = jdata.mixed_shapes(
            [task, stream], [jdata.batch_shapes(d, 1) for d in (task, stream)], 8
        )
        shapes = {tuple(sorted((n, x.shape, str(x.dtype)) for n, x in b.items())) for b in batches}
        known = {tuple(sorted((n, x.shape, str(x.dtype)) for n, x in b.items())) for b in expected}
        assert shapes == known, name


def _wider(part, more):
    return {name: np.pad(column, ((0, 0), (0, more))) for name, column in part.items()}


def test_rows_sorted_by_length_mix_few_lengths():
    other = make_texts(64, seed=1)
    order = mix.make_order(other, 8)
    mixed = [len(np.unique(other.bucket[order(step)])) > 1 for step in range(mix.WINDOW * 4)]
    assert sum(mixed) <= 4  # at most one in a window


def test_columns_that_one_lacks_are_zeros_and_positions_are_padded():
    own, other = make_texts(30), make_texts(20, seed=1)
    hidden = tuple(np.ones((*part["input_ids"].shape, 5), np.float32) for part in other.parts)
    logits = tuple(np.ones((len(part["input_ids"]), 8), np.int32) for part in other.parts)
    other = with_columns(other, {"hidden": hidden, "logits": logits})
    for batch in _take(20, own, [(other, 3)], 8):
        length = batch["input_ids"].shape[1]
        assert batch["hidden"].shape == (8, length, 5) and batch["logits"].shape == (8, 8)
        assert not batch["hidden"][:5].any() and not batch["logits"][:5].any()
        ones = batch["hidden"][5:, :, 0].sum(axis=1)
        assert ((ones == length) | (ones == 8)).all() and batch["logits"][5:].all()


def test_labels_of_another_kind_keep_a_column_of_their_own():
    own, other = make_images(11, 2**20), make_images(6, 2**20)
    numbers = dataclasses.replace(other, labels=np.arange(6, dtype=np.float32) + 0.5, classes=None)
    batch = _take(1, own, [(other, 1), (numbers, 2)], 8)[0]
    assert batch["label"].dtype == np.int32 and not batch["label"][6:].any()
    assert batch["label/2"].dtype == np.float32 and not batch["label/2"][:6].any()
    assert (batch["label/2"][6:] == batch["pixel_values"][6:, 0, 0, 0].round() + 0.5).all()


def test_what_cannot_be_is_refused():
    own = make_images(11, 2**20)
    with pytest.raises(ValueError, match="leaves the task none"):
        jdata.split_rows(8, [4, 0.5])
    with pytest.raises(ValueError, match="no number of rows"):
        jdata.split_rows(8, [1.5])
    with pytest.raises(ValueError, match="no number of rows"):
        jdata.split_rows(8, [0])
    with pytest.raises(ValueError, match="larger than the data"):
        jdata.mixed_batches(own, [(own, 4)], 16)
    with pytest.raises(ValueError, match="0 examples"):
        jdata.mixed_batches(own, [(own.take([]), 4)], 8)
    wide = dataclasses.replace(own, parts=({"pixel_values": np.zeros((11, 3, 3, 3), np.float32)},))
    with pytest.raises(ValueError, match="'pixel_values' differs"):
        next(jdata.mixed_batches(own, [(wide, 4)], 8))


def test_a_small_share_is_one_row():
    assert jdata.split_rows(8, [0.01]) == (7, 1)
    assert jdata.split_rows(16, []) == (16,)
