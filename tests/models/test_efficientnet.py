"""EfficientNet and its Lite: sizes, padding, names; parity with PyTorch; two known photographs."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from flax.traverse_util import flatten_dict

from jtl.models import load
from jtl.models.backbone import stage_labels
from jtl.models.families import efficientnet_sizes as sizes
from jtl.models.families.efficientnet import EFFICIENTNET, EFFICIENTNET_LITE
from jtl.models.load_head import load_head
from jtl.weights.rename import to_torch, torch_name
from jtl.weights.save import write

CONFIG = dict(
    width_coefficient=0.0125,
    depth_coefficient=1.0,
    hidden_dim=16,
    kernel_sizes=[3, 5],
    in_channels=[640, 640],
    out_channels=[640, 1280],
    strides=[1, 2],
    num_block_repeats=[1, 2],
    expand_ratios=[1, 2],
    drop_connect_rate=0.0,
    hidden_act="swish",
    num_channels=3,
)
LITE = {**CONFIG, "hidden_dim": 1280, "hidden_act": "relu6", "model_type": "efficientnet_lite"}
# (width, depth, image size, last width) of B0 to B7, from the paper's code.
SCALES = {
    "b0": (1.0, 1.0, 224, 1280),
    "b1": (1.0, 1.1, 240, 1280),
    "b2": (1.1, 1.2, 260, 1408),
    "b3": (1.2, 1.4, 300, 1536),
    "b4": (1.4, 1.8, 380, 1792),
    "b5": (1.6, 2.2, 456, 2048),
    "b6": (1.8, 2.6, 528, 2304),
    "b7": (2.0, 3.1, 600, 2560),
}


def _batch(n=2, size=(22, 30)):
    images = np.random.default_rng(0).normal(size=(n, *size, 3))
    return {"pixel_values": jnp.asarray(images, jnp.float32)}


def _shapes(row, config):
    config = load.full_config(row, config)
    module = row.make(config, "mean")
    tree = jax.eval_shape(module.init, jax.random.key(0), row.example(config))
    return {path: leaf.shape for path, leaf in flatten_dict(tree["params"], sep="/").items()}


def _count(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


def test_known_networks_have_the_sizes_that_they_are_known_for():
    head = 1000 * 1281
    b0 = dict(width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280)
    assert _count(_shapes(EFFICIENTNET, b0)) + head == 5_288_548
    for variant, millions in (("lite0", 4.65), ("lite2", 6.09), ("lite4", 13.0)):
        count = _count(_shapes(EFFICIENTNET_LITE, {"variant": variant})) + head
        assert round(count / 1e6, 2 if millions < 10 else 0) == millions
    largest = _shapes(EFFICIENTNET_LITE, {"variant": "lite4"})
    assert largest["embeddings/convolution/kernel"][-1] == 32


def test_golden_names_of_a_block():
    shapes = _shapes(EFFICIENTNET, CONFIG)
    block = {p.removeprefix("encoder/blocks/1/"): s for p, s in shapes.items() if "/blocks/1/" in p}
    assert block == {
        "depthwise_conv/depthwise_conv/kernel": (5, 5, 1, 16),
        "depthwise_conv/depthwise_norm/bias": (16,),
        "depthwise_conv/depthwise_norm/scale": (16,),
        "expansion/expand_bn/bias": (16,),
        "expansion/expand_bn/scale": (16,),
        "expansion/expand_conv/kernel": (1, 1, 8, 16),
        "projection/project_bn/bias": (16,),
        "projection/project_bn/scale": (16,),
        "projection/project_conv/kernel": (1, 1, 16, 16),
        "squeeze_excite/expand/bias": (16,),
        "squeeze_excite/expand/kernel": (1, 1, 2, 16),
        "squeeze_excite/reduce/bias": (2,),
        "squeeze_excite/reduce/kernel": (1, 1, 16, 2),
    }
    lite = _shapes(EFFICIENTNET_LITE, LITE)
    assert not any("squeeze" in path for path in lite)
    assert lite["encoder/top_conv/kernel"] == (1, 1, 16, 1280)


def test_plans():
    b7 = dict(width_coefficient=2.0, depth_coefficient=3.1, hidden_dim=2560)
    made = sizes.plans(sizes.efficientnet_config(b7))
    assert len(made) == 55 and made[-1].width == 640
    assert made[0].rate == 0.0 and made[-1].rate == pytest.approx(0.2 * 54 / 55)
    lite = sizes.lite_config({"variant": "lite4", "model_type": "efficientnet_lite"})
    # Depth 1.8 leaves the first and the last stage of Lite with one block each.
    counts = [plan.stage for plan in sizes.plans(sizes.efficientnet_config(lite))]
    assert [counts.count(stage) for stage in range(7)] == [1, 4, 4, 6, 6, 8, 1]
    assert [plan.residual for plan in made[:5]] == [False, True, True, True, False]


@pytest.mark.parametrize(
    ("even", "size", "sides"), [(True, 3, (0, 1)), (True, 5, (1, 2)), (False, 5, (2, 2))]
)
def test_padding_of_strided_kernels(even, size, sides):
    config = dict(CONFIG, kernel_sizes=[3, size], depthwise_padding=[] if even else [1])
    assert sizes.plans(sizes.efficientnet_config(config))[1].padding == (sides, sides)
    lite = sizes.plans(sizes.efficientnet_config({**config, **LITE}))
    assert {plan.padding for plan in lite} == {"SAME"}


def test_groups_go_from_stem_to_top():
    rules = EFFICIENTNET.groups(CONFIG, "mean")
    assert tuple(label for _, label in rules) == stage_labels(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden_dim=1280), "hidden_dim is 1280, .* makes the last convolution 16 wide"),
        (dict(strides=[1]), "'strides': 1"),
        (dict(pooling_type="max"), "pooling_type is 'max'"),
        (dict(width_coefficient=None), r"lacks \['width_coefficient'\]"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        EFFICIENTNET.make({**CONFIG, **changes}, "mean")


def test_an_unknown_variant_names_the_known_ones():
    with pytest.raises(ValueError, match="variant is 'lite9'; there are .*'lite0'"):
        load.full_config(EFFICIENTNET_LITE, {"variant": "lite9"})


_PORT = {
    "embeddings.convolution": ("_conv_stem", "conv_stem"),
    "embeddings.batchnorm": ("_bn0", "bn1"),
    "encoder.top_conv": ("_conv_head", "conv_head"),
    "encoder.top_bn": ("_bn1", "bn2"),
    "classifier": ("_fc", "classifier"),
    "expansion.expand_conv": ("_expand_conv", "conv_pw"),
    "expansion.expand_bn": ("_bn0", "bn1"),
    "depthwise_conv.depthwise_conv": ("_depthwise_conv", "conv_dw"),
    "depthwise_conv.depthwise_norm": ("_bn1", "bn2"),
    "squeeze_excite.reduce": ("_se_reduce", "se.conv_reduce"),
    "squeeze_excite.expand": ("_se_expand", "se.conv_expand"),
    "projection.project_conv": ("_project_conv", "conv_pwl"),
    "projection.project_bn": ("_bn2", "bn3"),
}
# In timm, a first stage that does not widen counts its norms from there.
_FIRST = {"conv_pwl": "conv_pw", "bn2": "bn1", "bn3": "bn2"}


def _published(name, style):
    """A PyTorch port's or timm's name of one of transformers' names."""
    own, leaf = name.rsplit(".", 1)
    if ".blocks." not in name:
        return f"{_PORT[own][style]}.{leaf}"
    index = int(own.split(".")[2])
    part = _PORT[own.split(".", 3)[3]][style]
    if style == 0:
        return f"_blocks.{index}.{part}.{leaf}"
    part = _FIRST.get(part, part) if index == 0 else part
    return f"blocks.{['0.0', '1.0', '1.1'][index]}.{part}.{leaf}"


def _write(folder, made, style):
    """Save a backbone and a head in a published layout."""
    names = {}
    for tree in (made.params, made.stats):
        for path, leaf in flatten_dict(tree, sep="/").items():
            name, layout = torch_name(path, made.family.rules)
            names[_published(name, style)] = to_torch(np.asarray(leaf), layout)
    head = np.random.default_rng(0).normal(size=(2, made.dim)).astype(np.float32)
    names[_published("classifier.weight", style)] = head
    names[_published("classifier.bias", style)] = np.ones(2, np.float32)
    write(folder / "model.safetensors", names)
    config = {**made.config, "id2label": {"0": "a", "1": "b"}}
    (folder / "config.json").write_text(json.dumps(config))
    return head


@pytest.mark.parametrize("model_type", ["efficientnet", "efficientnet_lite"])
@pytest.mark.parametrize("style", [0, 1])
def test_published_layouts_load(tmp_path, model_type, style):
    config = {**(LITE if "lite" in model_type else CONFIG), "model_type": model_type}
    made = load.new_backbone(model_type, config, key=jax.random.key(0))
    head = _write(tmp_path, made, style)
    again = load.load_backbone(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, made.params, again.params)
    jax.tree.map(np.testing.assert_array_equal, made.stats, again.stats)
    _, params = load_head(tmp_path, again, "classification")
    np.testing.assert_array_equal(params["classifier"]["kernel"], head.T)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("efficientnet")
    config = {**CONFIG, "depthwise_padding": [1]}
    peer = oracle.peer("EfficientNetForImageClassification", folder, **config, num_labels=5)
    return peer, load.load_backbone(folder), folder


def _theirs(peer, batch, **options):
    return peer.base_model(**oracle.to_torch(batch), **options)


@pytest.mark.parity
def test_forward_is_that_of_transformers(pair):
    peer, made, folder = pair
    batch = _batch(2, (22, 29))
    theirs = _theirs(peer, batch, output_hidden_states=True)
    out = made(batch)
    oracle.close(out["pooled"], theirs.pooler_output)
    oracle.close(out["tokens"], theirs.last_hidden_state.flatten(2).transpose(1, 2))
    own = {"params": made.params, "batch_stats": made.stats}
    run = jax.jit(made.module.apply, static_argnums=(2, 3))
    for stop, hidden in enumerate(theirs.hidden_states, 1):
        oracle.close(run(own, batch, frozenset(), stop), hidden.permute(0, 2, 3, 1))
    head, params = load_head(folder, made, "classification")
    logits = head.apply({"params": params}, out, batch)
    oracle.close(logits, peer(**oracle.to_torch(batch)).logits)


@pytest.mark.parity
@pytest.mark.parametrize("live", [False, True])
def test_training_is_that_of_transformers(pair, live):
    import torch

    peer, made, _ = pair
    # transformers takes the paper's 0.99, which is what stays, for PyTorch's, which is what comes
    # in; and has PyTorch's 0.1 in one of the four norms.
    for module in peer.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.01
    before = {name: leaf.clone() for name, leaf in peer.state_dict().items()}
    batch = _batch(4, (16, 24))
    weight = np.random.default_rng(1).normal(size=(4, 16)).astype(np.float32)
    theirs = (_theirs(peer.train(live), batch).pooler_output * torch.tensor(weight)).sum()
    labels = frozenset(stage_labels(3)) if live else frozenset()

    def run(params):
        own = {"params": params, "batch_stats": made.stats}
        out, moved = made.module.apply(own, batch, labels, mutable=["batch_stats"])
        return jnp.sum(out["pooled"] * weight), moved["batch_stats"]

    oracle.same_gradients(made, lambda params: run(params)[0], peer.base_model, theirs)
    state = peer.base_model.state_dict()
    for path, leaf in flatten_dict(jax.jit(run)(made.params)[1], sep="/").items():
        oracle.close(leaf, state[torch_name(path, EFFICIENTNET.rules)[0]])
    peer.eval().load_state_dict(before)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["b0", "b3"])
def test_names_and_shapes_are_those_of_transformers(name):
    width, depth, side, last = SCALES[name]
    scale = dict(width_coefficient=width, depth_coefficient=depth, image_size=side)
    counted = oracle.names_agree("EfficientNetModel", "efficientnet", hidden_dim=last, **scale)
    assert counted == {"b0": 309, "b3": 494}[name]


def _same(images, size, stride):
    """TensorFlow's padding at any size, in PyTorch."""
    import torch

    needed = [max((-(-s // stride) - 1) * stride + size - s, 0) for s in images.shape[2:]]
    (top, left) = (own // 2 for own in needed)
    sides = (left, needed[1] - left, top, needed[0] - top)
    return torch.nn.functional.pad(images, sides)


def _lite_peer(names, images, live):
    """EfficientNet-Lite of CONFIG from the paper's description, over the published names."""
    import torch
    from torch.nn import functional

    def convolved(x, name, size=1, stride=1, groups=1):
        return functional.conv2d(
            _same(x, size, stride), names[f"{name}.weight"], stride=stride, groups=groups
        )

    def normed(x, name):
        stats = (names[f"{name}.running_mean"], names[f"{name}.running_var"])
        own = (names[f"{name}.weight"], names[f"{name}.bias"])
        return functional.batch_norm(x, *stats, *own, training=live, momentum=0.01, eps=1e-3)

    x = functional.relu6(normed(convolved(images, "_conv_stem", 3, 2), "_bn0"))
    for i, (size, stride) in enumerate([(3, 1), (5, 2), (5, 1)]):
        at, kept = f"_blocks.{i}", x
        if i > 0:
            x = functional.relu6(normed(convolved(x, f"{at}._expand_conv"), f"{at}._bn0"))
        x = convolved(x, f"{at}._depthwise_conv", size, stride, x.shape[1])
        x = functional.relu6(normed(x, f"{at}._bn1"))
        x = normed(convolved(x, f"{at}._project_conv"), f"{at}._bn2")
        x = x + kept if i == 2 else x
    x = functional.relu6(normed(convolved(x, "_conv_head"), "_bn1"))
    features = x.mean((2, 3))
    return features, functional.linear(features, names["_fc.weight"], names["_fc.bias"]), torch


@pytest.mark.parity
@pytest.mark.parametrize("live", [False, True])
def test_lite_is_that_of_the_paper(tmp_path, live):
    import torch

    made = load.new_backbone("efficientnet_lite", LITE, key=jax.random.key(0))
    _write(tmp_path, made, 0)
    made = load.load_backbone(tmp_path)
    from safetensors.torch import load_file

    names = load_file(tmp_path / "model.safetensors")
    trained = {n: t.requires_grad_() for n, t in names.items() if "running" not in n}
    batch = _batch(3, (31, 23))
    images = oracle.to_torch(batch)["pixel_values"]
    features, logits, _ = _lite_peer(names, images, live)
    weight = np.random.default_rng(1).normal(size=features.shape).astype(np.float32)
    labels = frozenset(stage_labels(3)) if live else frozenset()

    def run(params):
        own = {"params": params, "batch_stats": made.stats}
        out, moved = made.module.apply(own, batch, labels, mutable=["batch_stats"])
        return jnp.sum(out["pooled"] * weight), (out["pooled"], moved["batch_stats"])

    gradients, (pooled, stats) = jax.jit(jax.grad(run, has_aux=True))(made.params)
    oracle.close(pooled, features)
    head, params = load_head(tmp_path, made, "classification")
    oracle.close(head.apply({"params": params}, {"pooled": pooled}, batch), logits)
    (features * torch.tensor(weight)).sum().backward()
    seen = set()
    for path, gradient in flatten_dict(gradients, sep="/").items():
        name, layout = torch_name(path, made.family.rules)
        theirs = trained[_published(name, 0)]
        oracle.close(to_torch(np.asarray(gradient), layout), theirs.grad, 1e-4)
        seen.add(_published(name, 0))
    assert seen == {name for name in trained if not name.startswith("_fc")}
    for path, leaf in flatten_dict(stats, sep="/").items():
        oracle.close(leaf, names[_published(torch_name(path, made.family.rules)[0], 0)])


@pytest.fixture(scope="module")
def lite0():
    from benchmarks import assets

    return assets.fetch("efficientnet_lite0")


@pytest.mark.parity
def test_lite0_knows_a_daisy_and_a_palace(lite0):
    from sklearn.datasets import load_sample_image

    made = load.load_backbone(lite0)
    head, params = load_head(lite0, made, "classification")
    batch = made.inputs([load_sample_image(name) for name in ("flower.jpg", "china.jpg")])
    logits = head.apply({"params": params}, made(batch), batch)
    names = [made.config["id2label"][str(int(i))] for i in np.argmax(logits, -1)]
    assert names == ["daisy", "palace"]
