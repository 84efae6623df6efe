"""LLaVA: where patches go, what is not read; parity with transformers' PyTorch models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle

from jtl.models import export, load
from jtl.models.backbone import UNUSED
from jtl.models.families.llava import LLAVA, llava_config, merged
from jtl.models.load_head import load_head
from jtl.models.model import attach

VISION = dict(
    model_type="clip_vision_model",
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=8,
    patch_size=4,
)
TEXT = dict(
    model_type="llama",
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=20,
    vocab_size=40,
    max_position_embeddings=32,
)
BOTH = dict(vision_config=VISION, text_config=TEXT, image_token_index=32)


def _batch(rows=3, patches=4, left=False, seed=0):
    """Texts with an image at another place in each row; the last row is padded."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 31, (rows, patches + 5)).astype(np.int32)
    mask = np.ones_like(ids)
    start = 2 if left else 0
    mask[-1, : 2 if left else 0] = 0
    if not left:
        mask[-1, -2:] = 0
    for row in range(rows):
        ids[row, start + row % 2 : start + row % 2 + patches] = 32
    images = rng.normal(size=(rows, 8, 8, 3)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": images}


@pytest.fixture(scope="module")
def made():
    return load.new_backbone("llava", BOTH, key=jax.random.key(0))


def test_patches_go_to_their_places_in_order():
    words = jnp.arange(5.0).reshape(1, 5, 1)
    places = jnp.array([[False, True, False, True, False]])
    got = merged(words, jnp.array([[[10.0], [20.0], [30.0]]]), places)
    assert got.ravel().tolist() == [0.0, 10.0, 2.0, 20.0, 4.0]


def test_stages_and_what_is_not_read(made):
    assert made.labels == ("stem", *(f"block_{i}" for i in range(5)), "top")
    labels = dict(made.groups)
    assert labels["multi_modal_projector/.*"] == "block_2"
    assert labels["language_model/layers/0/.*"] == "block_3"
    assert labels["vision_tower/encoder/layers/2/.*"] == UNUSED
    assert labels["vision_tower/post_layernorm/.*"] == UNUSED
    full = llava_config({**BOTH, "vision_feature_layer": 3})
    assert full.layers == 3


def test_rows_without_image_tokens_do_not_read_their_image(made):
    batch = _batch()
    ids = np.where(batch["input_ids"] == 32, 5, batch["input_ids"])
    words = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    with_images = made({**words, "pixel_values": batch["pixel_values"]})
    np.testing.assert_allclose(with_images["tokens"], made(words)["tokens"], atol=1e-6)
    assert not np.allclose(made(batch)["pooled"], with_images["pooled"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vision_feature_layer=[-2, -3]), r"is \[-2, -3\]; the image tower has 3 layers"),
        (dict(vision_feature_layer=-5), "is -5; .*give a number of -4 to 3"),
        (dict(vision_feature_select_strategy="cls"), "'cls'; there are 'default'"),
        (dict(text_config={**TEXT, "model_type": "bert"}), "decoder 'bert'"),
        (dict(vision_config={**VISION, "model_type": "siglip_vision_model"}), "'siglip_vision_"),
        (dict(projector_hidden_act="gleu"), "activation 'gleu' is not known"),
    ],
)
def test_config_errors(changes, message):
    config = {**BOTH, **changes}
    config["text_config"] = {**TEXT, "max_position_embeddings": 32, **config["text_config"]}
    with pytest.raises(ValueError, match=message):
        LLAVA.make(config, "last", jnp.float32)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    peer = oracle.peer("LlavaForConditionalGeneration", folder, **BOTH)
    return peer, folder, load.load_backbone(folder)


@pytest.mark.parity
@pytest.mark.parametrize("left", [False, True])
def test_tokens_and_logits_are_those_of_transformers(theirs, left):
    peer, folder, made = theirs
    batch = _batch(left=left)
    expected = peer(**oracle.to_torch(batch), output_hidden_states=True)
    out = made(batch)
    real = batch["attention_mask"] == 1
    oracle.close(np.asarray(out["tokens"])[real], expected.hidden_states[-1].detach().numpy()[real])
    head, own = load_head(folder, made, "causal_lm")
    logits = np.asarray(head.apply({"params": own}, out, batch))
    oracle.close(logits[real], expected.logits.detach().numpy()[real])
    hidden = made.module.apply({"params": made.params}, batch, frozenset(), 5)
    oracle.close(np.asarray(hidden)[real], expected.hidden_states[1].detach().numpy()[real])
    words = {name: batch[name] for name in ("input_ids", "attention_mask")}
    alone = peer.model(**oracle.to_torch(words)).last_hidden_state.detach().numpy()
    oracle.close(np.asarray(made(words)["tokens"])[real], alone[real])


@pytest.mark.parity
def test_gradients_of_every_parameter_are_those_of_transformers(theirs):
    import torch

    peer, _, made = theirs
    batch = _batch(2)
    weight = np.random.default_rng(1).normal(size=(2, 9, 12)).astype(np.float32) / 10
    weight *= batch["attention_mask"][:, :, None]

    def loss(params):
        return jnp.sum(made.module.apply({"params": params}, batch)["tokens"] * weight)

    tokens = peer.model(**oracle.to_torch(batch)).last_hidden_state
    unread = ("post_layernorm", "encoder.layers.2.", "lm_head")
    without = {n for n, _ in peer.named_parameters() if any(part in n for part in unread)}
    oracle.same_gradients(made, loss, peer, (tokens * torch.tensor(weight)).sum(), without=without)


@pytest.mark.parity
def test_transformers_opens_what_is_exported(theirs, tmp_path):
    import transformers

    peer, folder, made = theirs
    batch = _batch()
    head, own = load_head(folder, made, "causal_lm")
    model = attach(made, {"next": head}, key=jax.random.key(0))
    model.params["heads"]["next"] = own
    export.export(tmp_path / "x", model)
    names = json.loads((tmp_path / "x" / "config.json").read_text())
    assert names["architectures"] == ["LlavaForConditionalGeneration"]
    opened = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "x").eval()
    expected = peer(**oracle.to_torch(batch)).logits.detach().numpy()
    oracle.close(opened(**oracle.to_torch(batch)).logits.detach().numpy(), expected, 1e-6)
    again = export.import_model(tmp_path / "x")
    out, _ = again.apply(again.params, again.stats, batch)
    real = batch["attention_mask"] == 1
    oracle.close(np.asarray(out["next"])[real], expected[real])
    half = load.load_backbone(folder, dtype=jnp.bfloat16)(batch)["pooled"]
    exact = np.asarray(made(batch)["pooled"])
    assert np.abs(np.asarray(half, np.float32) - exact).max() < 0.1 * np.abs(exact).max()
    tower = load.load_backbone(folder, family="clip_vision_model")
    images = {"pixel_values": batch["pixel_values"]}
    oracle.close(
        tower(images)["pooled"], peer.model.vision_tower(**oracle.to_torch(images)).pooler_output
    )


@pytest.mark.parity
def test_names_and_shapes_are_those_of_the_published_model():
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=24,
        patch_size=14,
        image_size=336,
        projection_dim=768,
    )
    text = dict(model_type="llama", vocab_size=32064, hidden_size=4096, intermediate_size=11008)
    config = dict(vision_config=vision, text_config=text, image_token_index=32000)
    assert oracle.names_agree("LlavaForConditionalGeneration", "llava", **config) == 685
