"""SigLIP: pooling and last place by hand, one side alone; parity with transformers' PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle

from jtl.losses import contrastive as losses
from jtl.models import export, load
from jtl.models.families.siglip import SIGLIP, SIGLIP_VISION
from jtl.models.heads import Contrastive, Linear
from jtl.models.layers.siglip_tower import SiglipVisionConfig, _AttentionPooling
from jtl.models.load_head import load_head
from jtl.models.model import attach

VISION = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=10,
    patch_size=4,
)
TEXT = dict(
    hidden_size=12,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=20,
    vocab_size=31,
    max_position_embeddings=7,
    projection_size=16,
)
BOTH = dict(vision_config=VISION, text_config=TEXT)


def _batch(rows=3, length=7, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(rows, 10, 10, 3)).astype(np.float32)
    return {
        "input_ids": rng.integers(3, 30, (rows, length)).astype(np.int32),
        "pixel_values": images,
    }


def test_the_query_of_the_pooling_takes_the_mean_where_all_scores_are_equal():
    config = SiglipVisionConfig(2, 1, 1, 3, 4, 4)
    module = _AttentionPooling(config, jnp.float32)
    tokens = jnp.array([[[1.0, 5.0], [3.0, 7.0]]])
    params = jax.tree.map(jnp.zeros_like, module.init(jax.random.key(0), tokens)["params"])
    value = jnp.zeros((2, 6)).at[:, 4:].set(jnp.eye(2))  # query and key are zero
    params["attention"]["in_proj"]["kernel"] = value
    params["attention"]["out_proj"] = {"kernel": jnp.eye(2), "bias": jnp.array([10.0, 0.0])}
    np.testing.assert_allclose(module.apply({"params": params}, tokens), [[12.0, 6.0]])


@pytest.fixture(scope="module")
def pair():
    return load.new_backbone("siglip", BOTH, key=jax.random.key(0))


def test_one_side_alone_gives_what_both_give(pair):
    batch = _batch()
    both = pair(batch)
    images = pair({"pixel_values": batch["pixel_values"]})
    texts = pair({"input_ids": batch["input_ids"]})
    np.testing.assert_allclose(images["pooled"], both["image_embeds"], atol=1e-6)
    np.testing.assert_allclose(texts["pooled"], both["text_embeds"], atol=1e-6)
    np.testing.assert_allclose(both["logit_scale"], [np.log(10.0)], rtol=1e-6)
    np.testing.assert_array_equal(both["logit_bias"], [-10.0])


def test_blocks_and_config_errors(pair):
    labels = dict(pair.groups)
    assert labels["vision_model/encoder/layers/0/.*"] == "block_1"
    assert labels["text_model/encoder/layers/0/.*"] == "block_0"
    without = {**VISION, "vision_use_head": False}
    with pytest.raises(ValueError, match="vision_use_head=False.*pooling='mean'"):
        SIGLIP.make({**BOTH, "vision_config": without}, "image", jnp.float32)
    tower = load.new_backbone("siglip_vision_model", without, key=jax.random.key(0), pooling="mean")
    assert "head" not in tower.params["vision_model"]
    with pytest.raises(ValueError, match=r"text tower lacks \['vocab_size'\]"):
        SIGLIP.make({**BOTH, "text_config": {**TEXT, "vocab_size": None}}, "image", jnp.float32)


def test_images_of_another_size_and_other_channels(pair, tmp_path):
    export.export(tmp_path, attach(pair, {"x": Linear(2)}, key=jax.random.key(0)))
    wide = load.load_backbone(tmp_path, image_size=(8, 13), channels=1)
    stated = wide.config["vision_config"]
    assert stated["image_size"] == [8, 13] and stated["num_channels"] == 1
    images = np.random.default_rng(0).normal(size=(2, 8, 13, 1)).astype(np.float32)
    assert wide({"pixel_values": images})["tokens"].shape == (2, 2 * 3, 16)
    images = np.random.default_rng(0).normal(size=(2, 10, 10, 1)).astype(np.float32)
    grey = load.load_backbone(tmp_path, family="siglip_vision_model", channels=1)
    three = {"pixel_values": np.repeat(images, 3, axis=-1)}
    one = grey({"pixel_values": images})["tokens"]
    np.testing.assert_allclose(one, pair(three)["tokens"], atol=1e-4)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    return oracle.peer("SiglipModel", folder, **BOTH), folder, load.load_backbone(folder)


@pytest.mark.parity
def test_outputs_scores_and_loss_are_those_of_transformers(theirs):
    peer, folder, made = theirs
    batch = _batch()
    expected = peer(**oracle.to_torch(batch), output_hidden_states=True, return_loss=True)
    out = made(batch)
    vision, text = expected.vision_model_output, expected.text_model_output
    oracle.close(out["tokens"], vision.last_hidden_state)
    oracle.close(out["text_tokens"], text.last_hidden_state)
    oracle.close(out["image_embeds"], vision.pooler_output)
    oracle.close(out["text_embeds"], text.pooler_output)
    hidden = made.module.apply({"params": made.params}, batch, frozenset(), 3)
    oracle.close(hidden[:, :4], vision.hidden_states[1])
    oracle.close(hidden[:, 4:, :12], text.hidden_states[2])
    head, own = load_head(folder, made, "contrastive")
    scores = head.apply({"params": own}, out, batch)
    oracle.close(scores, expected.logits_per_image)
    total, weight = losses.sigmoid_pairs(scores)
    oracle.close(total / weight, expected.loss)


@pytest.mark.parity
@pytest.mark.parametrize("size", [(24, 24), (8, 22)])
def test_another_size_is_that_of_transformers(theirs, size):
    peer, folder, _ = theirs
    images = np.random.default_rng(2).normal(size=(2, *size, 3)).astype(np.float32)
    batch = {"pixel_values": images}
    given = oracle.to_torch(batch)
    made = load.load_backbone(folder, image_size=size)
    expected = peer.vision_model(**given, interpolate_pos_encoding=True)
    oracle.close(made(batch)["tokens"], expected.last_hidden_state)
    tower = load.load_backbone(folder, family="siglip_vision_model", image_size=size)
    oracle.close(tower(batch)["pooled"], expected.pooler_output)


@pytest.mark.parity
def test_gradients_of_every_parameter_are_those_of_transformers(theirs):
    import torch

    peer, _, made = theirs
    batch = _batch()
    weight = np.random.default_rng(1).normal(size=(2, 3, 16)).astype(np.float32) / 10
    head = Contrastive()

    def loss(params):
        out = made.module.apply({"params": params}, batch)
        total, pairs = losses.sigmoid_pairs(head.apply({}, out, batch))
        own = jnp.sum(out["image_embeds"] * weight[0]) + jnp.sum(out["text_embeds"] * weight[1])
        return total / pairs + own

    expected = peer(**oracle.to_torch(batch), return_loss=True)
    image, text = (
        expected.vision_model_output.pooler_output,
        expected.text_model_output.pooler_output,
    )
    total = expected.loss + (image * torch.tensor(weight[0])).sum()
    oracle.same_gradients(made, loss, peer, total + (text * torch.tensor(weight[1])).sum())


@pytest.mark.parity
def test_towers_alone_are_those_of_transformers(theirs, tmp_path):
    import transformers

    _, folder, _ = theirs
    batch = _batch()
    mask = np.array([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4], np.int32)
    for side, own in (
        ("Vision", {"pixel_values": batch["pixel_values"]}),
        ("Text", {"input_ids": batch["input_ids"], "attention_mask": mask}),
    ):
        model_type = f"siglip_{side.lower()}_model"
        tower = getattr(transformers, f"Siglip{side}Model").from_pretrained(folder).eval()
        expected = tower(**oracle.to_torch(own)).pooler_output
        part = load.load_backbone(folder, family=model_type)
        oracle.close(part(own)["pooled"], expected)
        export.export(tmp_path / side, attach(part, {"x": Linear(2)}, key=jax.random.key(0)))
        opened = getattr(transformers, f"Siglip{side}Model").from_pretrained(tmp_path / side)
        oracle.close(part(own)["pooled"], opened.eval()(**oracle.to_torch(own)).pooler_output)
        tower.save_pretrained(tmp_path / f"{side}2")  # a tower's own file has other names
        oracle.close(load.load_backbone(tmp_path / f"{side}2")(own)["pooled"], expected)


@pytest.mark.parity
def test_transformers_opens_what_is_exported(theirs, tmp_path):
    import transformers

    peer, folder, made = theirs
    batch = _batch()
    model = attach(made, {"pairs": Contrastive()}, key=jax.random.key(0))
    export.export(tmp_path / "pair", model)
    opened = transformers.SiglipModel.from_pretrained(tmp_path / "pair").eval()
    expected = peer(**oracle.to_torch(batch)).logits_per_image
    oracle.close(opened(**oracle.to_torch(batch)).logits_per_image.detach().numpy(), expected, 1e-6)
    half = load.load_backbone(folder, dtype=jnp.bfloat16)(batch)["image_embeds"]
    exact = np.asarray(made(batch)["image_embeds"])
    assert half.dtype == jnp.bfloat16
    assert np.abs(np.asarray(half, np.float32) - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parity
def test_names_and_shapes_are_those_of_the_published_models():
    base = dict(vision_config=dict(patch_size=16), text_config=dict(vocab_size=32000))
    assert oracle.names_agree("SiglipModel", "siglip", **base) == 408
    assert oracle.names_agree("SiglipVisionModel", "siglip_vision_model", patch_size=16) == 208
    assert SIGLIP_VISION.part == "vision_config"
