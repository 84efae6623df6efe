"""TFDS without TensorFlow: a dataset written in its format is read back."""

import io
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jtl.data.batches import batches
from jtl.data.dataset import encode
from jtl.data.images import image_inputs
from jtl.data.tfds import from_tfds

ROWS = {"train": range(20), "test": range(20, 26)}


class TinyPets(tfds.core.GeneratorBasedBuilder):
    """Grey pictures whose brightness is the row; every class label in turn."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "file_name": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["cat", "dog", "ant"]),
            "weight": np.float32,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {part: self._generate_examples(rows) for part, rows in ROWS.items()}

    def _generate_examples(self, rows):
        for row in rows:
            encoded = io.BytesIO()
            Image.fromarray(np.full((5, 4, 3), row, np.uint8)).save(encoded, "PNG")
            encoded.seek(0)
            yield (
                row,
                {"file_name": f"ä{row}", "image": encoded, "label": row % 3, "weight": row / 2},
            )


class TinyReviews(tfds.core.GeneratorBasedBuilder):
    """Texts under two names, and a label that a test set lacks."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "title": tfds.features.Text(),
            "body": tfds.features.Text(),
            "sentiment": tfds.features.ClassLabel(names=["neg", "pos"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0), "test": self._generate_examples(-1)}

    def _generate_examples(self, low):
        for row in range(4):
            label = row % 2 if low == 0 else -1
            yield row, {"title": f"title {row}", "body": f"bödy {row}", "sentiment": label}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tfds")
    for builder in (TinyPets, TinyReviews):
        builder(data_dir=place, file_format="array_record").download_and_prepare()
    yield place
    assert "tensorflow" not in sys.modules


def test_images_stay_encoded_and_come_with_their_labels(folder):
    source = from_tfds("tiny_pets", "train", data_dir=folder)
    assert source.size == 20 and source.classes == ("cat", "dog", "ant")
    assert source.modality == "image" and source.columns["image"][0][:4] == b"\x89PNG"
    inputs = image_inputs(4, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    dataset = encode(source, inputs, memory_bytes=0)
    seen = []
    for batch in batches(dataset, 8, seed=3, stop=3):
        rows = np.round(batch["pixel_values"][:, 0, 0, 0]).astype(int)
        np.testing.assert_array_equal(rows % 3, batch["label"])
        seen += rows[batch["mask"]].tolist()
    assert sorted(seen) == list(ROWS["train"])


def test_splits_are_kept_apart_and_cut(folder):
    names = [
        from_tfds("tiny_pets", split, data_dir=folder, text="file_name").columns["text"]
        for split in ("train[:25%]", "train[25%:]", "test")
    ]
    assert [len(part) for part in names] == [5, 15, 6]
    assert sorted(sum(names, [])) == sorted(f"ä{row}" for row in range(26))


def test_numbers_are_regressed(folder):
    options = {"text": "file_name", "label": "weight"}
    source = from_tfds("tiny_pets", "test", data_dir=folder, **options)
    assert source.classes is None
    assert sorted(source.columns["label"].tolist()) == [10, 10.5, 11, 11.5, 12, 12.5]


def test_texts_are_read_into_memory(folder):
    source = from_tfds("tiny_reviews", "train", data_dir=folder, text="body")
    assert sorted(source.columns["text"]) == [f"bödy {row}" for row in range(4)]
    parity = [int(text[-1]) % 2 for text in source.columns["text"]]
    assert source.columns["label"].tolist() == parity and source.classes == ("neg", "pos")


def test_mock_data_serves_texts():
    with tfds.testing.mock_data(num_examples=5):
        source = from_tfds("imdb_reviews", "train")
    assert source.size == 5 and source.classes == ("neg", "pos")


@pytest.mark.parametrize(
    ("name", "split", "options", "message"),
    [
        ("tiny_pets", "dev", {}, "split 'dev'.*Unknown split 'dev'.*correct name and split"),
        ("no_such_pets", "train", {}, "'no_such_pets'.*cannot be opened.*connect"),
        ("tiny_pets", "test[:5%]", {}, "the split 'test.:5%.' of tiny_pets is empty.*'train': 20"),
        ("tiny_pets", "test", {"image": "pic"}, "no column 'pic'; it has .*'image'.*by image="),
        ("tiny_pets", "test", {"label": "kind"}, "no column 'kind'.*by label="),
        ("tiny_pets", "test", {"text": "file_name", "image": "image"}, "both given"),
        ("tiny_reviews", "train", {}, r"the input is not clear; .*'title \(Text\)'.*by text="),
        ("tiny_reviews", "test", {"text": "body"}, "label -1 in row 0 .*outside the classes"),
    ],
)
def test_refused(folder, name, split, options, message):
    with pytest.raises(ValueError, match=message):
        from_tfds(name, split, data_dir=folder, **options)
