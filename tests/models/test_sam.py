"""SAM's image encoder: names, values by hand, other sizes; parity with transformers' model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from flax.traverse_util import flatten_dict

from jtl.models import export, load
from jtl.models.families import sam
from jtl.models.families.sam import SAM_VISION, SIZES, sam_config
from jtl.models.layers.decomposed import decomposed_bias, resized_rows
from jtl.weights.checkpoint import Checkpoint, Tensor
from jtl.weights.load import fill
from jtl.weights.rename import to_torch, torch_name

# 5 x 5 patches in windows of 3: the last windows hold padding.
TINY = dict(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    mlp_ratio=1.5,
    image_size=20,
    patch_size=4,
    output_channels=8,
    window_size=3,
    global_attn_indexes=[1],
    initializer_range=0.3,
)
PARAMETERS = {"vit_b": 89_670_912, "vit_l": 308_278_272, "vit_h": 637_026_048}


def _batch(size=(20, 20), n=2):
    images = np.random.default_rng(0).normal(size=(n, *size, 3))
    return {"pixel_values": jnp.asarray(images, jnp.float32)}


@functools.cache
def _made():
    """A backbone whose positions are not the zeros that they begin as."""
    made = load.new_backbone("sam_vision_model", TINY, key=jax.random.key(0))
    return _moved(made)


def _moved(made):
    import dataclasses

    leaves, structure = jax.tree.flatten(made.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.3 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)
    ]
    return dataclasses.replace(made, params=jax.tree.unflatten(structure, moved))


@pytest.mark.parametrize("size", SIZES)
def test_the_trees_of_the_three_sizes(size):
    whole = load.full_config(SAM_VISION, SIZES[size])
    module = SAM_VISION.make(whole, "mean", jnp.float32)
    tree = jax.eval_shape(module.init, jax.random.key(0), SAM_VISION.example(whole))["params"]
    shapes = {name: leaf.shape for name, leaf in flatten_dict(tree, sep="/").items()}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == PARAMETERS[size]
    dim, heads = whole["hidden_size"], whole["num_attention_heads"]
    assert shapes["pos_embed"] == (1, 64, 64, dim)
    assert shapes["layers/0/attn/rel_pos_h"] == (27, dim // heads)
    last = whole["num_hidden_layers"] - 1
    assert shapes[f"layers/{last}/attn/rel_pos_w"] == (127, dim // heads)
    assert shapes[f"layers/{last}/attn/qkv/kernel"] == (dim, 3 * dim)
    assert shapes["neck/conv2/kernel"] == (3, 3, 256, 256)


def test_a_relative_position_by_hand():
    # One head of width 1 on a row of three places: the vector of distance +1 is 10, else 0.
    query = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    columns = jnp.array([0.0, 0.0, 0.0, 10.0, 0.0]).reshape(5, 1)
    bias = decomposed_bias(query, jnp.zeros((1, 1)), columns, 1, 3)
    assert bias[0, 0].tolist() == [[0, 0, 0], [20, 0, 0], [0, 30, 0]]


def test_windows_do_not_see_each_other_and_global_layers_do():
    made = _made()
    batch = _batch(n=1)
    changed = batch["pixel_values"].at[0, 0, 0, 0].add(3.0)  # of patch (0, 0)
    runs = [
        [made.module.apply({"params": made.params}, {"pixel_values": x}, frozenset(), stop)
         for stop in (2, 3)]
        for x in (batch["pixel_values"], changed)
    ]  # fmt: skip
    first, second = (np.abs(a - b).max(-1)[0] for a, b in zip(*runs, strict=True))
    assert (first[:3, :3] > 0).all() and not first[3:].any() and not first[:, 3:].any()
    assert (second > 0).all()


def test_out_is_the_map_of_the_neck():
    made = _made()
    out = made(_batch())
    assert out["map"].shape == (2, 5, 5, 8) and made.dim == 8
    np.testing.assert_array_equal(out["tokens"], out["map"].reshape(2, 25, 8))
    np.testing.assert_allclose(out["pooled"], out["tokens"].mean(1), atol=1e-6)
    # Normalised over the channels, before scale and bias.
    neck = made.params["neck"]["layer_norm2"]
    normal = (np.asarray(out["map"]) - np.asarray(neck["bias"])) / np.asarray(neck["scale"])
    np.testing.assert_allclose(normal.mean(-1), 0, atol=1e-4)


def test_another_image_size_interpolates_both_kinds_of_positions(tmp_path):
    from jtl.models.heads import Linear
    from jtl.models.model import attach

    made = _made()
    export.export(tmp_path / "x", attach(made, {"head": Linear(2)}, key=jax.random.key(0)))
    other = load.load_backbone(tmp_path / "x", image_size=(28, 16))
    assert other.params["pos_embed"].shape == (1, 7, 4, 16)
    shapes = {
        n: leaf.shape for n, leaf in other.params["layers"]["1"]["attn"].items() if "rel" in n
    }
    assert shapes == {"rel_pos_h": (13, 8), "rel_pos_w": (7, 8)}
    own = made.params["layers"]["0"]["attn"]["rel_pos_h"]
    np.testing.assert_array_equal(other.params["layers"]["0"]["attn"]["rel_pos_h"], own)
    assert other(_batch((28, 16)))["map"].shape == (2, 7, 4, 8)
    with pytest.raises(ValueError, match=r"images are \(20, 20\).*positions for \(28, 16\)"):
        other(_batch())


def _authors(backbone):
    """The names of the published .pth for the weights of a backbone."""
    stored = {}
    for path, leaf in flatten_dict(backbone.params, sep="/").items():
        name, layout = torch_name(path, SAM_VISION.rules)
        name = name.replace("vision_encoder.", "image_encoder.").replace(".projection.", ".proj.")
        name = name.replace(".layers.", ".blocks.").replace(".layer_norm", ".norm")
        for i, own in enumerate(("conv1", "norm1", "conv2", "norm2")):
            name = name.replace(f"neck.{own}.", f"neck.{i}.")
        stored[name] = to_torch(np.asarray(leaf), layout)
    return stored


@pytest.mark.parametrize("prefix", ["image_encoder.", "encoder.", ""])
def test_the_authors_files_are_read(tmp_path, prefix):
    backbone = _made()
    stored = {n.replace("image_encoder.", prefix): v for n, v in _authors(backbone).items()}
    assert f"{prefix}blocks.2.attn.rel_pos_h" in stored and f"{prefix}neck.3.weight" in stored
    if prefix == "image_encoder.":
        stored["mask_decoder.iou_token.weight"] = np.zeros(2, np.float32)
    tensors = {name: Tensor(value.shape, value.dtype) for name, value in stored.items()}
    checkpoint = Checkpoint("torch", tensors, stored.__getitem__, {}, tmp_path)
    checkpoint = SAM_VISION.layout(checkpoint, backbone.config)
    template = {"params": jax.eval_shape(lambda: backbone.params)}
    trees, report = fill(template, checkpoint, rules=SAM_VISION.rules)
    assert report.fresh == report.wrong_shape == ()
    assert all(name.startswith("mask_decoder") for name in report.unexpected)
    jax.tree.map(np.testing.assert_array_equal, trees["params"], backbone.params)


def test_errors():
    whole = load.full_config(SAM_VISION, TINY)
    with pytest.raises(ValueError, match=r"global_attn_indexes=\(3,\).*from 0 to 2"):
        sam_config({**whole, "global_attn_indexes": [3]})
    with pytest.raises(ValueError, match="num_attention_heads=3 does not divide hidden_size=16"):
        sam_config({**whole, "num_attention_heads": 3})
    with pytest.raises(ValueError, match="pooling 'cls' is not known to SAM"):
        SAM_VISION.make(whole, "cls", jnp.float32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam")
    peer = oracle.peer("SamVisionModel", folder, **TINY, attn_implementation="eager")
    return peer, load.load_backbone(folder), folder


@pytest.mark.parity
def test_every_layer_and_the_neck_agree(pair):
    import torch

    peer, made, _ = pair
    batch = _batch()
    with torch.no_grad():
        found = peer(**oracle.to_torch(batch), output_hidden_states=True)
    stops = [made.module.apply({"params": made.params}, batch, frozenset(), k) for k in (2, 3, 4)]
    for got, expected in zip(stops, found.hidden_states[-3:], strict=True):
        oracle.close(got, expected)
    oracle.close(made(batch)["map"], found.last_hidden_state.permute(0, 2, 3, 1))


@pytest.mark.parity
def test_gradients_agree_for_every_parameter(pair):
    peer, made, _ = pair
    batch = _batch()
    weights = np.random.default_rng(1).normal(size=(2, 5, 5, 8)).astype(np.float32)

    def loss(params):
        return jnp.sum(made.module.apply({"params": params}, batch)["map"] * weights)

    import torch

    theirs = peer(**oracle.to_torch(batch)).last_hidden_state.permute(0, 2, 3, 1)
    oracle.same_gradients(made, loss, peer, (theirs * torch.tensor(weights)).sum())


@pytest.mark.parity
def test_bfloat16_is_near_and_the_export_opens_in_transformers(pair, tmp_path):
    import torch
    import transformers

    from jtl.models.heads import Linear
    from jtl.models.model import attach

    peer, made, folder = pair
    batch = _batch()
    half = load.load_backbone(folder, dtype=jnp.bfloat16)(batch)["map"]
    gap = np.abs(np.asarray(half, np.float32) - np.asarray(made(batch)["map"]))
    assert half.dtype == jnp.bfloat16 and 0 < gap.mean() < 0.05
    export.export(tmp_path / "x", attach(made, {"head": Linear(2)}, key=jax.random.key(0)))
    again = transformers.SamVisionModel.from_pretrained(tmp_path / "x").eval()
    with torch.no_grad():
        found = again(**oracle.to_torch(batch)).last_hidden_state
    oracle.close(made(batch)["map"], found.permute(0, 2, 3, 1))


@pytest.mark.parity
def test_the_encoder_of_a_whole_sam_is_read(tmp_path):
    import torch

    rest = dict(prompt_encoder_config=dict(image_size=20, patch_size=4, hidden_size=8))
    rest["mask_decoder_config"] = dict(hidden_size=8, num_attention_heads=2, mlp_dim=8)
    peer = oracle.peer("SamModel", tmp_path, vision_config=TINY, **rest)
    made = load.load_backbone(tmp_path)  # its class says what part of it is read
    assert made.family is SAM_VISION and made.report.fresh == ()
    assert load.load_backbone(tmp_path, family="sam_vision_model").config == made.config
    batch = _batch()
    with torch.no_grad():
        found = peer.get_image_embeddings(**oracle.to_torch(batch))
    found = getattr(found, "last_hidden_state", found)
    oracle.close(made(batch)["map"], found.permute(0, 2, 3, 1))


@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES)
def test_names_agree_at_the_published_sizes(size):
    layers = SIZES[size]["num_hidden_layers"]
    count = oracle.names_agree("SamVisionModel", "sam_vision_model", **SIZES[size])
    assert count == 14 * layers + 2 + 1 + 6


@pytest.mark.parity
def test_relative_tables_of_another_length_are_those_of_pytorch():
    import torch

    table = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    for new in (3, 9, 13, 17):
        theirs = torch.nn.functional.interpolate(
            torch.tensor(table.T[None]), size=new, mode="linear"
        )[0].T
        oracle.close(resized_rows(jnp.asarray(table), new), theirs, 1e-6)


def test_sizes_are_the_published_ones():
    assert {name: sam.SIZES[name]["hidden_size"] for name in sam.SIZES} == {
        "vit_b": 768,
        "vit_l": 1024,
        "vit_h": 1280,
    }
