"""Splits: seeded, disjoint, without copies."""

import numpy as np
import pytest

from jtl.data.sources import from_arrays
from jtl.data.split import split


def _source(rows=100, classes=2):
    labels = [row % classes for row in range(rows)]
    return from_arrays({"text": [f"text {row}" for row in range(rows)], "label": labels})


def _texts(parts):
    return {name: part.columns["text"] for name, part in parts.items()}


def test_parts_are_disjoint_of_the_sizes_and_seeded():
    sizes = {"train": 50, "validation": 20, "test": 30}
    source = _source()
    one = _texts(split(source, sizes, seed=1))
    assert list(one) == list(sizes)
    assert {name: len(texts) for name, texts in one.items()} == sizes
    assert sorted(sum(one.values(), [])) == sorted(source.columns["text"])
    assert _texts(split(source, sizes, seed=1)) == one
    assert _texts(split(source, sizes, seed=2)) != one
    parts = split(source, sizes, seed=1)
    for part in parts.values():
        rows = [int(text.split()[1]) for text in part.columns["text"]]
        assert part.columns["label"].tolist() == [row % 2 for row in rows]


def test_a_smaller_training_part_leaves_the_others_alone():
    large = _texts(split(_source(), {"train": 60, "test": 30}, seed=0))
    small = _texts(split(_source(), {"train": 10, "test": 30}, seed=0))
    assert small["test"] == large["test"] and small["train"] == large["train"][:10]


def test_copies_are_kept_once():
    texts = [f"text {row % 30}" for row in range(90)]
    source = from_arrays({"text": texts, "label": [row % 2 for row in range(90)]})
    parts = _texts(split(source, {"train": 20, "test": 10}, seed=0))
    assert len(set(parts["train"]) | set(parts["test"])) == 30
    with pytest.raises(ValueError, match=r"30 distinct examples \(90 rows\).*ask for 31"):
        split(source, {"train": 20, "test": 11}, seed=0)


def test_copies_of_images_are_found_in_every_form(tmp_path):
    arrays = [np.full((2, 3, 3), row % 4, np.uint8) for row in range(8)]
    arrays.append(np.full((3, 2, 3), 0, np.uint8))  # the bytes of the first, another shape
    files = []
    for row in range(8):
        files.append(tmp_path / f"{row}.png")
        files[-1].write_bytes(bytes([row % 4]))
    encoded = [file.read_bytes() for file in files]
    for images, distinct in ((arrays, 5), (files, 4), (encoded, 4)):
        source = from_arrays({"image": images, "label": np.linspace(0, 1, len(images))})
        with pytest.raises(ValueError, match=f"has {distinct} distinct examples"):
            split(source, {"train": 9}, seed=0)


def test_a_stratified_part_has_its_share_of_every_class():
    labels = [0] * 60 + [1] * 30 + [2] * 10
    source = from_arrays({"text": [str(row) for row in range(100)], "label": labels})
    parts = split(source, {"train": 50, "validation": 20, "test": 30}, seed=0, stratify=True)
    for part in parts.values():
        counts = np.bincount(part.columns["label"], minlength=3)
        np.testing.assert_allclose(counts, np.array([0.6, 0.3, 0.1]) * part.size, atol=1)
    rows = sorted(int(text) for part in parts.values() for text in part.columns["text"])
    assert rows == list(range(100))


def test_refused():
    with pytest.raises(ValueError, match=r"parts \['test'\] .*would be empty"):
        split(_source(), {"train": 5, "test": 0}, seed=0)
    rare = from_arrays({"text": list("abcdef"), "label": list("xxxxxy")}, name="rare")
    with pytest.raises(ValueError, match=r"no example of \['y'\]; it has .*'x': 1.*stratify"):
        for seed in range(20):
            split(rare, {"train": 1, "test": 5}, seed=seed)
    numbers = from_arrays({"text": ["a", "b"], "label": [0.5, 1.0]})
    assert split(numbers, {"train": 2}, seed=0)["train"].size == 2
    with pytest.raises(ValueError, match="only classes can be stratified"):
        split(numbers, {"train": 2}, seed=0, stratify=True)
