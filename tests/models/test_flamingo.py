"""IDEFICS: what a token reads, closed gates, names; parity with transformers' PyTorch models."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle

from jtl.models import export, load
from jtl.models.backbone import UNUSED, column
from jtl.models.families.flamingo import IDEFICS, idefics_config
from jtl.models.heads.decoupled import Decoupled
from jtl.models.inputs import load_inputs
from jtl.models.layers.decoupled_embedding import DecoupledEmbedding
from jtl.models.load_head import load_head
from jtl.models.model import attach

VISION = dict(
    embed_dim=12,
    image_size=8,
    intermediate_size=20,
    patch_size=4,
    num_hidden_layers=1,
    num_attention_heads=2,
)
RESAMPLER = dict(
    use_resampler=True,
    resampler_n_latents=3,
    resampler_depth=2,
    resampler_n_heads=2,
    resampler_head_dim=5,
    qk_layer_norms_perceiver=True,
)
TEXT = dict(
    vocab_size=31,
    additional_vocab_size=2,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
)
# The published models have a resampler, one gate a layer and normalised queries.
WITH = dict(
    TEXT,
    vision_config=VISION,
    perceiver_config=RESAMPLER,
    use_resampler=True,
    qk_layer_norms=True,
    alpha_initializer="ones",
)
WITHOUT = dict(
    TEXT,
    vision_config=VISION,
    alpha_type="vector",
    alpha_initializer="normal",
    alphas_initializer_range=0.5,
    cross_layer_interval=2,
    num_hidden_layers=4,
    freeze_text_layers=False,
    freeze_vision_layers=False,
)


def _batch(rows=3, length=7, images=2, seed=0):
    """Texts padded on both sides; each token reads another set of images, the first ones none."""
    rng = np.random.default_rng(seed)
    mask = np.ones((rows, length), np.int32)
    mask[0, -2:] = 0
    mask[-1, :2] = 0
    ids = rng.integers(1, 33, (rows, length)).astype(np.int32) * mask
    ids[:, 3] = 32  # of the second table
    seen = rng.integers(0, 2, (rows, length, images)).astype(np.int32)
    seen[:, :3] = 0
    seen[:, 4] = 1
    pixels = rng.normal(size=(rows, images, 8, 8, 3)).astype(np.float32)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels,
        "image_attention_mask": seen,
    }


@pytest.fixture(scope="module")
def made():
    return load.new_backbone("idefics", WITH, key=jax.random.key(0))


def test_stages_and_what_is_not_read(made):
    assert made.labels == ("stem", *(f"block_{i}" for i in range(1 + 1 + 2)), "top")
    labels = dict(made.groups)
    assert labels["perceiver_resampler/.*"] == "block_1"
    assert labels["layers/1/.*"] == labels["gated_cross_attn_layers/1/.*"] == "block_3"
    assert labels["vision_model/post_layernorm/.*"] == UNUSED
    second = dict(IDEFICS.groups(WITHOUT, "last"))
    assert second["layers/2/.*"] == second["gated_cross_attn_layers/1/.*"] == "block_3"
    assert idefics_config(WITHOUT).crossed == (0, 2)


def test_with_closed_gates_it_is_its_language_model():
    config = {**WITHOUT, **TEXT, "alpha_initializer": "zeros"}
    made = load.new_backbone("idefics", config, key=jax.random.key(0))
    llama = load.new_backbone("llama", TEXT, key=jax.random.key(0))
    own = {name: made.params[name] for name in ("embed_tokens", "layers", "norm")}
    table = own["embed_tokens"]["embedding"]
    added = own["embed_tokens"]["additional_embedding"]["embedding"]
    module = dataclasses.replace(
        llama.module, config=dataclasses.replace(llama.module.config, vocab_size=33)
    )
    own["embed_tokens"] = {"embedding": jnp.concatenate([table, added])}
    batch = _batch()
    words = {name: jnp.asarray(batch[name]) for name in ("input_ids", "attention_mask")}
    first = np.maximum(np.cumsum(batch["attention_mask"], 1) - 1, 0)
    expected = module.apply({"params": own}, {**words, "position_ids": jnp.asarray(first)})
    real = batch["attention_mask"] == 1
    for got in (made(batch), made(words)):
        np.testing.assert_allclose(got["tokens"][real], expected["tokens"][real], atol=1e-6)


def test_a_token_reads_the_images_of_its_mask_alone(made):
    batch = _batch()
    other = {**batch, "pixel_values": batch["pixel_values"].copy()}
    other["pixel_values"][:, 1] += 1.0
    first = dict(batch, image_attention_mask=batch["image_attention_mask"] * np.array([1, 0]))
    changed = {**other, "image_attention_mask": first["image_attention_mask"]}
    np.testing.assert_allclose(made(first)["tokens"], made(changed)["tokens"], atol=1e-6)
    assert np.abs(made(batch)["tokens"] - made(other)["tokens"]).max() > 1e-4
    none = dict(batch, image_attention_mask=0 * batch["image_attention_mask"])
    words = {name: batch[name] for name in ("input_ids", "attention_mask")}
    np.testing.assert_allclose(made(none)["tokens"], made(words)["tokens"], atol=1e-6)


def test_one_image_each_is_read_by_every_token(made):
    batch = _batch(images=1)
    ones = dict(batch, image_attention_mask=np.ones_like(batch["image_attention_mask"]))
    plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
    plain["pixel_values"] = batch["pixel_values"][:, 0]
    np.testing.assert_allclose(made(ones)["tokens"], made(plain)["tokens"], atol=1e-6)


def test_columns_that_do_not_fit(made):
    batch = _batch()
    with pytest.raises(ValueError, match=r"\(3, 7, 2\); the batch has \(3, 7, 1\)"):
        made({**batch, "pixel_values": batch["pixel_values"][:, :1]})
    with pytest.raises(ValueError, match=r"\(2, 2, 8, 8, 3\) for 3 texts"):
        made({**batch, "pixel_values": batch["pixel_values"][:2]})
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="'image_attention_mask' and no 'pixel_values'"):
        made(batch)


def test_tokens_of_two_tables():
    layer = DecoupledEmbedding(3, 2, 1)
    params = {"embedding": jnp.array([[0.0], [1.0], [2.0]])}
    params["additional_embedding"] = {"embedding": jnp.array([[3.0], [4.0]])}
    got = layer.apply({"params": params}, jnp.array([[4, 0, 2, 3]]))
    assert got.ravel().tolist() == [4.0, 0.0, 2.0, 3.0]
    head = Decoupled(vocabulary=2, additional=1)
    kernels = {"kernel": jnp.array([[1.0, 2.0]]), "additional_fc": {"kernel": jnp.array([[5.0]])}}
    logits = head.apply({"params": kernels}, {"tokens": jnp.array([[[2.0]]])}, {})
    assert logits.ravel().tolist() == [2.0, 4.0, 10.0]


def test_inputs_of_a_published_folder(made, tmp_path):
    stated = dict(image_processor_type="IdeficsImageProcessor", image_size=8)
    stated |= dict(image_mean=[0.5] * 3, image_std=[0.25] * 3, image_num_channels=3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    inputs = load_inputs(tmp_path, "image_text", made.config)
    made_of = inputs(images=[np.full((20, 30, 3), 255, np.uint8)])
    np.testing.assert_allclose(made_of["pixel_values"], np.full((1, 8, 8, 3), 2.0), atol=1e-6)
    words = {"input_ids": np.full((1, 3), 5, np.int32)}
    assert made({**words, **made_of})["pooled"].shape == (1, 16)


def test_other_image_sizes_interpolate_the_positions(made):
    params, config = IDEFICS.resize(made.params, made.config, (12, 8))
    table = params["vision_model"]["embeddings"]["position_embedding"]["embedding"]
    assert table.shape == (1 + 3 * 2, 12) and config["vision_config"]["image_size"] == [12, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(cross_layer_interval=4), "is 4 and the decoder has 2 layers"),
        (dict(alpha_type="matrix"), "alpha_type is 'matrix'"),
        (dict(alpha_initializer="twos"), "alpha_initializer 'twos'"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings=True and 2 additional tokens"),
        (dict(vision_config={**VISION, "num_attention_heads": 5}), "=5 does not divide"),
        (dict(hidden_act="gleu"), "activation 'gleu' is not known"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        IDEFICS.make({**WITH, **changes}, "last", jnp.float32)


@pytest.fixture(scope="module", params=[WITH, WITHOUT], ids=["resampler", "no resampler"])
def theirs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("idefics")
    peer = oracle.peer("IdeficsForVisionText2Text", folder, **request.param)
    return peer, folder, load.load_backbone(folder)


def _columns(made):
    """Return a compiled function to the hidden array at every border and the last outputs."""

    @jax.jit
    def run(params, batch):
        found = {}
        for border in range(1, made.module.blocks + 1):
            hidden = made.module.apply({"params": params}, {**batch, **found}, frozenset(), border)
            found = {**found, column(border, made.module.blocks): hidden}
        return list(found.values()), made.module.apply({"params": params}, {**batch, **found})

    return lambda batch: run(made.params, batch)


@pytest.mark.parity
def test_hidden_states_and_logits_are_those_of_transformers(theirs):
    peer, folder, made = theirs
    batch = _batch(images=3)
    real = batch["attention_mask"] == 1
    length = real.shape[1]
    expected = peer(**oracle.to_torch(batch), output_hidden_states=True, use_cache=False)
    borders, out = _columns(made)(batch)
    states = [state.detach().numpy() for state in expected.hidden_states]
    oracle.close(np.asarray(out["tokens"])[real], states[-1][real])
    # Their first state stands behind the first cross-attention.
    first = idefics_config(made.config).before
    for hidden, state in zip(borders[first + 1 :], states[1:-1], strict=True):
        oracle.close(np.asarray(hidden)[:, -length:, : made.dim][real], state[real])
    images = np.asarray(borders[first])[:, :-length, :12]
    oracle.close(images, expected.image_hidden_states.detach().numpy().reshape(images.shape))
    head, own = load_head(folder, made, "causal_lm")
    logits = np.asarray(head.apply({"params": own}, out, batch))
    assert logits.shape[-1] == 33
    oracle.close(logits[real], expected.logits.detach().numpy()[real])


@pytest.mark.parity
def test_gradients_of_every_parameter_are_those_of_transformers(theirs):
    import torch

    peer, _, made = theirs
    batch = _batch()
    weight = np.random.default_rng(1).normal(size=(3, 7, 16)).astype(np.float32) / 10
    weight *= batch["attention_mask"][:, :, None]
    peer.requires_grad_(True)

    def loss(params):
        return jnp.sum(made.module.apply({"params": params}, batch)["tokens"] * weight)

    tokens = peer.model(**oracle.to_torch(batch)).last_hidden_state
    unread = ("post_layernorm", "lm_head")
    without = {n for n, _ in peer.named_parameters() if any(part in n for part in unread)}
    oracle.same_gradients(made, loss, peer, (tokens * torch.tensor(weight)).sum(), without=without)


@pytest.mark.parity
@pytest.mark.parametrize("theirs", [WITH], indirect=True, ids=["resampler"])
def test_transformers_opens_what_is_exported(theirs, tmp_path):
    import transformers

    peer, folder, made = theirs
    batch = _batch()
    head, own = load_head(folder, made, "causal_lm")
    model = attach(made, {"next": head}, key=jax.random.key(0))
    model.params["heads"]["next"] = own
    export.export(tmp_path / "x", model)
    stated = json.loads((tmp_path / "x" / "config.json").read_text())
    assert stated["architectures"] == ["IdeficsForVisionText2Text"]
    opened, info = transformers.IdeficsForVisionText2Text.from_pretrained(
        tmp_path / "x", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    expected = peer(**oracle.to_torch(batch)).logits.detach().numpy()
    oracle.close(opened.eval()(**oracle.to_torch(batch)).logits.detach().numpy(), expected, 1e-6)
    again = export.import_model(tmp_path / "x")
    assert again.heads["next"] == head
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)


@pytest.mark.parity
@pytest.mark.parametrize("theirs", [WITHOUT], indirect=True, ids=["no resampler"])
def test_half_precision_is_near(theirs):
    _, folder, made = theirs
    batch = _batch()
    half = load.load_backbone(folder, dtype=jnp.bfloat16)(batch)["pooled"]
    exact = np.asarray(made(batch)["pooled"])
    assert half.dtype == jnp.bfloat16
    assert np.abs(np.asarray(half, np.float32) - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parity
def test_names_and_shapes_are_those_of_the_published_model():
    vision = dict(embed_dim=1280, image_size=224, intermediate_size=5120, num_hidden_layers=32)
    config = dict(
        vision_config=dict(vision, patch_size=14, num_attention_heads=16),
        perceiver_config=dict(use_resampler=True, qk_layer_norms_perceiver=True),
        additional_vocab_size=2,
        cross_layer_interval=4,
        qk_layer_norms=True,
        use_resampler=True,
    )
    assert oracle.names_agree("IdeficsForVisionText2Text", "idefics", **config) == 1013
