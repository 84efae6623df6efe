"""Images and texts of one batch: columns by hand, the places of an image, folders."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from jtl.data.pairs import PairInputs, pair_inputs, tokens_of_image
from jtl.models.inputs import MissingInputs, load_inputs

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "<image>"]
VISION = {"image_size": 8, "patch_size": 4}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    settings = {
        "tokenizer_class": "BertTokenizer",
        "model_max_length": 12,
        "additional_special_tokens": ["<image>"],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    square = {"height": 8, "width": 8}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 8}, crop_size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(tmp_path)
    return tmp_path


def _load(folder: Path, **config):
    return load_inputs(folder, "image_text", {"vision_config": VISION, "text_config": {}, **config})


def _white(rows):
    return [np.full((10, 8, 3), 255, np.uint8)] * rows


def test_columns_of_both_and_of_one_side(folder):
    inputs = _load(folder)
    batch = inputs(texts=["a cat", "dog"], images=_white(2))
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3], [2, 7, 3, 0]]
    np.testing.assert_allclose(batch["pixel_values"], np.ones((2, 8, 8, 3)))  # (1 - 0.5) / 0.5
    assert set(inputs(images=_white(1))) == {"pixel_values"}
    assert "pixel_values" not in inputs(texts=["a"])


def test_siglip_pads_to_its_full_length(folder):
    inputs = _load(folder, model_type="siglip")
    assert inputs(texts=["a cat"])["input_ids"].shape == (1, 12)


def test_an_image_has_as_many_tokens_as_patches(folder):
    inputs = _load(folder, image_token_index=8)
    assert (inputs.image_token, inputs.image_tokens) == ("<image>", 4)
    batch = inputs(texts=["a <image> cat", "dog"], images=_white(2))
    assert batch["input_ids"].tolist() == [[2, 5, 8, 8, 8, 8, 6, 3], [2, 7, 3, 0, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match="names 2 images.*write '<image>' once"):
        inputs(texts=["<image> <image>"])
    with pytest.raises(ValueError, match="text 1 keeps 3 of the 4 tokens of its image"):
        inputs(texts=["<image>", "a a a a a a a <image>"])
    full = {"vision_config": VISION, "vision_feature_select_strategy": "full"}
    assert tokens_of_image(full) == 5


def test_what_is_saved_is_read_back(folder, tmp_path):
    inputs = _load(folder, image_token_index=8)
    inputs.save(tmp_path / "copy")
    copy = _load(tmp_path / "copy", image_token_index=8)
    given = dict(texts=["a <image>"], images=[np.arange(300, dtype=np.uint8).reshape(10, 10, 3)])
    for name, column in inputs(**given).items():
        np.testing.assert_array_equal(copy(**given)[name], column)


def test_refused(folder, tmp_path):
    inputs = _load(folder)
    with pytest.raises(ValueError, match="made of nothing; give as many texts= as images="):
        inputs()
    with pytest.raises(ValueError, match=r"made of \{'texts': 1, 'images': 2\}"):
        inputs(texts=["a"], images=_white(2))
    (folder / "preprocessor_config.json").unlink()
    half = _load(folder)
    assert isinstance(half, PairInputs) and half(texts=["a"])["input_ids"].shape == (1, 3)
    with pytest.raises(ValueError, match="no preprocessing for image inputs"):
        half(images=_white(1))
    empty = tmp_path / "empty"
    empty.mkdir()
    missing = _load(empty)
    assert isinstance(missing, MissingInputs)
    with pytest.raises(ValueError, match="no preprocessing for image_text inputs"):
        missing(texts=["a"])
    assert pair_inputs(missing, missing, {}).length is None
