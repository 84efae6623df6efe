"""Other sizes and channels for networks that slide over images: features and config."""

import jax
import numpy as np
import pytest
from family_cases import backbone

from jtl.models.export import export
from jtl.models.heads import Linear
from jtl.models.load import load_backbone
from jtl.models.model import attach


@pytest.mark.parametrize("model_type", ["convnext", "efficientnet_lite", "resnet", "swin"])
def test_twice_the_channels_of_twice_the_same_image_give_its_features(tmp_path, model_type):
    made = backbone(model_type)
    export(tmp_path / "x", attach(made, {"head": Linear(2)}, key=jax.random.key(0)))
    wide = load_backbone(tmp_path / "x", image_size=(64, 48), channels=6)
    assert wide.config["num_channels"] == 6 and wide.config["image_size"] == [64, 48]
    image = np.random.default_rng(0).normal(size=(2, 64, 48, 3)).astype(np.float32)
    expected = made({"pixel_values": image})["pooled"]
    got = wide({"pixel_values": np.concatenate([image, image], axis=-1)})["pooled"]
    np.testing.assert_allclose(got, expected, atol=1e-4 * max(1.0, np.abs(expected).max()))
