"""SatMAE and Prithvi: published names, formulas done again by numpy; parity with ViTMAE."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from jtl.models import export, foreign, load
from jtl.models.families.satellite import PRITHVI, SATMAE, SATMAE_TEMPORAL
from jtl.models.heads import Linear
from jtl.models.layers.sincos import sincos, sincos_2d, sincos_3d
from jtl.models.model import attach
from jtl.weights.rename import torch_name

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    mlp_ratio=2.0,
    image_size=8,
    patch_size=4,
    num_frames=3,
    num_channels=3,
    initializer_range=0.3,
)
CONFIGS = {
    "satmae": dict(
        SIZES, num_channels=5, channel_groups=[[0, 3], [4, 1, 2]], channel_embed=8, num_frames=1
    ),
    "satmae_temporal": dict(SIZES, time_embed=12),
    "prithvi": dict(
        SIZES,
        patch_size=[1, 4, 4],
        coords_encoding=["time", "location"],
        coords_scale_learn=True,
    ),
}
ROWS = {"satmae": SATMAE, "satmae_temporal": SATMAE_TEMPORAL, "prithvi": PRITHVI}
# The config.json of Prithvi-EO 2.0, 300M, with times and places.
PRITHVI_300M_TL = {
    "architecture": "prithvi_eo_v2_300_tl",
    "num_features": 1024,
    "pretrained_cfg": {
        "img_size": 224,
        "num_frames": 4,
        "patch_size": [1, 16, 16],
        "in_chans": 6,
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "mlp_ratio": 4,
        "coords_encoding": ["time", "location"],
        "coords_scale_learn": True,
    },
}


@functools.cache
def _made(kind, pooling="cls"):
    return load.new_backbone(kind, CONFIGS[kind], key=jax.random.key(0), pooling=pooling)


@functools.cache
def _batch(kind, n=2):
    rng = np.random.default_rng(0)
    batch = {
        name: rng.normal(size=(n, *leaf.shape[1:])).astype(np.float32)
        for name, leaf in ROWS[kind].example(_made(kind).config).items()
    }
    if "timestamps" in batch:
        batch["timestamps"] = rng.integers(0, 20, (n, 3, 3)).astype(np.float32)
    if "temporal_coords" in batch:
        batch["temporal_coords"] = np.array([[[2019, 5], [2019, 200], [2020, 364]]] * n, np.float32)
        batch["location_coords"] = np.array([[47.5, -122.0], [-3.0, 36.8]], np.float32)[:n]
    return {name: jnp.asarray(value) for name, value in batch.items()}


def _stem(kind, batch, params=None):
    made = _made(kind)
    return made.module.apply({"params": params or made.params}, batch, frozenset(), 1)


def _published_shapes(kind, config):
    """Names and shapes under which a backbone of this config is written, in PyTorch's layout."""
    row = ROWS[kind]
    whole = load.full_config(row, config)
    module = row.make(whole, "cls", jnp.float32)
    tree = jax.eval_shape(module.init, jax.random.key(0), row.example(whole))["params"]
    shapes = {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        name, layout = torch_name(path, row.rules)
        rank = len(leaf.shape)
        axes = {
            "same": range(rank),
            "dense": (1, 0),
            "conv": (rank - 1, rank - 2, *range(rank - 2)),
        }
        shapes[name] = tuple(leaf.shape[axis] for axis in axes[layout])
    return shapes


def _blocks(count, dim):
    shapes = {
        "norm1.weight": (dim,),
        "norm1.bias": (dim,),
        "attn.qkv.weight": (3 * dim, dim),
        "attn.qkv.bias": (3 * dim,),
        "attn.proj.weight": (dim, dim),
        "attn.proj.bias": (dim,),
        "norm2.weight": (dim,),
        "norm2.bias": (dim,),
        "mlp.fc1.weight": (4 * dim, dim),
        "mlp.fc1.bias": (4 * dim,),
        "mlp.fc2.weight": (dim, 4 * dim),
        "mlp.fc2.bias": (dim,),
    }
    rows = {f"blocks.{i}.{name}": shape for i in range(count) for name, shape in shapes.items()}
    return {**rows, "norm.weight": (dim,), "norm.bias": (dim,), "cls_token": (1, 1, dim)}


def test_the_names_of_satmae_of_grouped_bands():
    assert _published_shapes("satmae", {}) == {
        **_blocks(24, 1024),
        "pos_embed": (1, 145, 768),
        "channel_embed": (1, 3, 256),
        "channel_cls_embed": (1, 1, 256),
        "patch_embed.0.proj.weight": (1024, 4, 8, 8),
        "patch_embed.0.proj.bias": (1024,),
        "patch_embed.1.proj.weight": (1024, 4, 8, 8),
        "patch_embed.1.proj.bias": (1024,),
        "patch_embed.2.proj.weight": (1024, 2, 8, 8),
        "patch_embed.2.proj.bias": (1024,),
    }


def test_the_names_of_satmae_of_series():
    assert _published_shapes("satmae_temporal", {}) == {
        **_blocks(24, 1024),
        "pos_embed": (1, 197, 640),
        "patch_embed.proj.weight": (1024, 3, 16, 16),
        "patch_embed.proj.bias": (1024,),
    }


def test_the_names_of_prithvi():
    config = foreign.recognised(PRITHVI_300M_TL)
    assert _published_shapes("prithvi", config) == {
        **_blocks(24, 1024),
        "patch_embed.proj.weight": (1024, 6, 1, 16, 16),
        "patch_embed.proj.bias": (1024,),
        "temporal_embed_enc.scale": (1,),
        "location_embed_enc.scale": (1,),
    }
    shapes = _published_shapes("prithvi", {})
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 86_237_184


def _line(values, dim):
    """Sines, then cosines, written as the paper has them."""
    values = np.asarray(values, np.float64).ravel()
    speeds = [10000.0 ** (-2 * i / dim) for i in range(dim // 2)]
    rows = [[np.sin(p * w) for w in speeds] + [np.cos(p * w) for w in speeds] for p in values]
    return np.array(rows)


def test_tables_of_sines_and_cosines():
    for value, own in zip((0.0, 3.0, 365.0), _line([0, 3, 365], 12), strict=True):
        np.testing.assert_allclose(sincos(jnp.array(value), 12), own, atol=2e-5)
    table = sincos_2d(2, 3, 8)
    assert table.shape == (7, 8) and not table[0].any()
    for row in range(2):
        for column in range(3):
            expected = np.concatenate([_line([column], 4)[0], _line([row], 4)[0]])
            np.testing.assert_allclose(table[1 + row * 3 + column], expected, atol=1e-6)
    table = sincos_3d(2, 3, 4, 32, before=0)
    for place, (frame, row, column) in enumerate(np.ndindex(2, 3, 4)):
        parts = [_line([column], 12)[0], _line([row], 12)[0], _line([frame], 8)[0]]
        np.testing.assert_allclose(table[place], np.concatenate(parts), atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 16"):
        sincos_3d(1, 1, 1, 24)


def _cut(images, kernel, bias):
    """Patches of 4 x 4 by the kernel, (n, patches, dim), written as loops over patches."""
    n, height, width, _ = images.shape
    rows = [
        np.einsum("nhwc,hwcd->nd", images[:, y : y + 4, x : x + 4], kernel) + bias
        for y in range(0, height, 4)
        for x in range(0, width, 4)
    ]
    return np.stack(rows, axis=1)


def test_groups_of_bands_lie_behind_one_another():
    made, batch = _made("satmae"), _batch("satmae")
    own = jax.tree.map(np.asarray, made.params["embeddings"])
    images = np.asarray(batch["pixel_values"])
    hidden = [own["cls_token"][0] + np.concatenate([own["pos_embed"][0, :1], np.zeros((1, 8))], 1)]
    expected = [np.broadcast_to(hidden[0][None], (2, 1, 32))]
    for i, group in enumerate([[0, 3], [4, 1, 2]]):
        leaf = own[f"patch_embed_{i}"]["proj"]
        patches = _cut(images[..., group], leaf["kernel"], leaf["bias"])
        channel = np.broadcast_to(_line([i], 8), (4, 8))
        expected.append(patches + np.concatenate([sincos_2d(2, 2, 24)[1:], channel], 1)[None])
    got = _stem("satmae", batch)
    np.testing.assert_allclose(got, np.concatenate(expected, axis=1), atol=2e-5)
    np.testing.assert_allclose(own["channel_embed"][0], _line([0, 1], 8), atol=1e-6)


def test_frames_have_their_dates():
    made, batch = _made("satmae_temporal"), _batch("satmae_temporal")
    own = jax.tree.map(np.asarray, made.params["embeddings"])
    leaf, table = own["patch_embed"]["proj"], sincos_2d(2, 2, 20)
    first = own["cls_token"] + np.concatenate([table[:1], np.zeros((1, 12))], 1)[None]
    expected = [np.broadcast_to(first, (2, 1, 32))]
    for frame in range(3):
        images = np.asarray(batch["pixel_values"])[:, frame]
        dates = np.asarray(batch["timestamps"])[:, frame]
        coded = np.concatenate([_line(dates[:, i], 4) for i in range(3)], axis=1)
        beside = np.broadcast_to(coded[:, None], (2, 4, 12))
        places = np.broadcast_to(table[None, 1:], (2, 4, 20))
        patches = _cut(images, leaf["kernel"], leaf["bias"])
        expected.append(patches + np.concatenate([places, beside], axis=-1))
    got = _stem("satmae_temporal", batch)
    np.testing.assert_allclose(got, np.concatenate(expected, axis=1), atol=2e-5)


def test_tubelets_have_frame_row_column_date_and_place():
    made, batch = _made("prithvi"), _batch("prithvi")
    own = jax.tree.map(np.asarray, made.params["embeddings"])
    leaf = own["patch_embed"]["proj"]
    images, dates = np.asarray(batch["pixel_values"]), np.asarray(batch["temporal_coords"])
    expected = [np.broadcast_to(own["cls_token"], (2, 1, 32))]
    for frame in range(3):
        patches = _cut(images[:, frame], leaf["kernel"][0], leaf["bias"])
        date = np.concatenate([_line(dates[:, frame, i], 16) for i in range(2)], axis=1)
        table = sincos_3d(3, 2, 2, 32)[1 + 4 * frame : 5 + 4 * frame]
        expected.append(patches + table[None] + 0.1 * date[:, None])
    where = np.asarray(batch["location_coords"])
    where = np.concatenate([_line(where[:, i], 16) for i in range(2)], axis=1)
    expected = np.concatenate(expected, axis=1)
    expected[:, 1:] += 0.1 * where[:, None]
    # float32 holds a year to 1e-4, and the fastest sine is of the year itself.
    np.testing.assert_allclose(_stem("prithvi", batch), expected, atol=1e-4)
    without = {"pixel_values": batch["pixel_values"]}
    np.testing.assert_allclose(
        _stem("prithvi", without)[:, 1] - _stem("prithvi", batch)[:, 1],
        -0.1 * (where + np.concatenate([_line(dates[:, 0, i], 16) for i in range(2)], axis=1)),
        atol=1e-4,
    )


def test_prithvi_takes_other_frames_and_sizes():
    made = _made("prithvi")
    zeros = jax.tree.map(jnp.zeros_like, made.params)
    images = jnp.zeros((1, 5, 8, 8, 3))
    got = _stem("prithvi", {"pixel_values": images}, zeros)[0, 1:]
    np.testing.assert_array_equal(got, sincos_3d(5, 2, 2, 32, before=0))
    wide = _stem("prithvi", {"pixel_values": jnp.zeros((1, 3, 8, 12, 3))}, zeros)[0, 1:]
    table, wide = sincos_3d(3, 2, 2, 32, before=0).reshape(3, 2, 2, 32), wide.reshape(3, 2, 3, 32)
    np.testing.assert_allclose(wide[:, :, 0], table[:, :, 0], atol=1e-6)  # corners stay
    np.testing.assert_allclose(wide[:, :, 2], table[:, :, 1], atol=1e-6)
    np.testing.assert_allclose(wide[:, :, 1], (table[:, :, 0] + table[:, :, 1]) / 2, atol=1e-6)


def test_one_frame_needs_no_axis():
    config = dict(CONFIGS["prithvi"], num_frames=1, coords_encoding=[])
    made = load.new_backbone("prithvi", config, key=jax.random.key(0))
    images = jnp.ones((2, 8, 8, 3))
    one, two = (made({"pixel_values": x})["tokens"] for x in (images, images[:, None]))
    np.testing.assert_array_equal(one, two)


def _file(folder, kind, prefix="", **more):
    """A published file of a backbone: its names, more of them, and no config."""
    model = attach(_made(kind), {"head": Linear(2)}, key=jax.random.key(0))
    export.export(folder, model)
    tensors = load_file(folder / "model.safetensors")
    tensors = {f"{prefix}{name}": value for name, value in tensors.items()} | more
    (folder / "published").mkdir()
    save_file(tensors, folder / "published" / "model.safetensors")
    return folder / "published"


_ONE = np.zeros(1, np.float32)


@pytest.mark.parametrize(
    ("kind", "prefix", "more"),
    [
        ("satmae", "", {"decoder_blocks.0.norm1.bias": _ONE, "mask_token": _ONE}),
        ("satmae_temporal", "module.", {"head.bias": _ONE}),
        (
            "prithvi",
            "encoder.",
            {
                "encoder.pos_embed": _ONE,
                "decoder.decoder_pos_embed": _ONE,
                "decoder.temporal_embed_dec.scale": _ONE,
                "decoder.mask_token": _ONE,
            },
        ),
        ("prithvi", "", {"pos_embed": _ONE, "decoder_embed.bias": _ONE, "mask_token": _ONE}),
    ],
)
def test_published_files_are_read(tmp_path, kind, prefix, more):
    folder = _file(tmp_path, kind, prefix, **more)
    again = load.load_backbone(folder / "model.safetensors", family=kind, config=CONFIGS[kind])
    assert again.report.fresh == again.report.wrong_shape == ()
    jax.tree.map(np.testing.assert_array_equal, again.params, _made(kind).params)


def test_a_folder_of_prithvi_says_what_it_is(tmp_path):
    folder = _file(tmp_path, "prithvi", "encoder.")
    names = {"hidden_size": "embed_dim", "num_hidden_layers": "depth", "image_size": "img_size"}
    names |= {"num_attention_heads": "num_heads", "num_channels": "in_chans"}
    stated = {names.get(name, name): value for name, value in CONFIGS["prithvi"].items()}
    whole = {"architecture": "prithvi_eo_v2_300_tl", "pretrained_cfg": stated}
    (folder / "config.json").write_text(json.dumps(whole))
    again = load.load_backbone(folder)
    batch = _batch("prithvi")
    np.testing.assert_array_equal(again(batch)["pooled"], _made("prithvi")(batch)["pooled"])


def test_a_fine_tuned_satmae_has_its_norm_behind_the_mean(tmp_path):
    folder = _file(tmp_path, "satmae")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: value
               for name, value in tensors.items()}  # fmt: skip
    file.unlink()
    save_file(tensors, file)
    again = load.load_backbone(file, family="satmae", config=CONFIGS["satmae"], pooling="mean_norm")
    out = again(_batch("satmae"))
    mean = np.asarray(out["tokens"][:, 1:]).mean(1)
    normal = (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out["pooled"], normal, atol=1e-4)
    mean = _made("satmae", "mean")(_batch("satmae"))
    np.testing.assert_allclose(mean["pooled"], mean["tokens"][:, 1:].mean(1), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("satmae", {"channel_groups": [[0, 5]]}, r"bands \[5\] that are not among the 5"),
        ("satmae", {"channel_groups": []}, "give groups of places from 0"),
        ("prithvi", {"coords_encoding": ["place"]}, "known are 'time', for patches of one frame"),
        ("prithvi", {"patch_size": [3, 4, 4]}, "known are 'time', for patches of one frame"),
        ("prithvi", {"num_attention_heads": 3}, "num_attention_heads=3 does not divide"),
    ],
)
def test_config_errors(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        load.new_backbone(kind, {**CONFIGS[kind], **changes}, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "satmae_temporal",
            {"timestamps": jnp.zeros((2, 3))},
            r"'timestamps' must be .*\(2, 3, 3\)",
        ),
        ("satmae_temporal", {"pixel_values": jnp.zeros((2, 8, 8, 3))}, "reads 3 frames in"),
        ("prithvi", {"pixel_values": jnp.zeros((2, 3, 8, 8, 4))}, "the model reads 3 channels"),
        (
            "prithvi",
            {"location_coords": jnp.zeros((2, 3))},
            r"'location_coords' must be .*\(2, 2\)",
        ),
    ],
)
def test_bad_batches_are_named(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        _stem(kind, {**_batch(kind), **changes})


def test_sizes_and_channels_are_adapted(tmp_path):
    folder = _file(tmp_path, "satmae")
    options = dict(family="satmae", config=CONFIGS["satmae"])
    wide = load.load_backbone(folder / "model.safetensors", **options, image_size=(8, 16))
    assert wide.params["embeddings"]["pos_embed"].shape == (1, 9, 24)
    assert wide({"pixel_values": jnp.ones((1, 8, 16, 5))})["tokens"].shape == (1, 1 + 16, 32)
    with pytest.raises(ValueError, match="channels= is given and satmae has nothing to adapt"):
        load.load_backbone(folder / "model.safetensors", **options, channels=3)


def test_prithvi_normalises_as_its_config_states(tmp_path):
    file = _file(tmp_path, "prithvi") / "model.safetensors"
    stated = {**CONFIGS["prithvi"], "mean": [1087, 1342.0, 1433.0], "std": [2248.0, 2179.0, 2178.0]}
    made = load.load_backbone(file, family="prithvi", config=stated)
    images = np.full((2, 3, 8, 12, 3), 1433.0)
    pixels = made.inputs(images)["pixel_values"]
    np.testing.assert_allclose(pixels[0, 0, 0, 0], [346 / 2248, 91 / 2179, 0.0], rtol=1e-6)
    batch = {**_batch("prithvi"), "pixel_values": pixels}
    assert made(batch)["tokens"].shape == (2, 1 + 3 * 2 * 3, 32)
    export.export(tmp_path / "x", attach(made, {"x": Linear(2)}, key=jax.random.key(0)))
    assert load.load_backbone(tmp_path / "x").inputs == made.inputs
    silent = load.load_backbone(file, family="prithvi", config=CONFIGS["prithvi"])
    with pytest.raises(ValueError, match="has no preprocessing for image inputs"):
        silent.inputs(images)


def test_satmae_normalises_as_its_authors_do():
    inputs = SATMAE.inputs(load.full_config(SATMAE, {}))
    # fMoW-Sentinel: B2 has mean 1184.3824625 and deviation 650.2842772, B12 has mean 1247.91870117.
    images = np.zeros((1, 96, 96, 10)) + np.array([1184.3824625, *[0.0] * 8, 1247.91870117])
    images[0, 0, 0] = 1e5
    images[0, 0, 1] = np.array([1184.3824625 - 650.2842772, *[-9999.0] * 9])
    made = inputs(images)["pixel_values"][0]
    np.testing.assert_allclose(made[5, 5, [0, 9]], 127 / 255, rtol=1e-6)  # half of 255, in bytes
    np.testing.assert_array_equal(made[0, 0], np.ones(10))
    np.testing.assert_allclose(made[0, 1], [63 / 255, *[0.0] * 9], rtol=1e-6)
    assert SATMAE.inputs(load.full_config(SATMAE, CONFIGS["satmae"])) is None
    series = SATMAE_TEMPORAL.inputs(load.full_config(SATMAE_TEMPORAL, {}))
    white = series(np.full((1, 3, 224, 224, 3), 255, np.uint8))["pixel_values"]
    mean, std = 0.4182007312774658, 0.28774282336235046
    np.testing.assert_allclose(white[0, 2, 3, 4, 0], (1 - mean) / std, rtol=1e-6)
    assert PRITHVI.inputs(load.full_config(PRITHVI, {})) is None


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=8, patch_size=4, num_channels=3, layer_norm_eps=1e-6, mask_ratio=0.0,
        decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mae")
    return oracle.peer("ViTMAEModel", folder, **sizes), load_file(folder / "model.safetensors")


def _as_timm(stored):
    """The encoder of transformers under the names that SatMAE and Prithvi have."""
    names = {"layernorm.weight": "norm.weight", "layernorm.bias": "norm.bias"}
    parts = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    tensors = {ours: stored[theirs] for theirs, ours in names.items()}
    for i in range(2):
        for kind in ("weight", "bias"):
            layer = f"encoder.layer.{i}."
            fused = [
                stored[f"{layer}attention.attention.{name}.{kind}"]
                for name in ("query", "key", "value")
            ]
            tensors[f"blocks.{i}.attn.qkv.{kind}"] = np.concatenate(fused)
            for theirs, ours in parts.items():
                tensors[f"blocks.{i}.{ours}.{kind}"] = stored[f"{layer}{theirs}.{kind}"]
    return {**tensors, "cls_token": stored["embeddings.cls_token"]}


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["satmae", "prithvi"])
def test_one_group_or_frame_is_vitmae_without_masking(peer, tmp_path, kind):
    import torch

    model, stored = peer
    tensors = _as_timm(stored)
    kernel = stored["embeddings.patch_embeddings.projection.weight"]
    bias = stored["embeddings.patch_embeddings.projection.bias"]
    config = dict(SIZES, num_frames=1, layer_norm_eps=1e-6)
    if kind == "satmae":
        table = stored["embeddings.position_embeddings"]
        channel = np.random.default_rng(1).normal(size=(1, 1, 8)).astype(np.float32)
        tensors |= {"patch_embed.0.proj.weight": kernel, "patch_embed.0.proj.bias": bias}
        tensors |= {"pos_embed": table[..., :24], "channel_embed": channel}
        tensors["channel_cls_embed"] = table[:, :1, 24:]
        config |= dict(channel_groups=[[0, 1, 2]], channel_embed=8)
        table = np.concatenate([table[..., :24], np.repeat(channel, 5, axis=1)], axis=-1)
        table[:, :1, 24:] = tensors["channel_cls_embed"]
    else:
        tensors |= {"patch_embed.proj.weight": kernel[:, :, None], "patch_embed.proj.bias": bias}
        config["patch_size"] = [1, 4, 4]
        table = sincos_3d(1, 2, 2, 32)[None]
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "x.safetensors")
    backbone = load.load_backbone(tmp_path / "x.safetensors", family=kind, config=config)
    with torch.no_grad():
        model.embeddings.position_embeddings.copy_(torch.tensor(table))
        images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
        batch = {"pixel_values": jnp.asarray(images)}
        noise = torch.arange(4.0).repeat(2, 1)
        theirs = model(**oracle.to_torch(batch), noise=noise, output_hidden_states=True)
    oracle.close(backbone(batch)["tokens"], theirs.last_hidden_state)
    for stop, hidden in enumerate(theirs.hidden_states, start=1):
        run = backbone.module.apply({"params": backbone.params}, batch, frozenset(), stop)
        oracle.close(run, hidden)
