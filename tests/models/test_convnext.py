"""ConvNeXt: names, values by hand, published layouts; parity with transformers' PyTorch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from flax.traverse_util import flatten_dict

from jtl.models import load
from jtl.models.backbone import stage_labels
from jtl.models.families.convnext import CONVNEXT, CONVNEXTV2, ResponseNorm
from jtl.models.load_head import load_head
from jtl.weights.rename import to_torch, torch_name
from jtl.weights.save import write

CONFIG = dict(num_stages=2, hidden_sizes=[6, 8], depths=[1, 2], patch_size=4, image_size=16)
TINY = dict(hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3])
_LAYER = {
    "dwconv/bias": (8,),
    "dwconv/kernel": (7, 7, 1, 8),
    "layer_scale_parameter": (8,),
    "layernorm/bias": (8,),
    "layernorm/scale": (8,),
    "pwconv1/bias": (32,),
    "pwconv1/kernel": (8, 32),
    "pwconv2/bias": (8,),
    "pwconv2/kernel": (32, 8),
}
KINDS = ("convnext", "convnextv2")
_CLASSES = {"convnext": "ConvNext", "convnextv2": "ConvNextV2"}


def _new(model_type="convnext", **changes):
    made = load.new_backbone(model_type, {**CONFIG, **changes}, key=jax.random.key(0))
    return made, _batch()


def _batch(n=2, size=(19, 26)):
    images = np.random.default_rng(0).normal(size=(n, *size, 3))
    return {"pixel_values": jnp.asarray(images, jnp.float32)}


def test_golden_tree():
    made, _ = _new()
    shapes = {path: leaf.shape for path, leaf in flatten_dict(made.params, sep="/").items()}
    assert {p: shapes.pop(f"encoder/stages/1/layers/1/{p}") for p in _LAYER} == _LAYER
    rest = {path: shape for path, shape in shapes.items() if "/layers/" not in path}
    assert rest == {
        "embeddings/layernorm/bias": (6,),
        "embeddings/layernorm/scale": (6,),
        "embeddings/patch_embeddings/bias": (6,),
        "embeddings/patch_embeddings/kernel": (4, 4, 3, 6),
        "encoder/stages/1/downsampling_layer/0/bias": (6,),
        "encoder/stages/1/downsampling_layer/0/scale": (6,),
        "encoder/stages/1/downsampling_layer/1/bias": (8,),
        "encoder/stages/1/downsampling_layer/1/kernel": (2, 2, 6, 8),
        "layernorm/bias": (8,),
        "layernorm/scale": (8,),
    }
    second = flatten_dict(_new("convnextv2")[0].params, sep="/")
    own = {path for path in second if path not in flatten_dict(made.params, sep="/")}
    assert own == {
        f"encoder/stages/{place}/grn/{leaf}"
        for place in ("0/layers/0", "1/layers/0", "1/layers/1")
        for leaf in ("weight", "bias")
    }
    assert not any("layer_scale" in path for path in second)


def test_tiny_has_the_size_that_it_is_known_for():
    module = CONVNEXT.make(load.full_config(CONVNEXT, TINY), "mean")
    example = CONVNEXT.example(load.full_config(CONVNEXT, TINY))
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert sizes == 28_589_128 - 1000 * 769  # without the head of its 1,000 classes


def test_response_norm_by_hand():
    # Two channels of norms 5 and 0: their mean is 2.5, so the first is scaled by 2, the other by 0.
    hidden = jnp.zeros((1, 1, 2, 2)).at[0, 0, :, 0].set(jnp.array([3.0, 4.0]))
    own = {"weight": jnp.full((1, 1, 1, 2), 10.0), "bias": jnp.full((1, 1, 1, 2), 0.5)}
    got = ResponseNorm().apply({"params": own}, hidden)
    np.testing.assert_allclose(got[0, 0, :, 0], [63.5, 84.5], rtol=1e-5)
    np.testing.assert_allclose(got[0, 0, :, 1], 0.5)
    slope = jax.grad(lambda x: ResponseNorm().apply({"params": own}, x).sum())(hidden)
    assert bool(jnp.isfinite(slope).all())


def test_a_layer_without_scale_is_its_input():
    made, batch = _new()
    flat = flatten_dict(made.params, sep="/")
    for path in flat:
        if path.endswith("layer_scale_parameter"):
            flat[path] = jnp.zeros_like(flat[path])
    params = jax.tree.unflatten(jax.tree.structure(made.params), list(flat.values()))
    first, second = (
        made.module.apply({"params": params}, batch, frozenset(), stop) for stop in (1, 2)
    )
    np.testing.assert_array_equal(first, second)


def test_stochastic_depth_drops_rows_of_live_blocks_alone():
    made, batch = _new(drop_path_rate=0.8, layer_scale_init_value=1.0)
    own, rows = {"params": made.params}, _batch(16)

    def run(live, stop):
        rngs = {"dropout": jax.random.key(1)}
        return made.module.apply(own, rows, live, stop, rngs=rngs)

    still, moving = (run(live, 4) for live in (frozenset({"block_1"}), frozenset({"block_2"})))
    before = run(frozenset(), 3)
    left_out = np.isclose(moving, before, atol=1e-6).all((1, 2, 3))
    assert 0 < left_out.sum() < 16  # of 16 rows at a rate of 0.8, whole rows pass the block
    np.testing.assert_array_equal(
        run(frozenset({"block_0", "stem", "top"}), 4), run(frozenset(), 4)
    )
    assert not np.allclose(still, moving)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(depths=[1]), r"depths=\(1,\) and hidden_sizes=\(6, 8\)"),
        (dict(hidden_act="geluu"), "activation 'geluu' is not known"),
        (dict(hidden_sizes=None), r"ConvNeXt config lacks \['hidden_sizes'\]"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        CONVNEXT.make({**CONFIG, **changes}, "mean")


_STEM = {"patch_embeddings": "0", "layernorm": "1"}


def _published(name, style):
    """The authors' or timm's name of one of transformers' names."""
    parts = name.split(".")
    authors = style == "authors"
    if parts[0] == "embeddings":
        return ".".join(["downsample_layers.0" if authors else "stem", _STEM[parts[1]], parts[2]])
    if parts[0] == "classifier":
        return f"head.{parts[1]}" if authors else f"head.fc.{parts[1]}"
    if parts[0] == "layernorm":
        return f"norm.{parts[1]}" if authors else f"head.norm.{parts[1]}"
    stage, rest = parts[2], parts[3:]
    if rest[0] == "downsampling_layer":
        lead = f"downsample_layers.{stage}" if authors else f"stages.{stage}.downsample"
        return ".".join([lead, *rest[1:]])
    lead = f"stages.{stage}.{rest[1]}" if authors else f"stages.{stage}.blocks.{rest[1]}"
    own = {"layernorm": "norm", "layer_scale_parameter": "gamma"}
    other = {"dwconv": "conv_dw", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2", "grn": "mlp.grn"}
    leaf = (
        {"weight": "gamma", "bias": "beta"}[rest[3]] if rest[2] == "grn" and authors else rest[-1]
    )
    middle = own.get(rest[2], rest[2] if authors else other.get(rest[2], rest[2]))
    return ".".join([lead, middle] if rest[2] == "layer_scale_parameter" else [lead, middle, leaf])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", ["authors", "timm"])
def test_published_layouts_load(tmp_path, kind, style):
    made, batch = _new(kind)
    names = {}
    for path, leaf in flatten_dict(made.params, sep="/").items():
        name, layout = torch_name(path, made.family.rules)
        array = to_torch(np.asarray(leaf), layout)
        flat_norm = style == "timm" and ".grn." in name
        names[_published(name, style)] = array.reshape(-1) if flat_norm else array
    assert (f"stages.1.{'blocks.' if style == 'timm' else ''}0.norm.weight") in names
    head = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    names[_published("classifier.weight", style)] = head
    names[_published("classifier.bias", style)] = np.ones(2, np.float32)
    write(tmp_path / "model.safetensors", names)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **CONFIG}))
    again = load.load_backbone(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, made.params, again.params)
    _, params = load_head(tmp_path, again, "classification")
    np.testing.assert_array_equal(params["classifier"]["kernel"], head.T)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    name = f"{_CLASSES[request.param]}ForImageClassification"
    return oracle.peer(name, folder, **CONFIG, num_labels=5), load.load_backbone(folder), folder


@pytest.mark.parity
def test_forward_is_that_of_transformers(pair):
    peer, made, folder = pair
    batch = _batch(2, (41, 54))
    theirs = peer.base_model(**oracle.to_torch(batch), output_hidden_states=True)
    out = made(batch)
    oracle.close(out["pooled"], theirs.pooler_output)
    oracle.close(out["tokens"], theirs.last_hidden_state.flatten(2).transpose(1, 2))
    for stop, hidden in zip((1, 2, 4), theirs.hidden_states, strict=True):
        got = made.module.apply({"params": made.params}, batch, frozenset(), stop)
        oracle.close(got, hidden.permute(0, 2, 3, 1))
    head, params = load_head(folder, made, "classification")
    logits = head.apply({"params": params}, out, batch)
    oracle.close(logits, peer(**oracle.to_torch(batch)).logits)
    half = load.load_backbone(folder, dtype=jnp.bfloat16)(batch)
    assert half["pooled"].dtype == jnp.bfloat16
    oracle.close(half["pooled"], out["pooled"], 0.1)


@pytest.mark.parity
def test_gradients_are_those_of_transformers(pair):
    import torch

    peer, made, _ = pair
    batch = _batch(2, (16, 24))
    weight = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)
    theirs = (peer.base_model(**oracle.to_torch(batch)).pooler_output * torch.tensor(weight)).sum()

    def loss(params):
        return jnp.sum(made.module.apply({"params": params}, batch)["pooled"] * weight)

    oracle.same_gradients(made, loss, peer.base_model, theirs)


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_of_tiny_are_those_of_transformers(kind):
    count = oracle.names_agree(f"{_CLASSES[kind]}Model", kind, **TINY)
    assert count == {"convnext": 180, "convnextv2": 198}[kind]


def test_groups_go_from_stem_to_top():
    for row in (CONVNEXT, CONVNEXTV2):
        rules = row.groups(CONFIG, "mean")
        assert [label for _, label in rules] == ["stem", "block_0", "block_1", *stage_labels(3)[2:]]
