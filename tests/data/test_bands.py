"""Images of many bands: normalised by hand, refused, kept in a folder, made into a data set."""

import numpy as np
import pytest

from jtl.data import BandInputs, band_inputs, encode, from_arrays, load_band_inputs
from jtl.models.inputs import MissingInputs, adapted_inputs, load_inputs

INPUTS = band_inputs((2, 3), mean=(1.0, -2.0), std=(2.0, 4.0))


def _images(*before):
    return np.random.default_rng(0).integers(-5, 9, (*before, 2, 3, 2))


@pytest.mark.parametrize("before", [(4,), (2, 3)])
def test_each_band_has_its_own_mean_and_deviation(before):
    images = _images(*before)
    made = INPUTS(images)["pixel_values"]
    assert made.dtype == np.float32 and made.shape == images.shape
    np.testing.assert_allclose(made[..., 0], (images[..., 0] - 1.0) / 2.0)
    np.testing.assert_allclose(made[..., 1], (images[..., 1] + 2.0) / 4.0)
    np.testing.assert_array_equal(made, INPUTS(list(images.astype(np.float32)))["pixel_values"])


def test_steps_cut_and_round_down():
    inputs = band_inputs(None, mean=(0.0,), std=(10.0,), steps=4)
    images = np.array([-3.0, 2.4, 2.5, 7.6, 10.0, 99.0]).reshape(1, 1, 6, 1)
    assert inputs(images)["pixel_values"].ravel().tolist() == [0.0, 0.0, 0.25, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (_images(4)[..., :1], r"int64\(4, 2, 3, 1\); the weights read 2 bands of \(2, 3\)"),
        (_images(4)[:, :1], r"\(4, 1, 3, 2\).*resize before"),
        (_images(), "int64"),
        (_images(4).astype(str), "<U"),
        ([], r"the shapes \[\]; give at least one"),
        ([_images(), _images()[:1]], r"the shapes \[\(1, 3, 2\), \(2, 3, 2\)\]"),
    ],
)
def test_other_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        INPUTS(images)


def test_a_mean_and_a_positive_deviation_for_every_band():
    for mean, std in (((1.0,), (1.0, 2.0)), ((), ()), ((1.0,), (0.0,))):
        with pytest.raises(ValueError, match="one positive deviation for every band"):
            band_inputs(4, mean=mean, std=std)


def test_a_folder_gives_back_what_was_saved(tmp_path):
    for inputs in (INPUTS, band_inputs(None, mean=(0.1,), std=(0.3,), steps=255)):
        inputs.save(tmp_path)
        assert load_inputs(tmp_path, "image", {}) == inputs
        assert load_band_inputs(tmp_path) == inputs
    (tmp_path / "band_inputs.json").write_text('{"mean": [1.0], "size": [2, 3]}')
    with pytest.raises(ValueError, match=r"band_inputs.json' is no .*KeyError: 'std'"):
        load_inputs(tmp_path, "image", {})


def test_another_size_and_other_bands():
    assert adapted_inputs(INPUTS, 5, None) == BandInputs(INPUTS.mean, INPUTS.std, (5, 5))
    assert adapted_inputs(INPUTS, None, 2) == INPUTS
    assert isinstance(adapted_inputs(INPUTS, (2, 3), 3), MissingInputs)


def test_what_is_published_is_asked_last(tmp_path):
    asked = []

    def published(config):
        asked.append(config)
        return INPUTS if config["known"] else None

    found = load_inputs(tmp_path, "image", {"known": True}, published=published)
    assert found == INPUTS and asked == [{"known": True}]
    unknown = load_inputs(tmp_path, "image", {"known": False}, published=published)
    assert isinstance(unknown, MissingInputs)
    band_inputs(9, mean=(1.0,), std=(1.0,)).save(tmp_path)
    assert load_inputs(tmp_path, "image", {"known": True}, published=published).size == (9, 9)
    assert len(asked) == 2


@pytest.mark.parametrize("memory", [10**6, 10])
def test_a_data_set_of_bands(memory):
    images = _images(6).astype(np.float32)
    source = from_arrays({"image": images, "label": [0, 1] * 3})
    dataset = encode(source, INPUTS, memory_bytes=memory)
    rows = np.array([4, 1])
    assert (dataset.read is None) == (memory > 10)
    got = dataset.columns(rows)["pixel_values"]
    np.testing.assert_array_equal(got, INPUTS(images[rows])["pixel_values"])
    other = band_inputs((2, 3), mean=(1.0, 0.0), std=(2.0, 4.0))
    assert encode(source, other, memory_bytes=memory).contents != dataset.contents is not None
