"""Derived columns: the values of compute, in the batches of the plain path."""

import dataclasses
import logging

import numpy as np
import pytest
from test_batches import INPUTS, make_images, make_texts

from jtl.data.batches import batches, steps_per_epoch
from jtl.data.dataset import encode
from jtl.data.derive import derive
from jtl.data.sources import from_arrays
from jtl.data.store import Store


def _compute(batch):
    ids = (batch["input_ids"] * batch["attention_mask"]).astype(np.float32)
    hidden = np.stack([ids, 2 * ids], axis=-1)
    return {"hidden_1": hidden, "pooled": hidden.sum(1)}


def test_same_batches_as_the_plain_path_with_the_computed_values():
    dataset = make_texts()
    whole = derive(dataset, 7, _compute, names=["hidden_1", "pooled"])
    assert whole is not None and whole.derived == ("hidden_1", "pooled")
    for plain, batch in zip(batches(dataset, 8, stop=20), batches(whole, 8, stop=20), strict=True):
        for name in plain:
            np.testing.assert_array_equal(batch[name], plain[name])
        for name, value in _compute(plain).items():
            np.testing.assert_array_equal(batch[name], value)


def test_raw_columns_are_dropped_and_the_mask_stays_where_positions_are():
    dataset = make_texts()
    always = {"label", "mask", "index"}
    whole = derive(dataset, 8, _compute, names=["hidden_1", "pooled"], replace=True)
    assert whole is not None
    assert set(next(batches(whole, 8))) == {"hidden_1", "pooled", "attention_mask"} | always
    hidden, pooled = whole.only("hidden_1"), whole.only("pooled")
    assert set(next(batches(hidden, 8))) == {"hidden_1", "attention_mask"} | always
    assert set(next(batches(pooled, 8))) == {"pooled"} | always
    # the features of both buckets have one shape: one compiled step
    assert {b["pooled"].shape for b in batches(pooled, 8, stop=30)} == {(8, 2)}
    with pytest.raises(ValueError, match=r"columns \['tokens'\] are not derived; .*'hidden_1'"):
        whole.only("tokens")


def test_images_are_read_once():
    dataset, reads = make_images(), []
    read = dataset.read
    assert read is not None
    counted = dataclasses.replace(
        dataset, read=lambda rows: reads.extend(rows.tolist()) or read(rows)
    )
    derived = derive(
        counted,
        4,
        lambda b: {"pooled": b["pixel_values"].mean((1, 2))},
        names=["pooled"],
        replace=True,
    )
    assert derived is not None and derived.read is None
    # eight rows are read twice more, to see that nobody augments them
    tried = sorted([*range(8), *range(8), *range(11)])
    assert sorted(reads) == tried
    for batch in batches(derived, 4, stop=6):
        real = batch["mask"]
        np.testing.assert_allclose(batch["pooled"][real, 0], batch["index"][real], atol=1e-4)
    assert sorted(reads) == tried


def test_over_the_budget_nothing_is_kept_and_the_log_says_why(caplog):
    dataset = make_texts()
    calls = []

    def compute(batch):
        calls.append(batch)
        return _compute(batch)

    with caplog.at_level(logging.INFO, logger="jtl.data"):
        assert derive(dataset, 8, compute, names=["hidden_1"], store=Store(1000)) is None
    assert "would take" in caplog.text and "hidden_1" in caplog.text
    assert len(calls) == 2  # the first batch of each bucket tells the size
    sizes = np.bincount(dataset.bucket) * np.asarray(dataset.buckets) * 2 * 4
    exact = int(sizes.sum())
    assert derive(dataset, 8, _compute, names=["hidden_1"], store=Store(exact - 1)) is None
    assert derive(dataset, 8, _compute, names=["hidden_1"], store=Store(exact)) is not None


def test_columns_in_use_count_against_the_budget_until_they_are_dropped():
    dataset, store = make_texts(), Store(memory_bytes=4000)
    one = derive(dataset, 8, _compute, names=["pooled"], store=store)
    assert one is not None
    assert store.account()["column_mib"] == 50 * 2 * 4 / 2**20
    bulky = {"pooled": np.zeros((8, 480), np.float32)}
    assert derive(dataset, 8, lambda batch: bulky, names=["pooled"], store=store) is None
    filler = {"pooled": np.zeros((8, 19), np.float32)}  # 3800 of the 3600 that are left
    assert derive(dataset, 8, lambda batch: filler, names=["pooled"], store=store) is None
    del one
    assert store.account()["column_mib"] == 0
    assert derive(dataset, 8, lambda batch: filler, names=["pooled"], store=store) is not None


def test_augmented_data_are_refused_marked_or_not():
    dataset = make_images()
    rng = np.random.default_rng(0)

    def jittered(rows):
        return {"pixel_values": rng.random((len(rows), 2, 2, 3), np.float32)}

    def compute(batch):
        return {"pooled": batch["pixel_values"].mean((1, 2))}

    assert dataset.steady
    marked = dataclasses.replace(dataset, augmented=True)
    for other in (marked, dataclasses.replace(dataset, read=jittered)):
        assert not other.steady
        with pytest.raises(ValueError, match="pictures is augmented: .*; read raw batches"):
            derive(other, 4, compute, names=["pooled"])


def test_progress_counts_rows():
    dataset, seen = make_texts(), []
    derive(dataset, 8, _compute, names=["pooled"], progress=lambda *done: seen.append(done))
    assert seen[-1] == (50, 50) and len(seen) == steps_per_epoch(dataset, 8)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_refused():
    dataset = make_texts()
    with pytest.raises(ValueError, match=r"gives no column 'tokens'; it gives \['hidden_1'"):
        derive(dataset, 8, _compute, names=["tokens"])
    with pytest.raises(ValueError, match=r"shapes {'pooled': \(1, 2\)}; a batch has 8 rows"):
        derive(dataset, 8, lambda b: {"pooled": np.zeros((1, 2))}, names=["pooled"])


def test_a_bucket_without_a_row_has_its_columns():
    """A validation split takes the training set's lengths; none of its texts may need one."""
    source = from_arrays({"text": ["3 5", "4"], "label": [0, 1]})
    dataset = encode(source, INPUTS, buckets=(2, 8, 24))
    assert [len(part["input_ids"]) for part in dataset.parts] == [1, 1, 0]
    whole = derive(dataset, 2, _compute, names=["hidden_1", "pooled"])
    assert whole is not None
    hidden = whole.only("hidden_1")
    shapes = [b["hidden_1"].shape for b in batches(hidden, 2, shuffle=False, stop=2)]
    assert shapes == [(2, 2, 2), (2, 8, 2)]
