"""timm's architectures by name: each gives a network of the size that it is known for."""

import jax
import pytest

from jtl.models import foreign, load
from jtl.models.families import family

# Parameters of the backbone and of a head of 1,000 classes.
_KNOWN = {
    "resnet18": 11_689_512,
    "resnet50.a1_in1k": 25_557_032,
    "resnet152": 60_192_808,
    "convnext_tiny.fb_in1k": 28_589_128,
    "convnextv2_nano": 15_623_800,
    "swin_base_patch4_window7_224": 87_768_224,
    "tf_efficientnet_lite0.in1k": 4_652_008,
}


@pytest.mark.parametrize("name", sorted(_KNOWN))
def test_sizes(name):
    config = foreign.recognised({"architecture": name, "num_classes": 1000})
    assert config is not None and len(config["id2label"]) == 1000
    row = family(config["model_type"])
    whole = load.full_config(row, config)
    shapes = jax.eval_shape(row.make(whole, "mean").init, jax.random.key(0), row.example(whole))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert count + 1000 * (row.dim(whole) + 1) == _KNOWN[name]


@pytest.mark.parametrize("name", ["resnet50d", "convnext_tiny_hnf", "swin_s3_tiny_224", "vgg16"])
def test_others_are_not_taken_for_these(name):
    config = foreign.recognised({"architecture": name})
    assert config is None


def test_the_number_of_classes_may_lie_in_the_pretrained_config():
    config = foreign.recognised({"architecture": "resnet18", "pretrained_cfg": {"num_classes": 7}})
    assert config is not None and len(config["id2label"]) == 7
