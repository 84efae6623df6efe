"""wav2vec 2.0 and HuBERT: parity with transformers, names, frames, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_oracle import close, names_agree, peer, same_gradients, to_torch

from jtl.models import export, families, load
from jtl.models.heads import CTC, Linear, pool
from jtl.models.layers.layer_drop import LayerDrop
from jtl.models.layers.positional_conv import PositionalConv, grouped_conv
from jtl.models.load_head import load_head
from jtl.models.model import attach

TINY = dict(
    vocab_size=12,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    conv_dim=[8, 6],
    conv_kernel=[10, 3],
    conv_stride=[5, 2],
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    classifier_proj_size=6,
)
# The two kinds of published checkpoints: base, and large ones that were trained with a mask.
BASE = dict(TINY, mask_time_prob=0.0)
STABLE = dict(TINY, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
STABLE = dict(STABLE, num_conv_pos_embeddings=5, apply_spec_augment=True, mask_time_prob=0.1)


def _batch(samples=83, lengths=(83, 83, 51)):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(len(lengths), samples)).astype(np.float32)
    mask = (np.arange(samples)[None, :] < np.asarray(lengths)[:, None]).astype(np.int32)
    return {"input_values": np.where(mask, values, np.float32(0)), "attention_mask": mask}


@pytest.fixture(scope="module")
def stable():
    return load.new_backbone("wav2vec2", STABLE, key=jax.random.key(0))


def test_tree_of_names(stable):
    flat = jax.tree_util.tree_leaves_with_path(stable.params)
    shapes = {"/".join(str(k.key) for k in path): leaf.shape for path, leaf in flat}
    layer = "encoder/layers/1/"
    norms = {name for name in shapes if name.startswith(layer) and "norm" in name}
    assert norms == {layer + n for n in ("layer_norm/scale", "layer_norm/bias")} | {
        layer + n for n in ("final_layer_norm/scale", "final_layer_norm/bias")
    }
    assert shapes["encoder/pos_conv_embed/conv/weight_g"] == (1, 1, 5)
    assert shapes["encoder/pos_conv_embed/conv/weight_v"] == (16, 8, 5)
    assert shapes["feature_extractor/conv_layers/1/conv/kernel"] == (3, 8, 6)
    assert shapes["feature_extractor/conv_layers/1/layer_norm/scale"] == (6,)
    assert shapes["masked_spec_embed"] == (16,)
    assert stable.labels == ("stem", "block_0", "block_1", "top")
    row = families.family("wav2vec2")
    config = load.full_config(row, BASE)
    base = jax.eval_shape(row.make(config, "mean").init, jax.random.key(0), row.example(config))
    assert "masked_spec_embed" not in base["params"]
    assert "layer_norm" not in base["params"]["feature_extractor"]["conv_layers"]["1"]
    assert row.groups(config, "mean")[-1] == ("encoder/layer_norm/.*", "stem")


def test_the_mean_is_over_real_frames(stable):
    batch = _batch()
    out = stable(batch)
    # 83 samples: (83 - 10) // 5 + 1 = 15, (15 - 3) // 2 + 1 = 7 frames; 51: 9, then 4.
    assert out["token_mask"].sum(axis=1).tolist() == [7, 7, 4] and out["tokens"].shape[1] == 7
    np.testing.assert_allclose(out["pooled"][2], out["tokens"][2, :4].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(pool(out, batch, "mean"), out["pooled"], atol=1e-6)
    np.testing.assert_array_equal(pool(out, batch, "last")[2], out["tokens"][2, 3])


def test_layer_drop_leaves_out_layers_at_its_rate():
    before, after = jnp.zeros(1), jnp.ones(1)

    def chosen(key):
        return LayerDrop(0.25).apply({}, before, after, True, rngs={"dropout": key})[0]

    kept = jax.vmap(chosen)(jax.random.split(jax.random.key(0), 2000))
    assert set(kept.tolist()) == {0.0, 1.0} and abs(float(kept.mean()) - 0.75) < 0.04


def test_positional_convolution_by_hand():
    x = jnp.arange(1.0, 4.0).reshape(1, 3, 1)
    params = {"weight_v": jnp.array([[[2.0, 5.0]]]), "weight_g": jnp.array([[[1.0, 10.0]]])}
    made = PositionalConv(2, 1).apply({"params": {**params, "bias": jnp.array([0.5])}}, x)
    # An even kernel looks one place back: out[t] = 1 x[t - 1] + 10 x[t] + 0.5.
    np.testing.assert_allclose(made.ravel(), [10.5, 21.5, 32.5], rtol=1e-6)


@pytest.mark.parametrize(("width", "positions"), [(5, 9), (8, 3), (4, 70)])
def test_the_two_ways_to_convolve_agree(width, positions):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, positions, 6))
    kernel = jax.random.normal(keys[1], (6, 3, width))

    def both(fourier):
        def loss(x, kernel):
            made = grouped_conv(x, kernel, fourier=fourier)
            return jnp.sum(made**2), made

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)

    gap = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), both(True), both(False))
    assert max(jax.tree.leaves(gap)) < 1e-3, gap


def test_refused(stable):
    make = {"key": jax.random.key(0)}
    for name, value in (("add_adapter", True), ("adapter_attn_dim", 16)):
        with pytest.raises(ValueError, match=f"{name}=.*the encoder here has none; use a"):
            load.new_backbone("wav2vec2", {**TINY, name: value}, **make)
    with pytest.raises(ValueError, match="conv_pos_batch_norm=True, a BatchNorm"):
        load.new_backbone("hubert", {**TINY, "conv_pos_batch_norm": True}, **make)
    with pytest.raises(ValueError, match="feat_extract_norm is 'batch'; there are"):
        load.new_backbone("wav2vec2", {**TINY, "feat_extract_norm": "batch"}, **make)
    with pytest.raises(ValueError, match="embedding_groups=3 does not divide hidden_size=16"):
        load.new_backbone("wav2vec2", {**TINY, "num_conv_pos_embedding_groups": 3}, **make)
    with pytest.raises(ValueError, match=r"20 samples at least; the batch has \(2, 19\)"):
        stable({"input_values": np.zeros((2, 19))})
    with pytest.raises(ValueError, match=r"indices is \(3, 6\) for frames \(3, 7\).*one entry for"):
        stable({**_batch(), "mask_time_indices": np.zeros((3, 6), bool)})


@pytest.fixture(scope="module", params=["base", "stable"])
def ctc(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wav2vec2")
    config = {"base": BASE, "stable": STABLE}[request.param]
    model = peer("Wav2Vec2ForCTC", folder, **config)
    return folder, model, load.load_backbone(folder)


@pytest.mark.parity
def test_forward_and_gradients(ctc):
    folder, model, backbone = ctc
    head, params = load_head(folder, backbone, "ctc")
    assert isinstance(head, CTC) and head.vocabulary == 12
    whole = attach(backbone, {"head": head}, key=jax.random.key(0))
    apply = jax.jit(lambda params, batch: whole.apply(params, {}, batch)[0])
    params = {"backbone": backbone.params, "heads": {"head": params}}
    for batch in (_batch(), {"input_values": _batch(88, (88,))["input_values"]}):
        theirs = model(**to_torch(batch), output_hidden_states=True)
        out = apply(params, batch)
        real = np.asarray(out.get("token_mask", np.ones(out["head"].shape[:2], bool)))
        close(out["head"][real], theirs.logits[real])
        hidden = {**batch}
        for border in (1, 2):
            column = whole.prefix(params, {}, hidden, border)[f"hidden_{border}"]
            close(column[real], theirs.hidden_states[border - 1][real])

    batch = _batch()
    weight = np.random.default_rng(1).normal(size=(3, 7, 16)).astype(np.float32)
    weight *= np.asarray(backbone(batch)["token_mask"])[:, :, None]
    forward = jax.jit(lambda p: backbone.module.apply({"params": p}, batch)["tokens"])
    theirs = model.wav2vec2(**to_torch(batch)).last_hidden_state
    their_loss = (theirs * to_torch({"w": weight})["w"]).sum()
    without = ("lm_head.weight", "lm_head.bias", "wav2vec2.masked_spec_embed")
    same_gradients(
        backbone, lambda p: jnp.sum(forward(p) * weight), model, their_loss, without=without
    )


@pytest.mark.parity
def test_masked_frames_bf16_and_classification(tmp_path):
    model = peer("Wav2Vec2ForSequenceClassification", tmp_path / "a", num_labels=3, **STABLE)
    backbone = load.load_backbone(tmp_path / "a")
    batch = _batch()
    head, params = load_head(tmp_path / "a", backbone, "classification")
    whole = attach(backbone, {"head": head}, key=jax.random.key(0))
    params = {"backbone": backbone.params, "heads": {"head": params}}
    logits = whole.apply(params, {}, batch)[0]["head"]
    close(logits, model(**to_torch(batch)).logits)

    chosen = np.random.default_rng(2).random((3, 7)) < 0.4
    out = backbone({**batch, "mask_time_indices": chosen})
    import torch

    theirs = model.wav2vec2(**to_torch(batch), mask_time_indices=torch.tensor(chosen))
    real = np.asarray(out["token_mask"])
    close(out["tokens"][real], theirs.last_hidden_state[real])

    half = whole.computing("bfloat16").apply(params, {}, batch)[0]["head"]
    assert half.dtype == jnp.float32
    close(half, logits, 0.1)


@pytest.mark.parity
def test_export_opens_there(ctc, tmp_path):
    import transformers

    folder, model, backbone = ctc
    head, params = load_head(folder, backbone, "ctc")
    whole = attach(backbone, {"head": head}, key=jax.random.key(0))
    whole.params["heads"]["head"] = params
    export.export(tmp_path / "x", whole)
    again = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "x").eval()
    batch = to_torch(_batch())
    close(again(**batch).logits.detach().numpy(), model(**batch).logits, 1e-6)
    bare = attach(backbone, {"head": Linear(3)}, key=jax.random.key(0))
    export.export(tmp_path / "y", bare)
    again = transformers.AutoModel.from_pretrained(tmp_path / "y").eval()
    close(again(**batch)[0].detach().numpy(), model.wav2vec2(**batch)[0], 1e-6)


@pytest.mark.parity
def test_hubert(tmp_path):
    for norm in (True, False):
        folder = tmp_path / str(norm)
        config = dict(BASE, feat_proj_layer_norm=norm, do_stable_layer_norm=not norm)
        model = peer("HubertModel", folder, **config)
        backbone = load.load_backbone(folder)
        batch = _batch(67, (67, 60))
        theirs = model(**to_torch(batch)).last_hidden_state
        out = backbone(batch)
        real = np.asarray(out["token_mask"])
        close(out["tokens"][real], theirs[real])
        weight = np.random.default_rng(1).normal(size=theirs.shape).astype(np.float32)
        weight *= real[:, :, None]
        same_gradients(
            backbone,
            lambda p, backbone=backbone, batch=batch, weight=weight: jnp.sum(
                backbone.module.apply({"params": p}, batch)["tokens"] * weight
            ),
            model,
            (theirs * to_torch({"w": weight})["w"]).sum(),
        )


@pytest.mark.parity
def test_old_names_of_the_positional_convolution(ctc, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder, _, backbone = ctc
    stored = load_file(folder / "model.safetensors")
    place = "parametrizations.weight.original"
    names = {place + "0": "weight_g", place + "1": "weight_v"}
    for new, old in names.items():
        stored = {name.replace(new, old): value for name, value in stored.items()}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again = load.load_backbone(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, backbone.params)


@pytest.mark.parity
def test_names_at_published_sizes():
    # facebook/wav2vec2-base-960h, wav2vec2-large-lv60, hubert-base-ls960.
    assert names_agree("Wav2Vec2ForCTC", "wav2vec2") == 211
    large = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    large |= dict(intermediate_size=4096, feat_extract_norm="layer", conv_bias=True)
    large |= dict(do_stable_layer_norm=True, feat_proj_dropout=0.1)
    assert names_agree("Wav2Vec2ForPreTraining", "wav2vec2", **large) == 422
    assert names_agree("HubertModel", "hubert") == 211
