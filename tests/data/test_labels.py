"""Labels to integers and class names, and what is refused."""

import numpy as np
import pytest

from jtl.data.labels import as_labels


@pytest.mark.parametrize(
    ("values", "classes", "labels", "names"),
    [
        (["b", "a", "b"], None, [1, 0, 1], ("a", "b")),
        (["b", "a"], ("b", "a", "c"), [0, 1], ("b", "a", "c")),
        ([3, 1, 3], None, [1, 0, 1], ("1", "3")),
        (np.array([10, 9]), None, [1, 0], ("9", "10")),
        ([0, 2], ("x", "y", "z"), [0, 2], ("x", "y", "z")),
        ([True, False], None, [1, 0], ("0", "1")),
        ([1.0, 0.0], ("x", "y"), [1, 0], ("x", "y")),
        (np.array(["b", "a"], object), None, [1, 0], ("a", "b")),
    ],
)
def test_classes(values, classes, labels, names):
    got, found = as_labels(values, classes, name="data")
    assert got.tolist() == labels and got.dtype == np.int32 and found == names


@pytest.mark.parametrize(
    ("values", "classes"), [([0.5, 2.0], None), ([1, 5], ()), (np.array([2.5, 3], object), None)]
)
def test_numbers_stay_as_they_are(values, classes):
    got, found = as_labels(values, classes, name="data")
    assert found is None and got.dtype == np.float32
    assert got.tolist() == [float(value) for value in values]


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        ([1.0, float("nan")], None, r"1 of 2 labels of data .*rows \[1\]; drop"),
        ([1.0, float("nan")], (), r"rows \[1\]"),
        ([1.0, float("inf")], None, r"rows \[1\]"),
        ([float("nan"), 1.0], ("a", "b"), r"rows \[0\]"),
        (["a", None], None, r"rows \[1\]"),
        (["a", float("nan")], None, r"rows \[1\]"),
        ([0, 3], ("a", "b"), r"label 3 in row 1 .*there are 2, labels 0 to 1"),
        ([0, -1], ("a", "b"), "label -1 in row 1"),
        (["a", "q"], ("a", "b"), "labels 'q' of data are none of the classes.*'a', 'b'"),
        ([0.0, 0.5], ("a", "b"), "row 1 has a fraction"),
        (["a", "b"], (), "are strings"),
        (["a", 1], None, r"types \['int', 'str'\]"),
        ([[0, 1], [1, 0]], None, r"types \['list'\]"),
        (np.eye(2), None, r"shape \(2, 2\)"),
    ],
)
def test_refused(values, classes, message):
    with pytest.raises(ValueError, match=message):
        as_labels(values, classes, name="data")
