"""BioViL's image side: published names, what lies beside the file; parity with its definition."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from PIL import Image

from jtl.models import load
from jtl.models.families.biovil import BIOVIL_IMAGE
from jtl.models.inputs import load_inputs
from jtl.weights.rename import torch_name

SIZES = dict(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], projection_size=6)


def test_names_are_those_of_the_published_file():
    names = {
        "encoder/embedder/embedder/convolution/kernel": "encoder.encoder.conv1.weight",
        "encoder/embedder/embedder/normalization/mean": "encoder.encoder.bn1.running_mean",
        "encoder/encoder/stages/2/layers/5/layer/1/normalization/scale": (
            "encoder.encoder.layer3.5.bn2.weight"
        ),
        "encoder/encoder/stages/0/layers/0/shortcut/convolution/kernel": (
            "encoder.encoder.layer1.0.downsample.0.weight"
        ),
        "encoder/encoder/stages/0/layers/0/shortcut/normalization/var": (
            "encoder.encoder.layer1.0.downsample.1.running_var"
        ),
        "projector/hidden/kernel": "projector.model.0.weight",
        "projector/output/bias": "projector.model.3.bias",
    }
    for ours, theirs in names.items():
        assert torch_name(ours, BIOVIL_IMAGE.rules)[0] == theirs


def test_the_whole_network_has_as_many_tensors_as_the_file():
    config = load.full_config(BIOVIL_IMAGE, {})
    module = BIOVIL_IMAGE.make(config, "projection", jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), BIOVIL_IMAGE.example(config))
    leaves = [len(jax.tree.leaves(shapes[name])) for name in ("params", "batch_stats")]
    # torchvision's ResNet-50: 53 convolutions and norms; the projector: two layers and a norm.
    assert leaves == [53 * 3 + 5, 53 * 2 + 2]


def test_images_are_resized_and_cut_as_by_the_authors(tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (600, 768), np.uint8))
    stated = {**SIZES, "num_channels": 3}
    made = load_inputs(tmp_path, "image", stated, published=BIOVIL_IMAGE.inputs)
    got = made([image])["pixel_values"]
    small = np.asarray(image.resize((655, 512), Image.Resampling.BILINEAR))
    left = (655 - 448) // 2
    expected = small[32 : 32 + 448, left : left + 448].astype(np.float32) / 255
    assert got.shape == (1, 448, 448, 3)
    for channel in range(3):
        np.testing.assert_allclose(got[0, ..., channel], expected, atol=1e-6)
    made.save(tmp_path)
    again = load_inputs(tmp_path, "image", {})
    np.testing.assert_array_equal(again([image])["pixel_values"], got)


def test_poolings():
    images = {"pixel_values": jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 48, 3)))}
    images = {"pixel_values": images["pixel_values"].astype(jnp.float32)}
    made = {
        pooling: load.new_backbone("biovil_image", SIZES, key=jax.random.key(0), pooling=pooling)
        for pooling in BIOVIL_IMAGE.poolings
    }
    out = {pooling: backbone(images) for pooling, backbone in made.items()}
    projected = out["projection"]
    np.testing.assert_allclose(projected["pooled"], projected["patch_embeds"].mean(1), atol=1e-6)
    np.testing.assert_allclose(out["mean"]["pooled"], out["mean"]["tokens"].mean(1), atol=1e-5)
    assert {p: b.dim for p, b in made.items()} == {"projection": 6, "mean": 24}
    assert "patch_embeds" not in out["mean"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The network as it is defined, from transformers' ResNet, in a file of published names."""
    import torch
    import transformers

    network = {name: SIZES[name] for name in ("embedding_size", "hidden_sizes", "depths")}
    resnet = transformers.ResNetModel(transformers.ResNetConfig(**network))
    project = torch.nn.Sequential(
        torch.nn.Conv2d(24, 6, 1, bias=False),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.Conv2d(6, 6, 1),
    )
    peer = torch.nn.ModuleDict({"encoder": resnet, "projector": project}).eval()
    oracle.randomise(peer, torch.Generator().manual_seed(0), 0.3)
    stored = {_published(name): leaf for name, leaf in peer.state_dict().items()}
    stored["encoder.encoder.fc.weight"] = torch.zeros(10, 24)
    folder = tmp_path_factory.mktemp("biovil")
    torch.save(stored, folder / "biovil_image.pt")
    text = {"model_type": "cxr-bert", "hidden_size": 768, "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps({**text, **SIZES}))
    backbone = load.load_backbone(folder / "biovil_image.pt", family="biovil_image")
    return peer, backbone


def _published(name):
    part, *rest = name.split(".")
    if part == "projector":
        return ".".join(("projector.model", *rest))
    kinds = {"convolution": "conv", "normalization": "bn"}
    leaf = rest[-1]
    if rest[0] == "embedder":
        return f"encoder.encoder.{kinds[rest[2]]}1.{leaf}"
    place = f"encoder.encoder.layer{int(rest[2]) + 1}.{rest[4]}"
    if rest[5] == "shortcut":
        return f"{place}.downsample.{list(kinds).index(rest[6])}.{leaf}"
    return f"{place}.{kinds[rest[7]]}{int(rest[6]) + 1}.{leaf}"


@pytest.mark.parity
def test_outputs_and_gradients_are_those_of_the_definition(theirs):
    import torch

    peer, made = theirs
    assert made.inputs.size == (448, 448)
    rng = np.random.default_rng(0)
    images = {"pixel_values": rng.normal(size=(2, 40, 64, 3)).astype(np.float32)}
    maps = peer["encoder"](oracle.to_torch(images)["pixel_values"]).last_hidden_state
    projected = peer["projector"](maps)
    out = made(images)
    oracle.close(out["tokens"], maps.flatten(2).transpose(1, 2))
    oracle.close(out["patch_embeds"], projected.flatten(2).transpose(1, 2))
    oracle.close(out["pooled"], projected.mean((2, 3)))
    weight = rng.normal(size=(2, 6)).astype(np.float32) / 10

    def loss(params):
        variables = {"params": params, "batch_stats": made.stats}
        return jnp.sum(made.module.apply(variables, images)["pooled"] * weight)

    names = [(_published(name), leaf) for name, leaf in peer.named_parameters()]
    named = types.SimpleNamespace(zero_grad=peer.zero_grad, named_parameters=lambda: names)
    total = (projected.mean((2, 3)) * torch.tensor(weight)).sum()
    oracle.same_gradients(made, loss, named, total)
