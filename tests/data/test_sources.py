"""Sources in memory."""

import numpy as np
import pytest

from jtl.data.sources import Lazy, from_arrays


def test_rows_are_taken_from_every_kind_of_column():
    images = np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)
    lazy = Lazy(lambda row: images[row], np.arange(4))
    for raw in (images, list(images), lazy):
        part = from_arrays({"image": raw, "label": list("xyxy")}).take([3, 1]).take([1, 0])
        assert part.size == len(part.columns["image"]) == 2
        np.testing.assert_array_equal(part.columns["image"][0], images[1])
        np.testing.assert_array_equal(part.columns["image"][1], images[3])
        assert part.columns["label"].tolist() == [1, 1] and part.classes == ("x", "y")


def test_a_lazy_column_reads_only_what_is_asked_for():
    read = []
    lazy = Lazy(lambda row: read.append(row) or row, np.arange(9))
    source = from_arrays({"image": lazy, "label": range(9)}).take([7, 2])
    assert read == []
    assert source.columns["image"][1] == 2 and list(lazy[3:5]) == [3, 4] and read == [2, 3, 4]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, r"has the columns \['text'\]; wanted are 'label'"),
        ({"body": ["a"], "label": [0]}, r"\['body', 'label'\]"),
        ({"text": ["a"], "image": [1], "label": [0]}, "one of"),
        ({"text": [], "label": []}, "is empty: it has 0 rows"),
        ({"text": ["a", "b"], "label": [0]}, r"'text': 2, 'label': 1"),
        ({"text": ["a", None], "label": [0, 1]}, r"1 of 2 texts .*row 1 \(None\)"),
        ({"text": ["a", float("nan")], "label": [0, 1]}, r"row 1 \(nan\)"),
        ({"text": ["a", 3], "label": [0, 1]}, r"row 1 \(3\)"),
        ({"text": ["a", "b"], "label": [0, float("nan")]}, "labels of arrays are missing"),
    ],
)
def test_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(columns)
