"""Swin: names, windows, sizes, published layouts; parity with transformers' PyTorch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from flax.traverse_util import flatten_dict

from jtl.models import load
from jtl.models.backbone import stage_labels
from jtl.models.families.swin import SWIN
from jtl.models.layers.windows import shifted_bias
from jtl.models.load_head import load_head
from jtl.weights.rename import to_torch, torch_name
from jtl.weights.save import write

CONFIG = dict(
    embed_dim=8,
    depths=[2, 2],
    num_heads=[2, 4],
    window_size=3,
    patch_size=2,
    image_size=14,
    mlp_ratio=2.0,
    initializer_range=0.3,
    drop_path_rate=0.0,
)
TINY = dict(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24])
_LAYER = {
    "attention/output/dense/bias": (8,),
    "attention/output/dense/kernel": (8, 8),
    "attention/self/key/bias": (8,),
    "attention/self/key/kernel": (8, 8),
    "attention/self/query/bias": (8,),
    "attention/self/query/kernel": (8, 8),
    "attention/self/relative_position_bias_table": (25, 2),
    "attention/self/value/bias": (8,),
    "attention/self/value/kernel": (8, 8),
    "intermediate/dense/bias": (16,),
    "intermediate/dense/kernel": (8, 16),
    "layernorm_after/bias": (8,),
    "layernorm_after/scale": (8,),
    "layernorm_before/bias": (8,),
    "layernorm_before/scale": (8,),
    "output/dense/bias": (8,),
    "output/dense/kernel": (16, 8),
}


def _batch(n=2, size=(13, 19)):
    images = np.random.default_rng(0).normal(size=(n, *size, 3))
    return {"pixel_values": jnp.asarray(images, jnp.float32)}


@pytest.fixture(scope="module")
def new():
    return load.new_backbone("swin", CONFIG, key=jax.random.key(0))


def test_golden_tree(new):
    shapes = {path: leaf.shape for path, leaf in flatten_dict(new.params, sep="/").items()}
    assert {p: shapes.pop(f"encoder/layers/0/blocks/1/{p}") for p in _LAYER} == _LAYER
    rest = {path: shape for path, shape in shapes.items() if "/blocks/" not in path}
    assert rest == {
        "embeddings/norm/bias": (8,),
        "embeddings/norm/scale": (8,),
        "embeddings/patch_embeddings/projection/bias": (8,),
        "embeddings/patch_embeddings/projection/kernel": (2, 2, 3, 8),
        "encoder/layers/0/downsample/norm/bias": (32,),
        "encoder/layers/0/downsample/norm/scale": (32,),
        "encoder/layers/0/downsample/reduction/kernel": (32, 16),
        "layernorm/bias": (16,),
        "layernorm/scale": (16,),
    }
    merging = [label for rule, label in new.groups if "downsample" in rule]
    assert merging == ["block_1"] and new.labels == stage_labels(4) and new.dim == 16


def test_tiny_has_the_size_that_it_is_known_for():
    config = load.full_config(SWIN, TINY)
    shapes = jax.eval_shape(SWIN.make(config, "mean").init, jax.random.key(0), SWIN.example(config))
    sizes = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert sizes == 28_288_354 - 1000 * 769  # without the head of its 1,000 classes


def test_places_of_opposite_edges_do_not_attend_to_each_other():
    bias = shifted_bias(6, 6, 3, 1)
    assert bias.shape == (4, 9, 9) and not bias[0].any()
    # The last window holds the last two rows and columns of the map, and the first of each.
    regions = np.array([0, 0, 1, 0, 0, 1, 2, 2, 3])
    expected = np.where(regions[:, None] == regions[None, :], 0.0, -100.0)
    np.testing.assert_array_equal(bias[3], expected)


@pytest.mark.parametrize("changes", [dict(drop_path_rate=0.9), dict(hidden_dropout_prob=0.5)])
def test_dropping_is_of_live_blocks_alone(new, changes):
    module = SWIN.make({**new.config, **changes}, "mean")
    own, batch, rngs = {"params": new.params}, _batch(4), {"dropout": jax.random.key(1)}
    run = jax.jit(lambda live: module.apply(own, batch, live, 4, rngs=rngs), static_argnums=0)
    before, moved = run(frozenset()), run(frozenset({"block_2", "block_3"}))
    np.testing.assert_array_equal(run(frozenset({"top"})), before)
    assert not np.allclose(before, moved, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_heads=[2, 3]), r"num_heads=\(2, 3\) do not divide the widths \(8, 16\)"),
        (dict(depths=[2]), r"depths=\(2,\) and num_heads=\(2, 4\)"),
        (dict(embed_dim=None), r"Swin config lacks \['embed_dim'\]"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        SWIN.make({**CONFIG, **changes}, "mean")


def test_images_of_maps_below_a_window_are_refused(new):
    with pytest.raises(ValueError, match="a map is 2 by 5, smaller than the windows of 3"):
        jax.eval_shape(lambda: new.module.apply({"params": new.params}, _batch(1, (8, 20))))


_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.self.relative_position_bias_table": "attn.relative_position_bias_table",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_ENDS = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.norm": "patch_embed.norm",
    "embeddings.position_embeddings": "absolute_pos_embed",
    "layernorm": "norm",
}


def _published(names, timm):
    """The authors' or timm's layout of tensors under transformers' names."""
    made = {}
    for name, array in names.items():
        own, _, leaf = name.rpartition(".")
        parts = own.split(".")
        if name in _ENDS or own in _ENDS:
            made[_ENDS.get(name) or f"{_ENDS[own]}.{leaf}"] = array
        elif "downsample" in name:
            made[f"layers.{int(parts[2]) + timm}.downsample.{parts[4]}.{leaf}"] = array
        else:
            lead, rest = f"layers.{parts[2]}.blocks.{parts[4]}", ".".join(parts[5:])
            if rest.endswith("query"):
                three = [names[name.replace("query", kind)] for kind in ("query", "key", "value")]
                made[f"{lead}.attn.qkv.{leaf}"] = np.concatenate(three)
            elif not rest.endswith(("key", "value")):
                whole = f"{rest}.{leaf}" in _BLOCK
                made[
                    f"{lead}.{_BLOCK[f'{rest}.{leaf}' if whole else rest]}"
                    + ("" if whole else f".{leaf}")
                ] = array
    made["layers.0.blocks.1.attn_mask"] = np.zeros((4, 9, 9), np.float32)
    made["layers.0.blocks.1.attn.relative_position_index"] = np.zeros((9, 9), np.int64)
    return made


@pytest.mark.parametrize("timm", [False, True])
def test_published_layouts_load(tmp_path, timm):
    config = {**CONFIG, "use_absolute_embeddings": True}
    made = load.new_backbone("swin", config, key=jax.random.key(0))
    names = {}
    for path, leaf in flatten_dict(made.params, sep="/").items():
        name, layout = torch_name(path, SWIN.rules)
        names[name] = to_torch(np.asarray(leaf), layout)
    names = _published(names, timm)
    assert {"layers.1.blocks.0.attn.qkv.weight", "layers.1.blocks.0.mlp.fc2.bias"} < set(names)
    head = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    lead = "head.fc" if timm else "head"
    names |= {f"{lead}.weight": head, f"{lead}.bias": np.ones(2, np.float32)}
    write(tmp_path / "model.safetensors", names)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "swin", **config}))
    again = load.load_backbone(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, made.params, again.params)
    _, params = load_head(tmp_path, again, "classification")
    np.testing.assert_array_equal(params["classifier"]["kernel"], head.T)


@pytest.fixture
def pair(tmp_path):  # each test its own: a small map turns the peer's shifts off for good
    folder = tmp_path
    peer = oracle.peer("SwinForImageClassification", folder, **CONFIG, num_labels=5)
    return peer, load.load_backbone(folder), folder


# Maps of 7 by 10 and 4 by 5, padded to whole windows; of 6 by 9 and 3 by 5, where a map is one
# window across and so is not shifted.
@pytest.mark.parity
@pytest.mark.parametrize("size", [(13, 19), (12, 18)])
def test_forward_is_that_of_transformers(pair, size):
    peer, made, folder = pair
    batch = _batch(2, size)
    theirs = peer.base_model(**oracle.to_torch(batch), output_hidden_states=True)
    run = jax.jit(made.module.apply, static_argnums=(2, 3))
    own = {"params": made.params}
    out = run(own, batch, frozenset(), None)
    oracle.close(out["pooled"], theirs.pooler_output)
    oracle.close(out["tokens"], theirs.last_hidden_state)
    for stop, hidden in zip((1, 3, 5), theirs.reshaped_hidden_states, strict=True):
        oracle.close(run(own, batch, frozenset(), stop), hidden.permute(0, 2, 3, 1))
    head, params = load_head(folder, made, "classification")
    logits = head.apply({"params": params}, out, batch)
    oracle.close(logits, peer(**oracle.to_torch(batch)).logits)


@pytest.mark.parity
def test_gradients_are_those_of_transformers(pair):
    import torch

    peer, made, _ = pair
    batch = _batch(2)
    weight = np.random.default_rng(1).normal(size=(2, 16)).astype(np.float32)
    theirs = (peer.base_model(**oracle.to_torch(batch)).pooler_output * torch.tensor(weight)).sum()

    def loss(params):
        return jnp.sum(made.module.apply({"params": params}, batch)["pooled"] * weight)

    oracle.same_gradients(made, loss, peer.base_model, theirs)


@pytest.mark.parity
def test_absolute_positions_and_bfloat16(tmp_path):
    peer = oracle.peer("SwinModel", tmp_path, **CONFIG, use_absolute_embeddings=True)
    batch = _batch(2, (14, 14))
    made = load.load_backbone(tmp_path)
    out = made(batch)
    oracle.close(out["pooled"], peer(**oracle.to_torch(batch)).pooler_output)
    half = load.load_backbone(tmp_path, dtype=jnp.bfloat16)(batch)
    assert half["pooled"].dtype == jnp.bfloat16
    oracle.close(half["pooled"], out["pooled"], 0.1)
    with pytest.raises(ValueError, match=r"have \(7, 10\) patches; .* positions for \(7, 7\)"):
        made(_batch())


@pytest.mark.parity
def test_names_and_shapes_of_tiny_are_those_of_transformers():
    assert oracle.names_agree("SwinModel", "swin", **TINY) == 219
