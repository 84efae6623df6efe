"""DINOv2: names, positions of other sizes, values by hand; parity with transformers' models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from flax.traverse_util import flatten_dict

from jtl.models import export, load
from jtl.models.families.dinov2 import DINOV2, DINOV2_WITH_REGISTERS, dinov2_config
from jtl.models.layers.interpolate import interpolate_positions
from jtl.models.load_head import load_head
from jtl.models.model import attach
from jtl.weights.checkpoint import Checkpoint, Tensor
from jtl.weights.load import fill

TINY = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    mlp_ratio=2,
    image_size=12,
    patch_size=4,
    initializer_range=0.3,
)
# The config.json of microsoft/rad-dino, as far as it states sizes.
RAD_DINO = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    mlp_ratio=4,
    image_size=518,
    patch_size=14,
    layerscale_value=1.0,
    use_swiglu_ffn=False,
)
CLASSES = {
    "dinov2": "Dinov2ForImageClassification",
    "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
}
CONFIGS = {
    "dinov2": dict(TINY, use_swiglu_ffn=True),
    "dinov2_with_registers": dict(TINY, num_register_tokens=3),
}


def _batch(size=(12, 12), n=2):
    images = np.random.default_rng(0).normal(size=(n, *size, 3))
    return {"pixel_values": jnp.asarray(images, jnp.float32)}


@functools.cache
def _made(model_type="dinov2", pooling="cls"):
    return load.new_backbone(
        model_type, CONFIGS[model_type], key=jax.random.key(0), pooling=pooling
    )


def _shapes(model_type, config):
    row = {"dinov2": DINOV2, "dinov2_with_registers": DINOV2_WITH_REGISTERS}[model_type]
    whole = load.full_config(row, config)
    module = row.make(whole, "cls", jnp.float32)
    tree = jax.eval_shape(module.init, jax.random.key(0), row.example(whole))["params"]
    return {name: leaf.shape for name, leaf in flatten_dict(tree, sep="/").items()}


def test_the_tree_of_rad_dino():
    shapes = _shapes("dinov2", RAD_DINO)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 86_580_480
    assert shapes["embeddings/position_embeddings"] == (1, 1370, 768)
    assert shapes["embeddings/patch_embeddings/projection/kernel"] == (14, 14, 3, 768)
    layer = {n.split("/", 3)[3]: s for n, s in shapes.items() if n.startswith("encoder/layer/11/")}
    assert layer == {
        **{f"attention/attention/{n}/kernel": (768, 768) for n in ("query", "key", "value")},
        **{f"attention/attention/{n}/bias": (768,) for n in ("query", "key", "value")},
        "attention/output/dense/kernel": (768, 768),
        "attention/output/dense/bias": (768,),
        "layer_scale1/lambda1": (768,),
        "layer_scale2/lambda1": (768,),
        "mlp/fc1/kernel": (768, 3072),
        "mlp/fc1/bias": (3072,),
        "mlp/fc2/kernel": (3072, 768),
        "mlp/fc2/bias": (768,),
        **{f"norm{i}/{n}": (768,) for i in (1, 2) for n in ("scale", "bias")},
    }


def test_the_giant_has_swiglu_of_a_multiple_of_eight():
    giant = dict(RAD_DINO, hidden_size=1536, num_hidden_layers=40, num_attention_heads=24)
    shapes = _shapes("dinov2", dict(giant, use_swiglu_ffn=True))
    assert shapes["encoder/layer/39/mlp/weights_in/kernel"] == (1536, 8192)
    assert shapes["encoder/layer/39/mlp/weights_out/kernel"] == (4096, 1536)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 1_136_480_768


def test_swiglu_by_hand():
    made = _made()
    params = jax.tree.map(jnp.zeros_like, made.params)
    layer = params["encoder"]["layer"]["0"]
    layer["norm2"]["bias"] = jnp.zeros(16).at[0].set(2.0)
    kernel = jnp.zeros((16, 48)).at[0, 0].set(1.0).at[0, 24].set(3.0)  # gate 2, up 6
    layer["mlp"]["weights_in"]["kernel"] = kernel
    layer["mlp"]["weights_out"]["kernel"] = jnp.zeros((24, 16)).at[0, 5].set(1.0)
    layer["layer_scale2"]["lambda1"] = jnp.full(16, 0.5)
    hidden = made.module.apply({"params": params}, _batch(), frozenset(), 2)
    expected = np.zeros(16)
    expected[5] = 0.5 * (2.0 / (1 + np.exp(-2.0))) * 6.0
    np.testing.assert_allclose(hidden[0, 0], expected, atol=1e-6)


def test_poolings_leave_the_registers_out():
    batch = _batch()
    made = {name: _made("dinov2_with_registers", name) for name in DINOV2.poolings}
    tokens = made["cls"](batch)["tokens"]
    assert tokens.shape == (2, 1 + 3 + 9, 16)
    cls, mean = tokens[:, 0], tokens[:, 4:].mean(1)
    np.testing.assert_allclose(made["mean"](batch)["pooled"], mean, atol=1e-6)
    both = made["cls_mean"](batch)["pooled"]
    np.testing.assert_allclose(both, np.concatenate([cls, mean], axis=1), atol=1e-6)
    assert made["cls_mean"].dim == 32 and made["cls"].dim == 16


def test_layer_scale_begins_as_the_config_says():
    config = dict(CONFIGS["dinov2"], layerscale_value=1e-5)
    made = load.new_backbone("dinov2", config, key=jax.random.key(0))
    scale = made.params["encoder"]["layer"]["1"]["layer_scale1"]["lambda1"]
    np.testing.assert_array_equal(scale, np.full(16, 1e-5, np.float32))


def test_images_of_any_size_and_the_mask_token_is_not_read():
    made = _made()
    assert made(_batch((16, 8)))["tokens"].shape == (2, 9, 16)
    assert made(_batch((14, 27)))["tokens"].shape == (2, 1 + 3 * 6, 16)
    assert dict(made.groups)["embeddings/mask_token"] == "unused"


def test_errors():
    whole = load.full_config(DINOV2, CONFIGS["dinov2"])
    with pytest.raises(ValueError, match="num_attention_heads=3 does not divide hidden_size=16"):
        dinov2_config({**whole, "num_attention_heads": 3})
    with pytest.raises(ValueError, match=r"has no patch of patch_size=\(13, 13\)"):
        dinov2_config({**whole, "patch_size": 13})
    with pytest.raises(ValueError, match=r"'max' is not known to DINOv2.*'cls_mean'"):
        DINOV2.make(whole, "max", jnp.float32)


def _original(backbone):
    """The authors' names for the weights of a backbone, as a checkpoint in memory."""
    from jtl.weights.rename import to_torch, torch_name

    flat = flatten_dict(backbone.params, sep="/")
    stored = {}
    for path, leaf in flat.items():
        name, layout = torch_name(path, backbone.family.rules)
        stored[name] = to_torch(np.asarray(leaf), layout)
    names = {}
    for name, value in stored.items():
        name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("embeddings.position_embeddings", "pos_embed")
        name = name.replace("embeddings.", "").replace("layernorm.", "norm.")
        name = name.replace("encoder.layer.", "blocks.").replace(
            "attention.output.dense", "attn.proj"
        )
        name = name.replace("layer_scale1.lambda1", "ls1.gamma")
        name = name.replace("layer_scale2.lambda1", "ls2.gamma")
        name = name.replace("weights_in", "w12").replace("weights_out", "w3")
        names[name.replace("attention.attention.", "attn.")] = value
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [names.pop(f"blocks.{i}.attn.{n}.{kind}") for n in ("query", "key", "value")]
            names[f"blocks.{i}.attn.qkv.{kind}"] = np.concatenate(parts)
    return names


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_authors_files_are_read(model_type, tmp_path):
    backbone = _made(model_type)
    stored = _original(backbone)
    assert ("blocks.0.mlp.w12.weight" in stored) == (model_type == "dinov2")
    tensors = {name: Tensor(value.shape, value.dtype) for name, value in stored.items()}
    checkpoint = Checkpoint("torch", tensors, stored.__getitem__, {}, tmp_path)
    row = backbone.family
    checkpoint = row.layout(checkpoint, backbone.config)
    template = {"params": jax.eval_shape(lambda: backbone.params)}
    trees, report = fill(template, checkpoint, rules=row.rules, aliases=row.aliases)
    assert report.fresh == report.unexpected == report.wrong_shape == ()
    jax.tree.map(np.testing.assert_array_equal, trees["params"], backbone.params)


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request, tmp_path_factory):
    """A model of transformers with its head, and ours from its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    labels = {"id2label": {i: str(i) for i in range(5)}}
    peer = oracle.peer(CLASSES[request.param], folder, **CONFIGS[request.param], **labels)
    return peer, load.load_backbone(folder, pooling="cls_mean"), folder


@pytest.mark.parity
@pytest.mark.parametrize("size", [(12, 12), (16, 24), (8, 4)])
def test_forward_is_that_of_transformers(pair, size):
    peer, backbone, _ = pair
    batch = _batch(size)
    theirs = getattr(peer, peer.base_model_prefix)(
        **oracle.to_torch(batch), output_hidden_states=True
    )
    out = backbone(batch)
    oracle.close(out["tokens"], theirs.last_hidden_state)
    oracle.close(out["pooled"][:, :16], theirs.pooler_output)
    for stop, hidden in enumerate(theirs.hidden_states, start=1):
        run = backbone.module.apply({"params": backbone.params}, batch, frozenset(), stop)
        oracle.close(run, hidden)


@pytest.mark.parity
def test_the_head_and_the_gradients_are_those_of_transformers(pair):
    peer, backbone, folder = pair
    batch = _batch((16, 12))
    head, params = load_head(folder, backbone, "classification")
    logits = peer(**oracle.to_torch(batch)).logits
    oracle.close(head.apply({"params": params}, backbone(batch), batch), logits)

    def loss(ours):
        out = backbone.module.apply({"params": ours}, batch)
        return jnp.sum(jnp.square(head.apply({"params": params}, out, batch)))

    prefix = peer.base_model_prefix
    without = (f"{prefix}.embeddings.mask_token",)
    oracle.same_gradients(backbone, loss, peer, (logits**2).sum(), without=without)


@pytest.mark.parity
def test_transformers_opens_what_is_written(pair, tmp_path):
    import transformers

    peer, backbone, folder = pair
    head, params = load_head(folder, backbone, "classification")
    model = attach(backbone, {"head": head}, key=jax.random.key(0))
    model.params["heads"]["head"] = params
    export.export(tmp_path / "x", model)
    again = getattr(transformers, CLASSES[backbone.family.model_type]).from_pretrained(
        tmp_path / "x"
    )
    batch = oracle.to_torch(_batch())
    oracle.close(again(**batch).logits.detach().numpy(), peer(**batch).logits)


@pytest.mark.parity
def test_bfloat16_is_near_float32(pair):
    _, backbone, folder = pair
    half = load.load_backbone(folder, dtype="bfloat16", pooling="cls")(_batch())
    exact = backbone(_batch())
    assert half["tokens"].dtype == jnp.bfloat16
    gap = np.abs(np.asarray(half["tokens"], np.float32) - exact["tokens"])
    assert gap.max() < 0.05 * float(jnp.abs(exact["tokens"]).max())


@pytest.mark.parity
def test_names_at_real_sizes_are_those_of_transformers():
    assert oracle.names_agree("Dinov2Model", "dinov2", **RAD_DINO) == 4 + 1 + 12 * 18 + 2
    with_registers = {**RAD_DINO, "use_swiglu_ffn": True, "num_register_tokens": 4}
    found = oracle.names_agree(
        "Dinov2WithRegistersModel", "dinov2_with_registers", **with_registers
    )
    assert found == 4 + 2 + 12 * 18 + 2


@pytest.mark.parity
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("new", [(5, 7), (3, 2), (12, 4), (9, 9), (1, 20)])
def test_interpolation_is_that_of_torch(antialias, new):
    import torch

    table = np.random.default_rng(0).normal(size=(1, 1 + 6 * 5, 4)).astype(np.float32)
    maps = torch.tensor(table[:, 1:].reshape(1, 6, 5, 4).transpose(0, 3, 1, 2))
    for corners in (False,) if antialias else (False, True):
        theirs = torch.nn.functional.interpolate(
            maps, size=new, mode="bicubic", align_corners=corners, antialias=antialias
        )
        theirs = theirs.numpy().transpose(0, 2, 3, 1).reshape(1, -1, 4)
        got = interpolate_positions(
            jnp.asarray(table), (6, 5), new, antialias=antialias, align_corners=corners
        )
        oracle.close(got, np.concatenate([table[:, :1], theirs], axis=1), 1e-6)
