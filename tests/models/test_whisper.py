"""Whisper: parity with transformers, names, both streams, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_oracle import close, names_agree, peer, same_gradients, to_torch

from jtl.models import export, load
from jtl.models.heads import CausalLM, Linear, Projected
from jtl.models.layers.sincos import sinusoids
from jtl.models.load_head import load_head
from jtl.models.model import attach

TINY = dict(
    vocab_size=31,
    d_model=16,
    encoder_layers=2,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=4,
    encoder_ffn_dim=24,
    decoder_ffn_dim=20,
    num_mel_bins=4,
    max_source_positions=7,
    max_target_positions=9,
    classifier_proj_size=6,
    decoder_start_token_id=1,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


def _batch(tokens=5, rows=2):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(rows, 4, 14)).astype(np.float32)
    ids = rng.integers(3, 31, (rows, tokens))
    mask = np.ones((rows, tokens), np.int32)
    mask[0, 3:] = 0
    return {
        "input_features": features,
        "decoder_input_ids": ids,
        "decoder_attention_mask": mask,
    }


@pytest.fixture(scope="module")
def made():
    return load.new_backbone("whisper", TINY, key=jax.random.key(0))


def test_tree_of_names(made):
    flat = jax.tree_util.tree_leaves_with_path(made.params)
    shapes = {"/".join(str(k.key) for k in path): leaf.shape for path, leaf in flat}
    assert made.labels == ("stem", "block_0", "block_1", "block_2", "top")
    assert shapes["encoder/conv1/kernel"] == (3, 4, 16)
    assert shapes["encoder/layers/1/self_attn/k_proj/kernel"] == (16, 16)
    assert "encoder/layers/1/self_attn/k_proj/bias" not in shapes
    assert shapes["decoder/layers/0/encoder_attn/v_proj/bias"] == (16,)
    assert shapes["decoder/embed_tokens/embedding"] == (31, 16)
    encoder = {name for name in shapes if name.startswith("encoder/")}
    assert len(encoder) == 2 * 15 + 7 and len(shapes) - len(encoder) == 24 + 4
    table = made.params["encoder"]["embed_positions"]["embedding"]
    np.testing.assert_array_equal(table, sinusoids(7, 16))


def test_both_streams(made):
    batch = _batch()
    out = made(batch)
    assert out["encoded"].shape == (2, 7, 16) and out["tokens"].shape == (2, 5, 16)
    np.testing.assert_array_equal(out["pooled"][0], out["tokens"][0, 2])  # the last real token
    np.testing.assert_array_equal(out["pooled"][1], out["tokens"][1, 4])
    later = made(
        {
            **batch,
            "decoder_input_ids": np.where(np.arange(5) < 4, 1, 2) * np.ones((2, 1)).astype(int),
        }
    )
    first = made({**batch, "decoder_input_ids": np.ones((2, 5), int)})
    np.testing.assert_allclose(later["tokens"][1, :4], first["tokens"][1, :4], atol=1e-6)
    assert not np.allclose(later["tokens"][1, 4], first["tokens"][1, 4], atol=1e-3)
    np.testing.assert_array_equal(later["encoded"], out["encoded"])


def test_refused(made):
    batch = _batch()
    with pytest.raises(
        ValueError, match=r"of \(n, 4, 14\), mels by frames; the batch has \(2, 4, 12"
    ):
        made({**batch, "input_features": np.zeros((2, 4, 12))})
    with pytest.raises(ValueError, match=r"9 tokens at most; the batch has \(2, 10\)"):
        made({**batch, "decoder_input_ids": np.ones((2, 10), int)})
    with pytest.raises(ValueError, match="whisper_encoder"):
        made({"input_features": batch["input_features"]})
    with pytest.raises(ValueError, match="does not divide"):
        load.new_backbone("whisper", {**TINY, "decoder_attention_heads": 3}, key=jax.random.key(0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    model = peer("WhisperForConditionalGeneration", folder, **TINY)
    backbone = load.load_backbone(folder)
    head, params = load_head(folder, backbone, "causal_lm")
    assert isinstance(head, CausalLM) and head.tied and params == {}
    return model, attach(backbone, {"head": head}, key=jax.random.key(0))


@pytest.mark.parity
def test_forward_and_gradients(whole):
    model, ours = whole
    apply = jax.jit(lambda params, batch: ours.apply(params, {}, batch)[0])
    batch = _batch()
    theirs = model(**to_torch(batch), output_hidden_states=True)
    out = apply(ours.params, batch)
    real = batch["decoder_attention_mask"].astype(bool)
    close(out["head"][real], theirs.logits[real])
    close(out["encoded"], theirs.encoder_last_hidden_state)
    columns = ours.prefix(ours.params, {}, batch, 1, 2, 3)
    close(columns["hidden_1"][:, :7], theirs.encoder_hidden_states[0])
    close(columns["hidden_2"][:, :7], theirs.encoder_hidden_states[1])
    close(columns["hidden_3"][:, :7], theirs.encoder_last_hidden_state)
    close(columns["hidden_3"][:, 7:][real], theirs.decoder_hidden_states[0][real])
    plain = {k: v for k, v in batch.items() if k != "decoder_attention_mask"}
    close(ours.apply(ours.params, {}, plain)[0]["head"], model(**to_torch(plain)).logits)

    weight = np.random.default_rng(1).normal(size=theirs.logits.shape).astype(np.float32)
    weight *= real[:, :, None]

    def loss(params):
        whole = {"backbone": params, "heads": ours.params["heads"]}
        return jnp.sum(ours.apply(whole, {}, batch)[0]["head"] * weight)

    their_loss = (theirs.logits * to_torch({"w": weight})["w"]).sum()
    without = ("model.encoder.embed_positions.weight",)
    same_gradients(ours.backbone, loss, model, their_loss, without=without)

    half = ours.computing("bfloat16").apply(ours.params, {}, batch)[0]["head"]
    close(half[real], np.asarray(out["head"])[real], 0.1)


@pytest.mark.parity
def test_export_opens_there(whole, tmp_path):
    import transformers

    model, ours = whole
    export.export(tmp_path / "x", ours)
    again = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "x").eval()
    batch = to_torch(_batch())
    close(again(**batch).logits.detach().numpy(), model(**batch).logits, 1e-6)
    bare = attach(ours.backbone, {"head": Linear(2)}, key=jax.random.key(0))
    export.export(tmp_path / "y", bare)
    again = transformers.AutoModel.from_pretrained(tmp_path / "y").eval()
    close(again(**batch)[0].detach().numpy(), model.model(**batch)[0], 1e-6)


@pytest.mark.parity
def test_the_encoder_alone(whole, tmp_path):
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    model, ours = whole
    features = {"input_features": _batch()["input_features"]}
    export.export(tmp_path / "whole", ours)
    alone = load.load_backbone(tmp_path / "whole", family="whisper_encoder", pooling="mean")
    tokens = alone(features)["tokens"]
    close(tokens, model.model.encoder(**to_torch(features))[0])

    classes = peer("WhisperForAudioClassification", tmp_path / "a", num_labels=3, **TINY)
    backbone = load.load_backbone(tmp_path / "a")  # known by the class in its config
    head, params = load_head(tmp_path / "a", backbone, "classification")
    assert isinstance(head, Projected)
    model = attach(backbone, {"head": head}, key=jax.random.key(0))
    model.params["heads"]["head"] = params
    out = model.apply(model.params, {}, features)[0]
    theirs = classes(**to_torch(features))
    close(out["head"], theirs.logits)
    weight = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)

    def loss(params):
        own = {"backbone": params, "heads": model.params["heads"]}
        return jnp.sum(model.apply(own, {}, features)[0]["head"] * weight)

    without = ("encoder.embed_positions.weight", "projector.weight", "projector.bias")
    without = (*without, "classifier.weight", "classifier.bias")
    their_loss = (theirs.logits * to_torch({"w": weight})["w"]).sum()
    same_gradients(backbone, loss, classes, their_loss, without=without)

    export.export(tmp_path / "b", model)
    again = transformers.AutoModelForAudioClassification.from_pretrained(tmp_path / "b").eval()
    close(again(**to_torch(features)).logits.detach().numpy(), theirs.logits, 1e-6)
    back = export.import_model(tmp_path / "b")
    close(back.apply(back.params, {}, features)[0]["head"], theirs.logits)
    export.export(tmp_path / "c", attach(alone, {"head": Linear(2)}, key=jax.random.key(0)))
    bare = WhisperEncoder.from_pretrained(tmp_path / "c").eval()
    close(bare(**to_torch(features))[0].detach().numpy(), np.asarray(tokens))


@pytest.mark.parity
def test_names_at_published_sizes():
    # openai/whisper-tiny and whisper-large-v3 (128 mels).
    tiny = dict(d_model=384, encoder_layers=4, decoder_layers=4)
    assert names_agree("WhisperForConditionalGeneration", "whisper", **tiny) == 167
    large = dict(d_model=1280, encoder_layers=32, decoder_layers=32, num_mel_bins=128)
    large |= dict(encoder_attention_heads=20, decoder_attention_heads=20, vocab_size=51866)
    large |= dict(encoder_ffn_dim=5120, decoder_ffn_dim=5120)
    assert names_agree("WhisperForConditionalGeneration", "whisper", **large) == 1259
    assert names_agree("WhisperForAudioClassification", "whisper_encoder", **tiny) == 67
