"""Images to pixels: equal to transformers' processors, whatever form the images come in."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from jtl.data.images import image_inputs, load_image_inputs

PROCESSORS = {
    "vit": (
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 20}},
        (24, 20),
    ),
    "resnet": (
        {
            "image_processor_type": "ConvNextImageProcessor",
            "crop_pct": 0.875,
            "size": {"shortest_edge": 28},
            "resample": 3,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        (28, 28),
    ),
    "old_feature_extractor": (
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 16, "do_normalize": False},
        (16, 16),
    ),
    "clip": (
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 30},
            "crop_size": {"height": 20, "width": 20},
        },
        (20, 20),
    ),
}


def _photos(count=3):
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 256, (40 + 7 * i, 60 - 5 * i, 3)).astype(np.uint8) for i in range(count)
    ]


@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_pixels_are_those_of_the_processor(tmp_path, name):
    settings, size = PROCESSORS[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    inputs = load_image_inputs(tmp_path, {"num_channels": 3})
    assert inputs.size == size and inputs.channels == 3
    pixels = inputs(_photos())["pixel_values"]
    peer = AutoImageProcessor.from_pretrained(str(tmp_path), backend="pil")
    images = [Image.fromarray(photo) for photo in _photos()]
    theirs = peer(images, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pixels, np.moveaxis(theirs, 1, -1))
    assert pixels.shape == (3, *size, 3) and pixels.dtype == np.float32
    inputs.save(tmp_path / "copy")
    copy = load_image_inputs(tmp_path / "copy", {"num_channels": 3})
    np.testing.assert_array_equal(copy(_photos())["pixel_values"], pixels)


def test_stated_preprocessing_by_hand():
    inputs = image_inputs((1, 2), mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 2.0))
    image = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    np.testing.assert_allclose(
        inputs([image])["pixel_values"], [[[[0, -1, -0.5], [1, 1, 0]]]], atol=1e-6
    )


def test_every_form_of_an_image_gives_the_same_pixels(tmp_path):
    photo = _photos(1)[0]
    picture = Image.fromarray(photo)
    picture.save(tmp_path / "1.png")
    forms = [photo, picture, tmp_path / "1.png", str(tmp_path / "1.png")]
    forms.append((tmp_path / "1.png").read_bytes())
    pixels = image_inputs(16)(forms)["pixel_values"]
    for row in range(1, len(forms)):
        np.testing.assert_array_equal(pixels[row], pixels[0])
    whole = image_inputs(16)(np.stack([photo, photo]))["pixel_values"]
    np.testing.assert_array_equal(whole, pixels[:2])


def test_grey_images_for_colour_models_and_the_reverse():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    colour = np.repeat(grey[..., None], 3, -1)
    three = image_inputs(8)
    mine, other = (three([image])["pixel_values"] for image in (grey, colour))
    np.testing.assert_array_equal(mine, other)
    one = image_inputs(8, mean=(0.0,), std=(1.0,))
    pixels = one([grey, grey[..., None], colour])["pixel_values"]
    assert pixels.shape == (3, 8, 8, 1)
    np.testing.assert_allclose(pixels[..., 0], np.stack([grey] * 3) / 255, atol=1e-6)


def test_a_photograph_is_turned_as_its_exif_says():
    picture = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", exif=exif)
    inputs = image_inputs((2, 3))
    upright, turned = inputs([picture, encoded.getvalue()])["pixel_values"]
    np.testing.assert_array_equal(turned, upright[::-1, ::-1])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "of length 0; give a list"),
        ("a.png", "images are str"),
        (["no/such.png"], "'no/such.png' cannot be read.*FileNotFound"),
        ([b"not an image"], "of 12 bytes cannot be read"),
        ([np.zeros((4, 4, 3), np.float32)], r"float32\(4, 4, 3\); wanted is uint8, 0 to 255"),
        ([np.zeros((3, 4, 4), np.uint8)], r"uint8\(3, 4, 4\)"),
    ],
)
def test_refused(images, message):
    with pytest.raises(ValueError, match=message):
        image_inputs(4)(images)


def test_a_truncated_photograph_is_named():
    encoded = io.BytesIO()
    Image.fromarray(_photos(1)[0]).save(encoded, "JPEG")
    with pytest.raises(ValueError, match="cannot be read.*truncated"):
        image_inputs(4)([encoded.getvalue()[:-400]])


def test_no_processor_wrong_channels(tmp_path):
    with pytest.raises(ValueError, match="image processor of .* cannot be loaded.*image_inputs"):
        load_image_inputs(tmp_path, {})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSORS["vit"][0]))
    with pytest.raises(ValueError, match="images of 4 channels"):
        load_image_inputs(tmp_path, {"num_channels": 4})
    with pytest.raises(ValueError, match="fails on an image of 1 channels"):
        load_image_inputs(tmp_path, {"num_channels": 1})
    with pytest.raises(ValueError, match="mean has 3 channels and std has 1"):
        image_inputs(4, std=(1.0,))
