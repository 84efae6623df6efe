"""ViT: names and shapes, values by hand, stages; parity with transformers' PyTorch models."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from jtl.data.images import image_inputs
from jtl.models import export, load
from jtl.models.backbone import stage_labels
from jtl.models.families.vit import VIT as FAMILY
from jtl.models.families.vit import vit_config
from jtl.models.families.vit_layouts import timm_config
from jtl.models.heads import Distilled, Linear
from jtl.models.load_head import load_head
from jtl.models.model import attach
from jtl.weights.files import read
from jtl.weights.load import fill
from jtl.weights.rename import normalise, to_ours, to_torch, torch_name
from jtl.weights.report import check

CONFIG = dict(
    model_type="vit",
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=40,
    image_size=[8, 12],
    patch_size=4,
    num_channels=3,
    hidden_act="gelu",
    layer_norm_eps=1e-12,
    initializer_range=0.3,
)
BASE = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    image_size=224,
    patch_size=16,
    num_channels=3,
)
_LAYER = {
    "attention/attention/key/bias": (24,),
    "attention/attention/key/kernel": (24, 24),
    "attention/attention/query/bias": (24,),
    "attention/attention/query/kernel": (24, 24),
    "attention/attention/value/bias": (24,),
    "attention/attention/value/kernel": (24, 24),
    "attention/output/dense/bias": (24,),
    "attention/output/dense/kernel": (24, 24),
    "intermediate/dense/bias": (40,),
    "intermediate/dense/kernel": (24, 40),
    "layernorm_after/bias": (24,),
    "layernorm_after/scale": (24,),
    "layernorm_before/bias": (24,),
    "layernorm_before/scale": (24,),
    "output/dense/bias": (24,),
    "output/dense/kernel": (40, 24),
}
GOLDEN = {
    "embeddings/cls_token": (1, 1, 24),
    "embeddings/patch_embeddings/projection/bias": (24,),
    "embeddings/patch_embeddings/projection/kernel": (4, 4, 3, 24),
    "embeddings/position_embeddings": (1, 7, 24),
    **{f"encoder/layer/{i}/{name}": shape for i in range(3) for name, shape in _LAYER.items()},
    "layernorm/bias": (24,),
    "layernorm/scale": (24,),
    "pooler/dense/bias": (24,),
    "pooler/dense/kernel": (24, 24),
}


def _batch(n=3, size=(8, 12), channels=3):
    images = np.random.default_rng(0).normal(size=(n, *size, channels))
    return {"pixel_values": jnp.asarray(images, jnp.float32)}


def _made(pooling="cls", dtype=jnp.float32, **changes):
    """A module and random parameters of it; no initialisation is compiled."""
    config = {**CONFIG, **changes}
    module = FAMILY.make(config, pooling, dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), FAMILY.example(config))
    rng = np.random.default_rng(0)

    def value(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(mean, 0.3, leaf.shape), jnp.float32)

    return module, jax.tree_util.tree_map_with_path(value, shapes)


def _shapes(config, pooling="cls"):
    module = FAMILY.make(config, pooling, jnp.float32)
    tree = jax.eval_shape(module.init, jax.random.key(0), FAMILY.example(config))
    return {name: leaf.shape for name, leaf in flatten_dict(tree["params"], sep="/").items()}


@pytest.mark.parametrize("pooling", FAMILY.poolings)
def test_golden_tree(pooling):
    module, _ = _made(pooling)
    variables = jax.eval_shape(module.init, jax.random.key(0), _batch())
    assert set(variables) == {"params"}
    leaves = flatten_dict(variables["params"], sep="/")
    assert {name: leaf.shape for name, leaf in leaves.items()} == GOLDEN
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}


def test_initial_values():
    module, _ = _made(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    params = jax.jit(module.init)(jax.random.key(0), _batch())["params"]
    for path, leaf in flatten_dict(params, sep="/").items():
        if path.endswith(("scale", "bias")):
            assert (leaf == (1.0 if path.endswith("scale") else 0.0)).all(), path
        else:
            assert float(leaf.std()) == pytest.approx(0.3, rel=0.25), path


def test_base_has_the_size_that_it_is_known_for():
    shapes = _shapes(BASE)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    assert sum(sizes.values()) == 86_389_248
    assert sum(size for name, size in sizes.items() if "pooler" not in name) == 85_798_656
    assert shapes["embeddings/position_embeddings"] == (1, 197, 768)
    assert shapes["encoder/layer/11/intermediate/dense/kernel"] == (768, 3072)


def test_groups_go_from_stem_to_top():
    for pooling, pooler in (("cls", "unused"), ("mean", "unused"), ("pooler", "top")):
        labels = [label for _, label in FAMILY.groups(CONFIG, pooling)]
        assert labels == [*stage_labels(3), pooler]
    rules = FAMILY.groups(CONFIG, "cls")
    assert all(sum(bool(re.fullmatch(rule, name)) for rule, _ in rules) == 1 for name in GOLDEN)
    assert FAMILY.dim(CONFIG) == 24


def test_without_bias_of_query_key_value():
    left_out = {
        f"encoder/layer/{i}/attention/attention/{name}/bias"
        for i in range(3)
        for name in ("query", "key", "value")
    }
    assert set(GOLDEN) - set(_shapes({**CONFIG, "qkv_bias": False})) == left_out


def test_stem_by_hand():
    # Patches of 1 x 2 in a 2 x 4 image: the row of patches runs from left to right, then down.
    sizes = dict(hidden_size=1, num_attention_heads=1, image_size=[2, 4], patch_size=[1, 2])
    module, variables = _made(num_channels=1, **sizes)
    table = variables["params"]["embeddings"]
    table["cls_token"] = jnp.full((1, 1, 1), 0.5)
    table["position_embeddings"] = jnp.arange(5.0).reshape(1, 5, 1) * 100
    table["patch_embeddings"]["projection"] = {
        "kernel": jnp.array([1.0, 10.0]).reshape(1, 2, 1, 1),
        "bias": jnp.array([0.25]),
    }
    images = jnp.arange(8.0).reshape(1, 2, 4, 1)
    hidden = module.apply(variables, {"pixel_values": images}, frozenset(), 1)
    expected = [0.5, 100 + 10.25, 200 + 32.25, 300 + 54.25, 400 + 76.25]
    np.testing.assert_allclose(hidden.ravel(), expected)


def test_layers_of_zeros_leave_the_final_layer_norm():
    sizes = dict(hidden_size=2, num_attention_heads=1, intermediate_size=3)
    module, variables = _made("pooler", **sizes)
    flat = flatten_dict(jax.tree.map(jnp.zeros_like, variables["params"]), sep="/")
    flat["embeddings/cls_token"] = jnp.array([1.0, 3.0]).reshape(1, 1, 2)
    flat["layernorm/scale"] = jnp.array([1.0, 2.0])
    flat["pooler/dense/kernel"] = jnp.eye(2)
    params = unflatten_dict(flat, sep="/")
    out = module.apply({"params": params}, _batch(1))
    np.testing.assert_allclose(out["tokens"][0, 0], [-1.0, 2.0], atol=1e-6)
    np.testing.assert_allclose(out["pooled"], np.tanh([[-1.0, 2.0]]), atol=1e-6)


def test_poolings():
    batch = _batch()
    out = {}
    for pooling in FAMILY.poolings:
        module, variables = _made(pooling)
        out[pooling] = module.apply(variables, batch)
    tokens = out["cls"]["tokens"]
    dense = variables["params"]["pooler"]["dense"]
    pooler = jnp.tanh(tokens[:, 0] @ dense["kernel"] + dense["bias"][None])
    np.testing.assert_array_equal(out["cls"]["pooled"], tokens[:, 0])
    np.testing.assert_allclose(out["pooler"]["pooled"], pooler, atol=1e-6)
    np.testing.assert_allclose(out["mean"]["pooled"], tokens[:, 1:].mean(1), atol=1e-6)


@pytest.mark.parametrize("pooling", ("cls", "mean"))
def test_an_unused_pooler_is_neither_computed_nor_needed(pooling):
    module, variables = _made(pooling)
    params = variables["params"]
    rest = {name: leaf for name, leaf in params.items() if name != "pooler"}
    out, without = (module.apply({"params": tree}, _batch()) for tree in (params, rest))
    jax.tree.map(np.testing.assert_array_equal, out, without)
    assert FAMILY.optional == ("pooler/.*",)


@pytest.mark.parametrize("pooling", FAMILY.poolings)
@pytest.mark.parametrize("border", range(1, 6))
def test_going_on_from_a_border_gives_the_same_bits(pooling, border):
    module, variables = _made(pooling)
    whole = module.apply(variables, _batch())
    if border == 5:
        column = {"pooled": whole["pooled"]}
        whole = column
    else:
        column = {f"hidden_{border}": module.apply(variables, _batch(), frozenset(), border)}
    jax.tree.map(np.testing.assert_array_equal, module.apply(variables, column), whole)


def test_dtype_is_that_of_the_computation():
    module, variables = _made("mean", jnp.bfloat16)
    out = module.apply(variables, _batch())
    assert out["tokens"].dtype == out["pooled"].dtype == jnp.bfloat16
    exact = _made("mean")[0].apply(variables, _batch())
    np.testing.assert_allclose(out["pooled"].astype(jnp.float32), exact["pooled"], atol=0.1)


def test_modules_of_equal_config_are_one_static_argument():
    one, two = (FAMILY.make(dict(CONFIG), "mean", jnp.dtype("float32")) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    assert one != FAMILY.make(CONFIG, "cls", jnp.dtype("float32"))


@pytest.mark.parametrize(
    ("field", "stage"),
    [
        ("hidden_dropout_prob", 0),
        ("hidden_dropout_prob", 1),
        ("attention_probs_dropout_prob", 1),
        ("drop_path_rate", 3),
    ],
)
def test_live_turns_on_the_noise_of_its_own_stage(field, stage):
    module, variables = _made(**{field: 0.5})
    labels, batch = stage_labels(3), _batch()
    rngs = {"dropout": jax.random.key(3)}

    def run(module, live):
        return module.apply(variables, batch, frozenset(live), stage + 1, rngs=rngs)

    held = run(module, ())
    assert not np.array_equal(held, run(module, {labels[stage]}))
    others = set(labels) - {labels[stage]}
    without = frozenset(others - set(labels[:stage]))
    np.testing.assert_array_equal(held, run(module, without))
    np.testing.assert_array_equal(held, run(_made()[0], labels))


def test_stochastic_depth_drops_whole_branches_by_depth():
    module, variables = _made(drop_path_rate=0.5)
    batch = _batch(64)
    rngs = {"dropout": jax.random.key(0)}
    first = module.apply(variables, batch, frozenset({"block_0"}), 2, rngs=rngs)
    np.testing.assert_array_equal(first, module.apply(variables, batch, frozenset(), 2))
    before = module.apply(variables, batch, frozenset(), 3)
    after = module.apply(variables, {"hidden_3": before}, frozenset({"block_2"}), 4, rngs=rngs)
    same = np.asarray((after == before).all((1, 2)))  # both branches dropped: 1 row in 4
    assert 6 <= same.sum() <= 26
    assert not np.asarray((after == before)[~same]).any(-1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden_size=None), r"lacks \['hidden_size'\]; it has \["),
        (dict(num_attention_heads=5), "num_attention_heads=5 does not divide hidden_size=24"),
        (dict(hidden_act="gleu"), "activation 'gleu' is not known"),
        (dict(image_size=[8, 12, 3]), r"image_size is \[8, 12, 3\]; give one whole number"),
        (dict(patch_size=16), r"image_size=\(8, 12\) has no patch of patch_size=\(16, 16\)"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        FAMILY.make({**CONFIG, **changes}, "mean", jnp.float32)


def test_pooling_errors():
    with pytest.raises(
        ValueError, match=r"'max' is not known to ViT.*'cls', 'mean', 'mean_norm', 'pooler'"
    ):
        FAMILY.make(CONFIG, "max", jnp.float32)
    with pytest.raises(
        ValueError, match="pooler has width 7, the tokens 24; .*pooling='cls' or 'mean'"
    ):
        FAMILY.make({**CONFIG, "pooler_output_size": 7}, "pooler", jnp.float32)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (_batch(size=(12, 8)), r"images are \(12, 8\).*positions for \(8, 12\)"),
        (_batch(channels=1), r"\(3, 8, 12, 1\); the model reads 3 channels"),
        ({"pixel_values": jnp.zeros((1, 3, 8, 12))}, "the channels seem to come first"),
        ({"input_ids": jnp.zeros((1, 2))}, r"no column 'pixel_values'; it has \['input_ids'\]"),
        ({"pixel_values": jnp.zeros((8, 12, 3))}, r"float32\(8, 12, 3\).*\(n, height, width"),
        ({"pixel_values": jnp.zeros((1, 8, 12, 3), jnp.uint8)}, "uint8.*normalised floats"),
    ],
)
def test_bad_input_is_named(batch, message):
    module, variables = _made()
    with pytest.raises(ValueError, match=message):
        module.apply(variables, batch)


def test_names_of_files_and_of_memory_become_one():
    mine = [torch_name(name, FAMILY.rules)[0] for name in GOLDEN]
    memory = {
        "attention.q_proj.weight": "attention.attention.query.weight",
        "attention.k_proj.bias": "attention.attention.key.bias",
        "attention.v_proj.weight": "attention.attention.value.weight",
        "attention.o_proj.bias": "attention.output.dense.bias",
        "mlp.fc1.weight": "intermediate.dense.weight",
        "mlp.fc2.bias": "output.dense.bias",
        "layernorm_before.weight": "layernorm_before.weight",
    }
    for theirs, file in memory.items():
        assert normalise(f"vit.layers.2.{theirs}", FAMILY.aliases) == f"encoder.layer.2.{file}"
        assert f"encoder.layer.2.{file}" in mine
    for name in mine:
        assert normalise(name, FAMILY.aliases) == normalise(f"vit.{name}", FAMILY.aliases) == name
        assert not re.fullmatch("|".join(FAMILY.ignored), name)
    for name in ("classifier.weight", "decoder.0.bias", "embeddings.mask_token"):
        assert re.fullmatch("|".join(FAMILY.ignored), name)


def test_flax_checkpoint_loads_as_it_is(tmp_path):
    from flax.serialization import msgpack_serialize

    module, variables = _made()
    head = {"kernel": np.zeros((24, 5), np.float32), "bias": np.zeros(5, np.float32)}
    params = jax.tree.map(np.asarray, variables["params"])
    content = {"params": {"vit": params, "classifier": head}}
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(content))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    template = jax.eval_shape(lambda: variables["params"])
    trees, report = fill(
        {"params": template}, read(tmp_path), rules=FAMILY.rules, aliases=FAMILY.aliases
    )
    check(report, allow_unexpected=FAMILY.ignored)
    jax.tree.map(np.testing.assert_array_equal, trees["params"], variables["params"])


def test_config_takes_one_number_for_both_sides():
    made = vit_config({**CONFIG, "image_size": 8, "id2label": {}})
    assert (made.image_size, made.patch_size, made.patches) == ((8, 8), (4, 4), 4)
    # What is left over at the edge is not read, as in transformers.
    assert vit_config({**CONFIG, "image_size": (9, 15)}).patches == 6


DEIT_CONFIG = {**CONFIG, "model_type": "deit", "image_size": 8}
TIMM = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "encoder.layer": "blocks",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm.": "norm.",
    "pooler.dense": "pre_logits.fc",
}


def _backbone(config=None, family="vit", pooling=None):
    return load.new_backbone(
        family, config or {**CONFIG, "image_size": 8}, key=jax.random.key(0), pooling=pooling
    )


def _as_timm(params):
    """The names of timm, query, key and value in one, as a dict of PyTorch's layout."""
    tensors = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        name, layout = torch_name(path, FAMILY.rules)
        for ours, theirs in TIMM.items():
            name = name.replace(ours, theirs)
        tensors[name] = to_torch(np.asarray(leaf), layout)
    for i in range(3):
        for kind in ("weight", "bias"):
            names = [
                f"blocks.{i}.attention.attention.{n}.{kind}" for n in ("query", "key", "value")
            ]
            tensors[f"blocks.{i}.attn.qkv.{kind}"] = np.concatenate([tensors.pop(n) for n in names])
    return tensors


def _same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize(("family", "config"), [("vit", None), ("deit", DEIT_CONFIG)])
def test_the_names_of_timm_are_read(tmp_path, family, config):
    backbone = _backbone(config, family)
    tensors = _as_timm(backbone.params)
    assert tensors["blocks.0.attn.qkv.weight"].shape == (72, 24)
    assert ("dist_token" in tensors) == (family == "deit")
    tensors |= {"head.weight": np.ones((5, 24), np.float32), "head.bias": np.zeros(5, np.float32)}
    if family == "deit":
        tensors |= {"head_dist.weight": tensors["head.weight"], "head_dist.bias": np.ones(5, "f4")}
    save_file(tensors, tmp_path / "model.safetensors")
    again = load.load_backbone(
        tmp_path / "model.safetensors", family=family, config=backbone.config
    )
    _same(again.params, backbone.params)
    assert again.report.fresh == again.report.wrong_shape == ()


def test_a_table_without_the_token_gets_zeros_before_it(tmp_path):
    backbone = _backbone()
    tensors = _as_timm(backbone.params)
    tensors["pos_embed"] = tensors["pos_embed"][:, 1:].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    again = load.load_backbone(tmp_path / "model.safetensors", family="vit", config=backbone.config)
    table = again.params["embeddings"]["position_embeddings"]
    assert not table[0, 0].any()
    _same(table[0, 1:], backbone.params["embeddings"]["position_embeddings"][0, 1:])


def test_a_folder_of_timm_says_what_it_is(tmp_path):
    config = timm_config(
        {"architecture": "vit_tiny_patch16_clip_224", "model_args": {"img_size": 32}}
    )
    config["num_hidden_layers"] = 3
    backbone = _backbone(config)
    assert backbone.params["embeddings"]["norm_pre"]["scale"].shape == (192,)
    names = timm_config({"architecture": "deit_base_distilled_patch16_224"})
    assert (names["model_type"], names["hidden_size"], names["pre_norm"]) == ("deit", 768, False)
    names = timm_config({"architecture": "vit_large_patch14_clip_quickgelu_224.openai"})
    assert (names["hidden_act"], names["patch_size"], names["num_hidden_layers"]) == (
        "quick_gelu", 14, 24,
    )  # fmt: skip
    assert timm_config({"architecture": "vit_base_patch16_siglip_224"}) is None
    with pytest.raises(ValueError, match="is a ViT that is not built here"):
        stated = {"architecture": "vit_base_patch16_224", "model_args": {"reg_tokens": 4}}
        timm_config(stated)


def test_a_whole_folder_of_timm_with_its_inputs(tmp_path):
    stated = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "model_args": {"img_size": 32},
    }
    stated["pretrained_cfg"] = dict(
        input_size=[3, 32, 32], mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.2], crop_pct=0.8,
        interpolation="bicubic",
    )  # fmt: skip
    config = timm_config(stated)
    module = FAMILY.make(config, "cls", jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), FAMILY.example(config))["params"]
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), shapes)
    flat = flatten_dict(params, sep="/")
    flat = {path: leaf for path, leaf in flat.items() if "pooler" not in path}
    tensors = {}
    for path, leaf in flat.items():
        name, layout = torch_name(path, FAMILY.rules)
        tensors[name] = to_torch(leaf, layout)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(stated))
    backbone = load.load_backbone(tmp_path)
    assert backbone.inputs.size == (32, 32) and backbone.inputs.processor.size == {
        "shortest_edge": 40
    }
    batch = backbone.inputs([np.full((50, 60, 3), 255, np.uint8)])
    np.testing.assert_allclose(batch["pixel_values"][0, 5, 5], [2.5, 3.0, 3.5], atol=1e-5)
    assert len(backbone.config["id2label"]) == 5


def test_the_archives_of_its_authors_are_read(tmp_path):
    backbone = _backbone()
    stored = {}
    parts = {"layernorm_before": "LayerNorm_0", "layernorm_after": "LayerNorm_2"}
    parts |= {"intermediate/dense": "MlpBlock_3/Dense_0", "attention/output/dense": "A/out"}
    parts |= {"output/dense": "MlpBlock_3/Dense_1", "attention/attention": "A"}
    for path, leaf in flatten_dict(backbone.params, sep="/").items():
        name, array = path, np.asarray(leaf)
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        if "/A/out/kernel" in name:
            array = array.reshape(4, 6, 24)
        elif re.search("/A/(query|key|value)/", name):
            array = array.reshape(*array.shape[:-1], 4, 6)
        name = name.replace("/A/", "/MultiHeadDotProductAttention_1/")
        name = name.replace("encoder/layer/", "Transformer/encoderblock_")
        name = name.replace("embeddings/patch_embeddings/projection", "embedding")
        name = name.replace(
            "embeddings/position_embeddings", "Transformer/posembed_input/pos_embedding"
        )
        name = name.replace("embeddings/cls_token", "cls").replace("pooler/dense", "pre_logits")
        stored[re.sub("^layernorm/", "Transformer/encoder_norm/", name)] = array
    name = "Transformer/encoderblock_2/MultiHeadDotProductAttention_1/key/kernel"
    assert stored[name].shape == (24, 4, 6)
    stored["head/kernel"], stored["head/bias"] = np.zeros((24, 5)), np.zeros(5)
    np.savez(tmp_path / "B_16.npz", **stored)
    again = load.load_backbone(
        tmp_path / "B_16.npz", family="vit", config=backbone.config, pooling="pooler"
    )
    _same(again.params, backbone.params)


def test_deit_has_two_tokens_and_two_classifiers():
    backbone = _backbone(DEIT_CONFIG, "deit", "distilled")
    batch = _batch(size=(8, 8))
    out = backbone(batch)
    assert out["tokens"].shape == (3, 2 + 4, 24)
    np.testing.assert_allclose(out["pooled"], out["tokens"][:, :2].mean(1), atol=1e-6)
    mean = _backbone(DEIT_CONFIG, "deit", "mean")(batch)
    np.testing.assert_allclose(mean["pooled"], mean["tokens"][:, 2:].mean(1), atol=1e-6)
    head = Distilled(2, "zeros")
    params = head.init(jax.random.key(0), out, {})["params"]
    params["cls_classifier"]["bias"] = jnp.array([1.0, 2.0])
    params["distillation_classifier"]["bias"] = jnp.array([3.0, 8.0])
    np.testing.assert_array_equal(head.apply({"params": params}, out, {})[0], [2.0, 5.0])


def _folder(folder, backbone):
    export.export(folder, attach(backbone, {"head": Linear(2)}, key=jax.random.key(0)))
    return folder


def test_another_size_comes_with_its_inputs(tmp_path):
    backbone = dataclasses.replace(_backbone(), inputs=image_inputs(8, mean=(0.1, 0.2, 0.3)))
    folder = _folder(tmp_path / "x", backbone)
    wide = load.load_backbone(folder, image_size=(12, 16))
    assert wide.params["embeddings"]["position_embeddings"].shape == (1, 13, 24)
    assert wide.config["image_size"] == [12, 16] and wide.inputs.size == (12, 16)
    assert tuple(wide.inputs.processor.image_mean) == (0.1, 0.2, 0.3)
    assert wide(wide.inputs([np.zeros((9, 9, 3), np.uint8)]))["tokens"].shape == (1, 13, 24)
    again = load.load_backbone(_folder(tmp_path / "y", wide))
    _same(again.params, wide.params)
    assert again.inputs.size == (12, 16)
    _same(load.load_backbone(folder, image_size=8).params, backbone.params)


def test_other_channels_change_the_first_convolution_only(tmp_path):
    backbone = dataclasses.replace(_backbone(), inputs=image_inputs(8))
    folder = _folder(tmp_path / "x", backbone)
    grey = load.load_backbone(folder, channels=1)
    assert grey.inputs.channels == 1 and grey.config["num_channels"] == 1
    image = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    three = {"pixel_values": np.repeat(image, 3, axis=-1)}
    one, alike = grey({"pixel_values": image})["tokens"], backbone(three)["tokens"]
    np.testing.assert_allclose(one, alike, atol=1e-4)
    more = load.load_backbone(folder, channels=5, new_channels="zeros")
    image = np.random.default_rng(0).normal(size=(2, 8, 8, 5)).astype(np.float32)
    got, old = more({"pixel_values": image}), backbone({"pixel_values": image[..., :3]})
    np.testing.assert_allclose(got["tokens"], old["tokens"], atol=1e-5)
    with pytest.raises(ValueError, match="a model of 5 channels"):
        more.inputs([image[0]])


def test_placed_leaves_are_placed_again(tmp_path):
    folder, placed = _folder(tmp_path / "x", _backbone()), {}

    def place(path, array):
        placed[path] = array.shape
        return jax.device_put(array, jax.devices()[-1])

    wide = load.load_backbone(folder, image_size=12, place=place)
    assert placed["embeddings/position_embeddings"] == (1, 10, 24)
    assert {leaf.devices().pop() for leaf in jax.tree.leaves(wide.params)} == {jax.devices()[-1]}


def test_the_mean_before_the_norm():
    module, variables = _made("mean_norm")
    out = module.apply(variables, _batch())
    norm = variables["params"]["layernorm"]
    mean = np.asarray(out["tokens"][:, 1:]).mean(1)
    normal = (mean - mean.mean(1, keepdims=True)) / mean.std(1, keepdims=True)
    expected = normal * norm["scale"][None] + norm["bias"][None]
    np.testing.assert_allclose(out["pooled"], expected, atol=1e-5)


@pytest.fixture
def torch():
    import torch

    return torch


def _peer(torch, kind="ViTModel", **changes):
    """A transformers model with every parameter random, the LayerNorms and biases too."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(**{**CONFIG, **changes}, num_labels=5)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            leaf.normal_(1.0 if re.search("norm.*weight", name) else 0.0, 0.3)
    return model


def _ours(model, folder, pooling="pooler", **options):
    """The same weights here, through files."""
    model.save_pretrained(folder, **options)
    checkpoint = read(folder)
    module = FAMILY.make(checkpoint.config, pooling, jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), FAMILY.example(checkpoint.config))
    template = {"params": shapes["params"]}
    trees, report = fill(template, checkpoint, rules=FAMILY.rules, aliases=FAMILY.aliases)
    check(report, allow_fresh=FAMILY.optional, allow_unexpected=FAMILY.ignored)
    return module, trees["params"], checkpoint


def _to_torch(torch, batch):
    return torch.tensor(np.asarray(batch["pixel_values"]).transpose(0, 3, 1, 2))


def _close(got, expected, tolerance=1e-5):
    expected = expected.detach().numpy() if hasattr(expected, "detach") else expected
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=0, atol=tolerance)


@pytest.mark.parity
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(image_size=8, hidden_act="gelu_pytorch_tanh", pooler_act="relu"),
        dict(image_size=[10, 15], patch_size=[3, 5], num_channels=1, qkv_bias=False),
    ],
)
def test_forward_is_that_of_transformers(torch, tmp_path, changes, original):
    peer = _peer(torch, **changes)
    module, params, _ = _ours(peer, tmp_path, save_original_format=original)
    config = vit_config({**CONFIG, **changes})
    batch = _batch(2, config.image_size, config.num_channels)
    out = module.apply({"params": params}, batch)
    theirs = peer(_to_torch(torch, batch), output_hidden_states=True)
    _close(out["tokens"], theirs.last_hidden_state)
    _close(out["pooled"], theirs.pooler_output)
    for stop, hidden in enumerate(theirs.hidden_states[:4], start=1):
        _close(module.apply({"params": params}, batch, frozenset(), stop), hidden)


@pytest.mark.parity
def test_gradients_of_all_parameters_are_those_of_transformers(torch, tmp_path):
    peer = _peer(torch)
    module, params, _ = _ours(peer, tmp_path)
    batch = _batch()
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(3, 7, 24)).astype(np.float32) / 10
    pooled = rng.normal(size=(3, 24)).astype(np.float32) / 10

    def loss(params):
        out = module.apply({"params": params}, batch)
        return jnp.sum(out["tokens"] * tokens) + jnp.sum(out["pooled"] * pooled)

    theirs = peer(_to_torch(torch, batch))
    total = (theirs.last_hidden_state * torch.tensor(tokens)).sum()
    (total + (theirs.pooler_output * torch.tensor(pooled)).sum()).backward()
    expected = {
        normalise(name, FAMILY.aliases): leaf.grad.numpy() for name, leaf in peer.named_parameters()
    }
    got = flatten_dict(jax.grad(loss)(params), sep="/")
    assert len(got) == len(expected)
    for path, gradient in got.items():
        name, layout = torch_name(path, FAMILY.rules)
        if "key/bias" not in path:  # a shift of all scores alike: its gradient is zero
            assert np.abs(expected[name]).max() > 1e-3, name
        _close(gradient, to_ours(expected[name], layout), 1e-4)


@pytest.mark.parity
def test_classification_is_that_of_transformers(torch, tmp_path):
    peer = _peer(torch, "ViTForImageClassification")
    module, params, checkpoint = _ours(peer, tmp_path, "cls")
    params = {name: leaf for name, leaf in params.items() if name != "pooler"}
    out = module.apply({"params": params}, _batch())
    head = Linear(5)
    shapes = jax.eval_shape(head.init, jax.random.key(0), out, {})["params"]
    rules = FAMILY.heads["classification"].rules
    trees, report = fill({"params": shapes}, checkpoint, rules=rules, aliases=FAMILY.aliases)
    check(report, allow_unexpected=(".*",))
    logits = head.apply({"params": trees["params"]}, out, {})
    _close(logits, peer(_to_torch(torch, _batch())).logits)


@pytest.mark.parity
def test_names_and_shapes_at_base_are_those_of_transformers(torch):
    import transformers

    with torch.device("meta"):
        peer = transformers.ViTModel(transformers.ViTConfig())
    theirs = {
        normalise(name, FAMILY.aliases): tuple(leaf.shape)
        for name, leaf in peer.state_dict().items()
    }
    ours = {}
    for path, shape in _shapes({**BASE}).items():
        name, layout = torch_name(path, FAMILY.rules)
        axes = {"same": range(len(shape)), "dense": (1, 0), "conv": (3, 2, 0, 1)}[layout]
        ours[name] = tuple(shape[axis] for axis in axes)
    assert ours == theirs


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_another_size_is_that_of_transformers(torch, tmp_path, kind):
    class_name = {"vit": "ViTModel", "deit": "DeiTModel"}[kind]
    sizes = {**CONFIG, "image_size": 16, "model_type": kind}
    peer = oracle.peer(
        class_name, tmp_path, **{k: v for k, v in sizes.items() if k != "model_type"}
    )
    for size in ((24, 24), (8, 20)):
        backbone = load.load_backbone(tmp_path, image_size=size)
        batch = _batch(2, size)
        theirs = peer(**oracle.to_torch(batch), interpolate_pos_encoding=True)
        _close(backbone(batch)["tokens"], theirs.last_hidden_state, 2e-5)


@pytest.mark.parity
def test_deit_is_that_of_transformers(torch, tmp_path):
    import transformers

    config = {k: v for k, v in DEIT_CONFIG.items() if k != "model_type"}
    labels = {"id2label": {i: str(i) for i in range(5)}}
    folder, name = tmp_path / "theirs", "DeiTForImageClassificationWithTeacher"
    peer = oracle.peer(name, folder, **config, **labels)
    backbone = load.load_backbone(folder)
    batch = _batch(2, (8, 8))
    head, own = load_head(folder, backbone, "distilled_classification")
    theirs = peer(**oracle.to_torch(batch), output_hidden_states=True)
    oracle.close(head.apply({"params": own}, backbone(batch), batch), theirs.logits)
    for stop, hidden in enumerate(theirs.hidden_states[:4], start=1):
        run = backbone.module.apply({"params": backbone.params}, batch, frozenset(), stop)
        oracle.close(run, hidden)

    def loss(params):
        out = backbone.module.apply({"params": params}, batch)
        return jnp.sum(jnp.square(head.apply({"params": own}, out, batch)))

    oracle.same_gradients(backbone, loss, peer, (theirs.logits**2).sum())
    model = attach(backbone, {"head": head}, key=jax.random.key(0))
    model.params["heads"]["head"] = own
    export.export(tmp_path / "ours", model)
    again = getattr(transformers, name).from_pretrained(tmp_path / "ours").eval()
    again = again(**oracle.to_torch(batch)).logits.detach().numpy()
    oracle.close(again, theirs.logits)
    assert oracle.names_agree("DeiTModel", "deit") == 5 + 12 * 16 + 4
