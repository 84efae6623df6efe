"""ResNet: names and shapes, values by hand, statistics; parity with transformers' PyTorch."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jtl.models.backbone import stage_labels
from jtl.models.families.resnet import RESNET as FAMILY
from jtl.models.families.resnet import resnet_config
from jtl.models.heads import Linear
from jtl.models.layers.stated import places
from jtl.models.load import load_backbone
from jtl.models.load_head import load_head
from jtl.weights.files import read
from jtl.weights.load import fill
from jtl.weights.rename import normalise, to_ours, to_torch, torch_name
from jtl.weights.report import check
from jtl.weights.save import write

CONFIG = dict(
    model_type="resnet",
    num_channels=3,
    embedding_size=4,
    hidden_sizes=[8, 16],
    depths=[1, 2],
    layer_type="bottleneck",
    hidden_act="relu",
)
RESNET50 = dict(
    num_channels=3,
    embedding_size=64,
    hidden_sizes=[256, 512, 1024, 2048],
    depths=[3, 4, 6, 3],
    layer_type="bottleneck",
)
RESNET18 = {
    **RESNET50,
    "hidden_sizes": [64, 128, 256, 512],
    "depths": [2, 2, 2, 2],
    "layer_type": "basic",
}
# Path of a convolution with its BatchNorm -> shape of its kernel.
_FIRST = {"embedder/embedder": (7, 7, 3, 4)}
BOTTLENECK = {
    **_FIRST,
    "encoder/stages/0/layers/0/layer/0": (1, 1, 4, 2),
    "encoder/stages/0/layers/0/layer/1": (3, 3, 2, 2),
    "encoder/stages/0/layers/0/layer/2": (1, 1, 2, 8),
    "encoder/stages/0/layers/0/shortcut": (1, 1, 4, 8),
    "encoder/stages/1/layers/0/layer/0": (1, 1, 8, 4),
    "encoder/stages/1/layers/0/layer/1": (3, 3, 4, 4),
    "encoder/stages/1/layers/0/layer/2": (1, 1, 4, 16),
    "encoder/stages/1/layers/0/shortcut": (1, 1, 8, 16),
    "encoder/stages/1/layers/1/layer/0": (1, 1, 16, 4),
    "encoder/stages/1/layers/1/layer/1": (3, 3, 4, 4),
    "encoder/stages/1/layers/1/layer/2": (1, 1, 4, 16),
}
BASIC = {
    **_FIRST,
    "encoder/stages/0/layers/0/layer/0": (3, 3, 4, 8),
    "encoder/stages/0/layers/0/layer/1": (3, 3, 8, 8),
    "encoder/stages/0/layers/0/shortcut": (1, 1, 4, 8),
    "encoder/stages/1/layers/0/layer/0": (3, 3, 8, 16),
    "encoder/stages/1/layers/0/layer/1": (3, 3, 16, 16),
    "encoder/stages/1/layers/0/shortcut": (1, 1, 8, 16),
    "encoder/stages/1/layers/1/layer/0": (3, 3, 16, 16),
    "encoder/stages/1/layers/1/layer/1": (3, 3, 16, 16),
}


def _batch(n=3, size=(40, 56), channels=3):
    images = np.random.default_rng(0).normal(size=(n, *size, channels))
    return {"pixel_values": jnp.asarray(images, jnp.float32)}


def _made(dtype=jnp.float32, **changes):
    """A module and random variables of it; no initialisation is compiled."""
    config = {**CONFIG, **changes}
    module = FAMILY.make(config, "mean", dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), FAMILY.example(config))
    rng = np.random.default_rng(0)

    def value(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        scale = np.sqrt(2 / np.prod(leaf.shape[:3])) if leaf.ndim == 4 else 0.3
        return jnp.asarray(rng.normal(0.0, scale, leaf.shape), jnp.float32)

    return module, jax.tree_util.tree_map_with_path(value, shapes)


@functools.cache
def _one():
    return _made()


def _shapes(config):
    module = FAMILY.make(config, "mean", jnp.float32)
    tree = jax.eval_shape(module.init, jax.random.key(0), FAMILY.example(config))
    return tuple(
        {name: leaf.shape for name, leaf in flatten_dict(tree[kind], sep="/").items()}
        for kind in ("params", "batch_stats")
    )


def _size(shapes):
    return sum(int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.parametrize(("kind", "golden"), [("bottleneck", BOTTLENECK), ("basic", BASIC)])
def test_golden_trees(kind, golden):
    params, stats = _shapes({**CONFIG, "layer_type": kind})
    expected = {f"{path}/convolution/kernel": shape for path, shape in golden.items()}
    for name in ("scale", "bias"):
        expected |= {f"{path}/normalization/{name}": shape[3:] for path, shape in golden.items()}
    assert params == expected
    assert stats == {
        f"{path}/normalization/{name}": shape[3:]
        for path, shape in golden.items()
        for name in ("mean", "var")
    }


def test_known_networks_have_the_sizes_that_they_are_known_for():
    params, stats = _shapes(RESNET50)
    assert (_size(params), _size(stats)) == (23_508_032, 53_120)
    assert params["encoder/stages/3/layers/0/layer/1/convolution/kernel"] == (3, 3, 512, 512)
    assert "encoder/stages/0/layers/0/shortcut/convolution/kernel" in params
    params, stats = _shapes(RESNET18)
    assert (_size(params), _size(stats)) == (11_176_512, 9_600)
    assert not any("stages/0/layers/0/shortcut" in name for name in params)


def test_groups_go_from_stem_to_the_last_block():
    rules = FAMILY.groups(CONFIG, "mean")
    assert tuple(label for _, label in rules) == stage_labels(3)[:-1]
    for path in _shapes(CONFIG)[0]:
        assert sum(bool(re.fullmatch(rule, path)) for rule, _ in rules) == 1, path
    module, _ = _one()
    assert (module.blocks, FAMILY.dim(CONFIG)) == (3, 16)
    assert places((3, 4, 6, 3))[7] == (2, 0)


def test_stem_by_hand():
    # A 7x7 kernel that copies its centre, stride 2, then the maximum of 3x3 at stride 2.
    module, variables = _made(num_channels=1, embedding_size=1)
    first = variables["params"]["embedder"]["embedder"]
    first["convolution"]["kernel"] = jnp.zeros((7, 7, 1, 1)).at[3, 3].set(1.0)
    norm = variables["batch_stats"]["embedder"]["embedder"]["normalization"]
    first["normalization"] = {"scale": jnp.ones(1), "bias": jnp.zeros(1)}
    norm["mean"], norm["var"] = jnp.array([10.0]), jnp.array([4.0 - 1e-5])
    images = jnp.arange(48.0).reshape(1, 8, 6, 1)
    hidden = module.apply(variables, {"pixel_values": images}, frozenset(), 1)
    # Rows 0, 2, 4, 6 and columns 0, 2, 4 remain; the windows end at rows 2, 6 and columns 2, 4.
    expected = (np.array([[14, 16], [38, 40]]) - 10) / 2
    np.testing.assert_allclose(hidden[0, :, :, 0], expected, rtol=1e-5)


def test_a_block_of_zeros_is_the_activation_of_its_input():
    module, variables = _made(layer_type="basic", hidden_act="silu")
    zeros = {**variables, "params": jax.tree.map(jnp.zeros_like, variables["params"])}
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 5, 16))
    got = module.apply(zeros, {"hidden_3": hidden}, frozenset(), 4)
    np.testing.assert_allclose(got, jax.nn.silu(hidden), atol=1e-6)


def test_out():
    module, variables = _one()
    hidden = module.apply(variables, _batch(), frozenset(), 4)
    assert hidden.shape == (3, 5, 7, 16)  # the stem divides by 4, the second stage by 2
    out = module.apply(variables, _batch())
    np.testing.assert_array_equal(out["tokens"], hidden.reshape(3, 35, 16))
    np.testing.assert_allclose(out["pooled"], hidden.mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        (dict(downsample_in_first_stage=True), (3, 4)),
        (dict(downsample_in_first_stage=True, layer_type="basic"), (3, 4)),
        (dict(downsample_in_bottleneck=True), (5, 7)),
    ],
)
def test_downsampling(changes, size):
    module, variables = _made(**changes)
    out = jax.eval_shape(lambda: module.apply(variables, _batch(), frozenset(), 4))
    assert out.shape == (3, *size, 16)


def test_initial_values():
    variables = jax.jit(_one()[0].init)(jax.random.key(0), _batch(1))
    ends = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}
    kernels = {}
    for path, leaf in flatten_dict(variables, sep="/").items():
        if path.endswith("kernel"):
            kernels[path] = leaf
        else:
            assert (leaf == ends[path.split("/")[-1]]).all(), path
    kernel = kernels["params/embedder/embedder/convolution/kernel"]
    assert float(kernel.std()) == pytest.approx(np.sqrt(2 / (7 * 7 * 4)), rel=0.15)


@pytest.mark.parametrize("border", range(1, 6))
def test_going_on_from_a_border_gives_the_same_bits(border):
    module, variables = _one()
    whole = module.apply(variables, _batch())
    if border == 5:
        whole = column = {"pooled": whole["pooled"]}
    else:
        column = {f"hidden_{border}": module.apply(variables, _batch(), frozenset(), border)}
    jax.tree.map(np.testing.assert_array_equal, module.apply(variables, column), whole)


def _moved(module, variables, batch, live):
    _, moved = module.apply(variables, batch, frozenset(live), mutable=["batch_stats"])
    before = flatten_dict(variables["batch_stats"], sep="/")
    after = flatten_dict(moved["batch_stats"], sep="/")
    assert before.keys() == after.keys()
    return {name for name in before if not np.array_equal(before[name], after[name])}


def _of(label):
    rule = next(rule for rule, other in FAMILY.groups(CONFIG, "mean") if other == label)
    return {name for name in _shapes(CONFIG)[1] if re.fullmatch(rule, name)}


@pytest.mark.parametrize("label", stage_labels(3)[:-1])
def test_statistics_move_in_live_stages_alone(label):
    module, variables = _one()
    assert _moved(module, variables, _batch(), {label}) == _of(label)


def test_statistics_of_stages_before_the_border_stay():
    module, variables = _one()
    assert _moved(module, variables, _batch(), {"head", "top"}) == set()
    column = {"hidden_2": module.apply(variables, _batch(), frozenset(), 2)}
    assert _moved(module, variables, column, {"block_1"}) == _of("block_1")


def test_a_held_stage_reads_its_running_statistics():
    module, variables = _one()
    batch = _batch()
    live = {"block_1", "block_2"}

    def run(stop, live):
        return module.apply(variables, batch, live, stop, mutable=["batch_stats"])[0]

    np.testing.assert_array_equal(run(2, frozenset(live)), run(2, frozenset()))
    assert not np.allclose(run(3, frozenset(live)), run(3, frozenset()), atol=1e-2)


def test_padding_rows_do_not_count():
    module, variables = _one()
    live = frozenset(stage_labels(3))
    real = np.array([True, False, True, True, False])
    batch = {**_batch(5), "mask": real}
    batch["pixel_values"] = batch["pixel_values"].at[1].multiply(100.0)
    alone = {"pixel_values": batch["pixel_values"][real]}
    (out, moved), (few, few_moved) = (
        module.apply(variables, rows, live, mutable=["batch_stats"]) for rows in (batch, alone)
    )
    np.testing.assert_allclose(out["pooled"][real], few["pooled"], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moved, few_moved)


def test_devices_with_unequal_masks_are_one():
    module, variables = _one()
    live = frozenset(stage_labels(3))
    batch = {**_batch(8, (16, 16)), "mask": jnp.arange(8) < 5}
    out, moved = module.apply(variables, batch, live, mutable=["batch_stats"])
    many = module.clone(axis_name="devices")

    @functools.partial(jax.pmap, axis_name="devices", devices=jax.devices()[:4])
    def run(batch):
        return many.apply(variables, batch, live, mutable=["batch_stats"])

    cut = jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[1:]), batch)
    many_out, many_moved = run(cut)
    np.testing.assert_allclose(many_out["pooled"].reshape(8, 16), out["pooled"], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b[3], a, atol=1e-5), moved, many_moved)


def test_dtype_is_that_of_the_computation():
    module, variables = _made(jnp.bfloat16)
    out, moved = module.apply(variables, _batch(), frozenset({"block_0"}), mutable=["batch_stats"])
    assert out["tokens"].dtype == out["pooled"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype("float32")}


def test_modules_of_equal_config_are_one_static_argument():
    one, two = (FAMILY.make(dict(CONFIG), "mean", jnp.dtype("float32")) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    assert one != one.clone(axis_name="devices")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(depths=None), r"lacks \['depths'\]; it has \["),
        (dict(depths=[1, 2, 3]), r"depths=\(1, 2, 3\) and hidden_sizes=\(8, 16\)"),
        (dict(depths=[1, 0]), "each stage one layer or more"),
        (dict(layer_type="wide"), r"layer_type 'wide' is not known; .*'basic', 'bottleneck'"),
        (dict(hidden_act="rleu"), "activation 'rleu' is not known"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        FAMILY.make({**CONFIG, **changes}, "mean", jnp.float32)


def test_unknown_pooling_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'cls' is not known to ResNet; .*'mean'"):
        FAMILY.make(CONFIG, "cls", jnp.float32)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (_batch(channels=1), r"\(3, 40, 56, 1\); the model reads 3 channels"),
        ({"pixel_values": jnp.zeros((1, 3, 40, 56))}, "the channels seem to come first"),
        ({"label": jnp.zeros(1)}, r"no column 'pixel_values'; it has \['label'\]"),
    ],
)
def test_bad_input_is_named(batch, message):
    module, variables = _one()
    with pytest.raises(ValueError, match=message):
        module.apply(variables, batch)


def test_one_row_cannot_have_statistics():
    module, variables = _one()
    with pytest.raises(ValueError, match="one value a channel has no variance"):
        batch = _batch(1, (8, 8))
        module.apply(variables, batch, frozenset({"block_1"}), mutable=["batch_stats"])


def test_flax_checkpoint_loads_as_it_is(tmp_path):
    from flax.serialization import msgpack_serialize

    _, variables = _one()
    arrays = jax.tree.map(np.asarray, variables)
    head = {"1": {"kernel": np.zeros((16, 5), np.float32), "bias": np.zeros(5, np.float32)}}
    content = {
        "params": {"resnet": arrays["params"], "classifier": head},
        "batch_stats": {"resnet": arrays["batch_stats"]},
    }
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(content))
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    template = jax.eval_shape(lambda: variables)
    trees, report = fill(template, read(tmp_path), rules=FAMILY.rules, aliases=FAMILY.aliases)
    check(report, allow_unexpected=FAMILY.ignored)
    jax.tree.map(np.testing.assert_array_equal, trees, variables)


def _torchvision(name):
    """Torchvision's name of one of transformers' names."""
    parts, kind = name.split("."), {"convolution": "conv", "normalization": "bn"}
    if parts[0] == "embedder":
        return f"{kind[parts[2]]}1.{parts[3]}"
    lead = f"layer{int(parts[2]) + 1}.{parts[4]}"
    if parts[5] == "shortcut":
        return f"{lead}.downsample.{int(parts[6] == 'normalization')}.{parts[7]}"
    return f"{lead}.{kind[parts[7]]}{int(parts[6]) + 1}.{parts[8]}"


@pytest.mark.parametrize("prefix", ["", "encoder.encoder."])
def test_names_of_torchvision_load(tmp_path, prefix):
    _, variables = _one()
    names = {"projector.weight": np.zeros(1, np.float32)} if prefix else {}
    for path, leaf in flatten_dict({**variables["params"]}, sep="/").items():
        name, layout = torch_name(path, FAMILY.rules)
        names[prefix + _torchvision(name)] = to_torch(np.asarray(leaf), layout)
    for path, leaf in flatten_dict({**variables["batch_stats"]}, sep="/").items():
        name = prefix + _torchvision(torch_name(path)[0])
        names[name] = np.asarray(leaf)
        names[name.rsplit(".", 1)[0] + ".num_batches_tracked"] = np.zeros((), np.int64)
    names[f"{prefix}fc.weight"] = np.arange(32.0, dtype=np.float32).reshape(2, 16)
    names[f"{prefix}fc.bias"] = np.ones(2, np.float32)
    assert f"{prefix}layer2.0.downsample.1.running_var" in names
    write(tmp_path / "model.safetensors", names)
    config = {**CONFIG, "id2label": {"0": "a", "1": "b"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = load_backbone(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, made.params, variables["params"])
    jax.tree.map(np.testing.assert_array_equal, made.stats, variables["batch_stats"])
    _, head = load_head(tmp_path, made, "classification")
    np.testing.assert_array_equal(head["classifier"]["kernel"][:, 1], np.arange(16.0) + 16)


def test_config_is_hashable():
    made = resnet_config({**CONFIG, "id2label": {}})
    assert (made.hidden_sizes, made.depths) == ((8, 16), (1, 2))
    hash(made)


@pytest.fixture
def torch():
    import torch

    return torch


def _peer(torch, kind="ResNetModel", **changes):
    """A transformers model with random kernels, BatchNorm parameters and statistics."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ResNetConfig(**{**CONFIG, **changes}, num_labels=5)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, leaf in model.state_dict().items():
            if re.search("normalization.(weight|running_var)", name):
                leaf.uniform_(0.5, 1.5)
            elif re.search("normalization.(bias|running_mean)", name):
                leaf.normal_(0.0, 0.3)
    return model


def _ours(model, folder):
    """The same weights here, through files."""
    model.save_pretrained(folder)
    checkpoint = read(folder)
    module = FAMILY.make(checkpoint.config, "mean", jnp.float32)
    template = jax.eval_shape(module.init, jax.random.key(0), FAMILY.example(checkpoint.config))
    trees, report = fill(template, checkpoint, rules=FAMILY.rules, aliases=FAMILY.aliases)
    check(report, allow_unexpected=FAMILY.ignored)
    return module, trees, checkpoint


def _to_torch(torch, batch):
    return torch.tensor(np.asarray(batch["pixel_values"]).transpose(0, 3, 1, 2))


def _close(got, expected, tolerance=1e-5):
    expected = expected.detach().numpy() if hasattr(expected, "detach") else expected
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=0, atol=tolerance)


KINDS = [
    {},
    dict(layer_type="basic", hidden_act="silu"),
    dict(downsample_in_bottleneck=True, downsample_in_first_stage=True, num_channels=1),
    dict(layer_type="basic", hidden_sizes=[4, 8]),  # no shortcut in the first stage
]


@pytest.mark.parity
@pytest.mark.parametrize("changes", KINDS)
def test_forward_is_that_of_transformers(torch, tmp_path, changes):
    peer = _peer(torch, **changes)
    module, variables, _ = _ours(peer, tmp_path)
    batch = _batch(2, (41, 54), changes.get("num_channels", 3))
    out = module.apply(variables, batch)
    theirs = peer(_to_torch(torch, batch), output_hidden_states=True)
    _close(out["pooled"], theirs.pooler_output[:, :, 0, 0])
    _close(out["tokens"], theirs.last_hidden_state.flatten(2).transpose(1, 2))
    for stop, hidden in zip((1, 2, 4), theirs.hidden_states, strict=True):
        got = module.apply(variables, batch, frozenset(), stop)
        _close(got, hidden.permute(0, 2, 3, 1))


@pytest.mark.parity
@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("changes", KINDS[:2])
def test_training_is_that_of_transformers(torch, tmp_path, changes, live):
    peer = _peer(torch, **changes)
    module, variables, _ = _ours(peer, tmp_path)
    batch = _batch(4)
    weight = np.random.default_rng(1).normal(size=(4, 16)).astype(np.float32) / 10
    labels = frozenset(stage_labels(3)) if live else frozenset()

    def loss(params):
        own = {**variables, "params": params}
        out, moved = module.apply(own, batch, labels, mutable=["batch_stats"])
        return jnp.sum(out["pooled"] * weight), (out, moved["batch_stats"])

    theirs = peer.train(live)(_to_torch(torch, batch)).pooler_output[:, :, 0, 0]
    (theirs * torch.tensor(weight)).sum().backward()
    gradients, (out, stats) = jax.grad(loss, has_aux=True)(variables["params"])
    _close(out["pooled"], theirs)
    state = peer.state_dict()
    for path, leaf in flatten_dict(stats, sep="/").items():
        _close(leaf, state[torch_name(path, FAMILY.rules)[0]])
    expected = {name: leaf.grad.numpy() for name, leaf in peer.named_parameters()}
    got = flatten_dict(gradients, sep="/")
    assert len(got) == len(expected)
    for path, gradient in got.items():
        name, layout = torch_name(path, FAMILY.rules)
        assert np.abs(expected[name]).max() > 1e-3, name
        _close(gradient, to_ours(expected[name], layout), 1e-4)


@pytest.mark.parity
def test_classification_is_that_of_transformers(torch, tmp_path):
    peer = _peer(torch, "ResNetForImageClassification")
    module, variables, checkpoint = _ours(peer, tmp_path)
    out = module.apply(variables, _batch())
    head = Linear(5)
    shapes = jax.eval_shape(head.init, jax.random.key(0), out, {})["params"]
    rules = FAMILY.heads["classification"].rules
    trees, report = fill({"params": shapes}, checkpoint, rules=rules, aliases=FAMILY.aliases)
    check(report, allow_unexpected=(".*",))
    logits = head.apply({"params": trees["params"]}, out, {})
    _close(logits, peer(_to_torch(torch, _batch())).logits)


@pytest.mark.parity
@pytest.mark.parametrize("config", [RESNET50, RESNET18])
def test_names_and_shapes_of_known_networks_are_those_of_transformers(torch, config):
    import transformers

    with torch.device("meta"):
        peer = transformers.ResNetModel(transformers.ResNetConfig(**config))
    theirs = {
        normalise(name, FAMILY.aliases): tuple(leaf.shape)
        for name, leaf in peer.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    ours = {}
    for path, shape in {**_shapes(config)[0], **_shapes(config)[1]}.items():
        name, layout = torch_name(path, FAMILY.rules)
        ours[name] = tuple(shape[i] for i in (3, 2, 0, 1)) if layout == "conv" else shape
    assert ours == theirs
