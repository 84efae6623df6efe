"""MedCLIP: means over layers by hand, one side alone; parity with its definition."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from flax.traverse_util import flatten_dict
from test_biovil import _published

from jtl.models import export, load
from jtl.models.backbone import UNUSED
from jtl.models.families.medclip import MEDCLIP
from jtl.models.families.swin import SWIN as SWIN_ROW
from jtl.models.heads import Contrastive
from jtl.models.model import attach
from jtl.weights.rename import torch_name

VISION = dict(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1])
SWIN = dict(
    model_type="swin",
    embed_dim=8,
    depths=[2, 1],
    num_heads=[1, 2],
    window_size=3,
    patch_size=4,
    image_size=32,
)
TEXT = dict(
    vocab_size=31,
    hidden_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=20,
    max_position_embeddings=16,
)
BOTH = dict(vision_config=VISION, text_config=TEXT, image_size=32, projection_dim=6)
WITH_SWIN = {**BOTH, "vision_config": SWIN}


def _batch(rows=2, length=7, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.ones((rows, length), np.int32)
    mask[0, -3:] = 0
    return {
        "input_ids": rng.integers(3, 30, (rows, length)).astype(np.int32),
        "attention_mask": mask,
        "pixel_values": rng.normal(size=(rows, 32, 32, 3)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def pair():
    return load.new_backbone("medclip", BOTH, key=jax.random.key(0))


def test_one_side_alone_gives_what_both_give(pair):
    batch = _batch()
    both = pair(batch)
    images = pair({"pixel_values": batch["pixel_values"]})
    texts = pair({name: batch[name] for name in ("input_ids", "attention_mask")})
    np.testing.assert_allclose(images["pooled"], both["image_embeds"], atol=1e-5)
    np.testing.assert_allclose(texts["pooled"], both["text_embeds"], atol=1e-5)
    assert both["tokens"].shape == (2, 16, 24) and both["text_tokens"].shape == (2, 7, 12)


def test_labels_names_and_the_published_size(pair):
    labels = dict(pair.groups)
    assert labels["text_model/model/(?:encoder/layer/0/.*)"] == "block_0"
    assert labels["vision_model/model/(?:encoder/stages/0/layers/0/.*)"] == "block_1"
    assert labels["text_model/model/(?:pooler/.*)"] == UNUSED
    names = {
        "vision_model/fc/kernel": "vision_model.model.fc.weight",
        "text_model/projection_head/kernel": "text_model.projection_head.weight",
        "vision_model/model/encoder/stages/0/layers/1/layer/2/convolution/kernel": (
            "vision_model.model.layer1.1.conv3.weight"
        ),
        "text_model/model/pooler/dense/bias": "text_model.model.pooler.dense.bias",
    }
    for ours, theirs in names.items():
        assert torch_name(ours, MEDCLIP.rules)[0] == theirs
    config = load.full_config(MEDCLIP, {})
    module = MEDCLIP.make(config, "image", jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), MEDCLIP.example(config))
    # ResNet-50: 53 convolutions and norms; BERT: 5 + 12 * 16 + 2; two projections, temperature.
    assert len(jax.tree.leaves(shapes["params"])) == 53 * 3 + 199 + 3
    assert len(jax.tree.leaves(shapes["batch_stats"])) == 53 * 2


def test_the_temperature_is_kept_within_bounds_and_its_gradient_passes(pair):
    hot = {**pair.params, "logit_scale": jnp.array(9.0)}
    variables = {"params": hot, "batch_stats": pair.stats}
    assert pair.module.apply(variables, _batch())["logit_scale"] == pytest.approx(4.6052)

    def scale(value):
        params = {**hot, "logit_scale": value}
        own = {"params": params, "batch_stats": pair.stats}
        return pair.module.apply(own, {"pixel_values": _batch()["pixel_values"]})["logit_scale"]

    assert float(jax.grad(scale)(jnp.array(9.0))) == 1.0


def test_images_by_swin_have_transformers_names_and_their_own_widths():
    made = load.new_backbone("medclip", WITH_SWIN, key=jax.random.key(0))
    config = made.module.config
    assert config.widths == (8, 8, 16, 16)
    assert made.stats == {} and made.module.blocks == 3
    batch = _batch()
    both, images = made(batch), made({"pixel_values": batch["pixel_values"]})
    np.testing.assert_allclose(images["pooled"], both["image_embeds"], atol=1e-5)
    assert images["tokens"].shape == (2, 16, 16)
    layer = "encoder/layers/0/blocks/1/attention/self"
    names = {
        "vision_model/projection_head/kernel": "vision_model.projection_head.weight",
        "vision_model/model/embeddings/patch_embeddings/projection/kernel": (
            "vision_model.model.embeddings.patch_embeddings.projection.weight"
        ),
        f"vision_model/model/{layer}/relative_position_bias_table": (
            f"vision_model.model.{layer.replace('/', '.')}.relative_position_bias_table"
        ),
    }
    for ours, theirs in names.items():
        assert torch_name(ours, MEDCLIP.rules)[0] == theirs
    labels = dict(made.groups)
    assert labels["vision_model/model/(?:encoder/layers/0/downsample/.*)"] == "block_1"


def test_the_published_size_of_swin():
    config = load.full_config(MEDCLIP, {"vision_config": {"model_type": "swin"}})
    module = MEDCLIP.make(config, "image", jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), MEDCLIP.example(config))
    # Swin tiny: patches and a norm, 12 layers of 17, three mergings of 3, a norm; BERT, as above.
    assert len(jax.tree.leaves(shapes["params"])) == 4 + 12 * 17 + 3 * 3 + 2 + 199 + 3
    assert shapes["params"]["vision_model"]["projection_head"]["kernel"].shape == (768, 512)


def test_the_network_that_reads_the_images_is_stated(tmp_path):
    made = load.new_backbone("medclip", WITH_SWIN, key=jax.random.key(0))
    export.export(tmp_path, attach(made, {"pairs": Contrastive()}, key=jax.random.key(1)))
    again = load.load_backbone(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, made.params, again.params)
    with pytest.raises(ValueError, match="read by 'swin' and the config states 'resnet'"):
        load.load_backbone(tmp_path / "model.safetensors", family="medclip", config=BOTH)
    with pytest.raises(ValueError, match=r"one of \['resnet', 'swin'\]"):
        load.full_config(MEDCLIP, {"vision_config": {"model_type": "vit"}})


@pytest.fixture(scope="module", params=["resnet", "swin"])
def theirs(request, tmp_path_factory):
    """The network as it is defined, from transformers' parts, in a file of published names."""
    import torch
    import transformers

    kinds = {
        "resnet": lambda: transformers.ResNetModel(transformers.ResNetConfig(**VISION)),
        "swin": lambda: transformers.SwinModel(transformers.SwinConfig(**SWIN)),
    }
    width, config = {"resnet": (24, BOTH), "swin": (16, WITH_SWIN)}[request.param]
    parts = {
        "vision": kinds[request.param](),
        "image": torch.nn.Linear(width, 6, bias=False),
        "bert": transformers.BertModel(transformers.BertConfig(**TEXT)),
        "text": torch.nn.Linear(12, 6, bias=False),
    }
    peer = torch.nn.ModuleDict(parts).eval()
    peer.register_parameter("logit_scale", torch.nn.Parameter(torch.tensor(2.0)))
    oracle.randomise(peer, torch.Generator().manual_seed(0), 0.3)
    stored = {_name(peer, name): leaf for name, leaf in peer.state_dict().items()}
    file = tmp_path_factory.mktemp("medclip") / "pytorch_model.bin"
    torch.save(stored, file)
    return peer, load.load_backbone(file, family="medclip", config=config)


def _name(peer, name):
    """The published name of a tensor of the composition."""
    part, rest = name.partition(".")[::2]
    swin = peer["vision"].config.model_type == "swin"
    if part == "vision" and swin:
        for pattern, file in SWIN_ROW.aliases[1:]:  # what transformers 5 has in memory
            rest = re.sub(pattern, file, rest)
        return f"vision_model.model.{rest}"
    if part == "vision":
        return _published(f"encoder.{rest}").replace("encoder.encoder.", "vision_model.model.")
    image = "vision_model.projection_head.weight" if swin else "vision_model.model.fc.weight"
    heads = {"image": image, "text": "text_model.projection_head.weight"}
    return heads.get(part, name if part == "logit_scale" else f"text_model.model.{rest}")


@pytest.mark.parity
def test_outputs_and_gradients_are_those_of_the_definition(theirs):
    import torch

    peer, made = theirs
    batch = _batch()
    given = oracle.to_torch(batch)
    image = peer["image"](peer["vision"](given.pop("pixel_values")).pooler_output.flatten(1))
    states = peer["bert"](**given, output_hidden_states=True).hidden_states
    text = peer["text"](torch.stack([states[1], states[2], states[-1]]).mean((0, 2)))
    out = made(batch)
    oracle.close(out["image_embeds"], image)
    oracle.close(out["text_embeds"], text)
    unit = torch.nn.functional.normalize
    scores = peer.logit_scale.exp() * unit(image) @ unit(text).T
    oracle.close(Contrastive().apply({}, out, batch), scores)

    def loss(params):
        own = made.module.apply({"params": params, "batch_stats": made.stats}, batch)
        return jnp.sum(jnp.square(Contrastive().apply({}, own, batch)))

    names = [(_name(peer, name), leaf) for name, leaf in peer.named_parameters()]
    named = types.SimpleNamespace(zero_grad=peer.zero_grad, named_parameters=lambda: names)
    without = {f"text_model.model.pooler.dense.{leaf}" for leaf in ("weight", "bias")}
    oracle.same_gradients(made, loss, named, scores.square().sum(), without=without)


@pytest.mark.parity
def test_names_of_the_published_size_of_swin():
    import torch
    import transformers

    with torch.device("meta"):
        swin = transformers.SwinModel(transformers.SwinConfig())
    peer = {"vision": swin}
    theirs = {_name(peer, f"vision.{name}") for name in swin.state_dict()}
    config = load.full_config(MEDCLIP, {"vision_config": {"model_type": "swin"}})
    module = MEDCLIP.make(config, "image", jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), MEDCLIP.example(config))["params"]
    own = flatten_dict(shapes["vision_model"]["model"], sep="/")
    names = {torch_name(f"vision_model/model/{path}", MEDCLIP.rules)[0] for path in own}
    assert names == theirs and len(names) == 219
