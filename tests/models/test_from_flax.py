"""Flax models of transformers 4 as backbones: in memory and from their msgpack files, same outputs.

They run in an environment of their own, with transformers 4.57: `pytest -m flax`. FlaxT5Model is
not among them: it calls `jnp.clip` by an argument that JAX no longer has.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.models.load import from_flax, load_backbone

pytestmark = pytest.mark.flax


@pytest.fixture(autouse=True)
def ranks_are_promoted():
    """The Flax classes add arrays of unequal rank."""
    with jax.numpy_rank_promotion("allow"):
        yield


_TEXT = dict(
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
)
_IMAGE = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=8,
    patch_size=4,
)
_DECODER = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
CASES = {
    "Bert": _TEXT,
    "Electra": dict(_TEXT, embedding_size=8),
    "Roberta": _TEXT,
    "DistilBert": dict(vocab_size=31, dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    "GPT2": dict(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=16, **_DECODER),
    "Llama": dict(_TEXT, num_key_value_heads=1, **_DECODER),
    # The window of the Flax class is one token wider than PyTorch's, so it is out of reach here.
    "Mistral": dict(_TEXT, num_key_value_heads=1, sliding_window=16, **_DECODER),
    "ViT": _IMAGE,
    "ResNet": dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "CLIPVision": _IMAGE,
    "Wav2Vec2": dict(
        _TEXT,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    ),
    "Whisper": dict(
        vocab_size=31,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=10,
        decoder_start_token_id=1,
        **_DECODER,
    ),
}


def _peer(name):
    import transformers

    made = getattr(transformers, f"Flax{name}Model")
    options = {"input_shape": (1, 24, 24, 3)} if name == "ResNet" else {}
    return made(made.config_class(**CASES[name]), seed=0, **options)


def _batches(name):
    """The same rows for us and for them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 31, (2, 7))
    mask = np.ones_like(ids)
    mask[0, 5:] = 0
    if name in ("ViT", "CLIPVision", "ResNet"):
        side = 24 if name == "ResNet" else 8
        pixels = rng.normal(size=(2, side, side, 3)).astype(np.float32)
        return {"pixel_values": pixels}, {"pixel_values": np.moveaxis(pixels, -1, 1)}
    if name == "Wav2Vec2":
        batch = {"input_values": rng.normal(size=(2, 400)).astype(np.float32)}
    elif name == "Whisper":
        features = rng.normal(size=(2, 8, 24)).astype(np.float32)
        batch = {"input_features": features, "decoder_input_ids": ids[:, :4]}
    else:
        batch = {"input_ids": ids, "attention_mask": mask}
    if name == "Electra":  # the Flax class takes ones where none are given, PyTorch's zeros
        batch["token_type_ids"] = np.zeros_like(ids)
    return batch, batch


@pytest.mark.parametrize("name", CASES)
def test_a_flax_model_is_a_backbone_with_the_same_outputs(tmp_path, name):
    peer = _peer(name)
    backbone = from_flax(peer)
    assert backbone.report.fresh == () and backbone.report.wrong_shape == ()
    ours, theirs = _batches(name)
    got = backbone(ours)["tokens"]
    expected = peer(**theirs)[0]
    if name == "ResNet":
        expected = np.moveaxis(np.asarray(expected), 1, -1).reshape(got.shape)
    real = ours.get("attention_mask", np.ones(got.shape[:2]))[:, : got.shape[1], None] > 0
    if real.shape[1] != got.shape[1]:
        real = np.ones((*got.shape[:2], 1), bool)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(got * real, expected * real, atol=1e-5 * scale)
    peer.save_pretrained(tmp_path)
    again = load_backbone(tmp_path, pooling=backbone.pooling)
    jax.tree.map(np.testing.assert_array_equal, backbone.params, again.params)
    assert all(isinstance(leaf, jnp.ndarray) for leaf in jax.tree.leaves(again.params))
