"""MedCLIP: means over layers by hand, one side alone; parity with its definition."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from test_biovil import _published

from jtl.models import load
from jtl.models.backbone import UNUSED
from jtl.models.families.medclip import MEDCLIP
from jtl.models.heads import Contrastive
from jtl.weights.rename import torch_name

VISION = dict(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1])
TEXT = dict(
    vocab_size=31,
    hidden_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=20,
    max_position_embeddings=16,
)
BOTH = dict(vision_config=VISION, text_config=TEXT, image_size=32, projection_dim=6)


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
        "vision_model/projection_head/kernel": "vision_model.model.fc.weight",
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


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The network as it is defined, from transformers' parts, in a file of published names."""
    torch = pytest.importorskip("torch")
    import transformers

    parts = {
        "vision": transformers.ResNetModel(transformers.ResNetConfig(**VISION)),
        "image": torch.nn.Linear(24, 6, bias=False),
        "bert": transformers.BertModel(transformers.BertConfig(**TEXT)),
        "text": torch.nn.Linear(12, 6, bias=False),
    }
    peer = torch.nn.ModuleDict(parts).eval()
    peer.register_parameter("logit_scale", torch.nn.Parameter(torch.tensor(2.0)))
    oracle.randomise(peer, torch.Generator().manual_seed(0), 0.3)
    stored = {_name(name): leaf for name, leaf in peer.state_dict().items()}
    folder = tmp_path_factory.mktemp("medclip")
    torch.save(stored, folder / "pytorch_model.bin")
    config = {"model_type": "medclip", **BOTH}
    return peer, load.load_backbone(folder / "pytorch_model.bin", family="medclip", config=config)


def _name(name):
    part, rest = name.partition(".")[::2]
    if part == "vision":
        return _published(f"encoder.{rest}").replace("encoder.encoder.", "vision_model.model.")
    heads = {"image": "vision_model.model.fc.weight", "text": "text_model.projection_head.weight"}
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

    names = [(_name(name), leaf) for name, leaf in peer.named_parameters()]
    named = types.SimpleNamespace(zero_grad=peer.zero_grad, named_parameters=lambda: names)
    without = {f"text_model.model.pooler.dense.{leaf}" for leaf in ("weight", "bias")}
    oracle.same_gradients(made, loss, named, scores.square().sum(), without=without)
