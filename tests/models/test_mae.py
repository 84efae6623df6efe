"""MAE: masking and loss by hand, fixed positions; parity with ViTMAEForPreTraining."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle

from jtl.models import export, load
from jtl.models.families.mae import VIT_MAE
from jtl.models.heads import MaskedImage, reconstruction_loss
from jtl.models.layers.masking import masking
from jtl.models.layers.patches import cut
from jtl.models.layers.sincos import sincos_2d
from jtl.models.load_head import load_head
from jtl.models.model import attach

CONFIG = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=12,
    patch_size=4,
    initializer_range=0.3,
    decoder_hidden_size=8,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=12,
    mask_ratio=0.6,
    norm_pix_loss=True,
)


@functools.cache
def _made(pooling="cls"):
    return load.new_backbone("vit_mae", CONFIG, key=jax.random.key(0), pooling=pooling)


def _batch(n=2, noise=True):
    rng = np.random.default_rng(0)
    batch = {"pixel_values": rng.normal(size=(n, 12, 12, 3)), "noise": rng.uniform(size=(n, 9))}
    kept = batch if noise else {"pixel_values": batch["pixel_values"]}
    return {name: jnp.asarray(value, jnp.float32) for name, value in kept.items()}


def test_masking_by_hand():
    made = masking(jnp.array([[0.9, 0.1, 0.5, 0.3, 0.7]]), 0.6)
    assert made.keep.tolist() == [[1, 3]] and made.restore.tolist() == [[4, 0, 2, 1, 3]]
    assert made.mask.tolist() == [[1.0, 0.0, 1.0, 0.0, 1.0]]
    for ratio in (0.0, 0.95):
        with pytest.raises(ValueError, match=f"a mask_ratio of {ratio} keeps . of 5 patches"):
            masking(jnp.zeros((1, 5)), ratio)


def test_patches_have_their_channels_last():
    images = jnp.arange(24.0).reshape(1, 2, 4, 3)
    assert cut(images, (2, 2))[0, 1].tolist() == [*range(6, 12), *range(18, 24)]


def test_the_loss_is_over_hidden_patches_by_hand():
    images = jnp.array([[1.0, 3.0], [10.0, 20.0]]).reshape(1, 2, 2, 1)
    predicted = jnp.array([[[0.0, 0.0], [9.0, 22.0]]])
    noise = jnp.array([[0.1, 0.2]])
    options = dict(patch=(1, 2), mask_ratio=0.5)
    assert float(reconstruction_loss(predicted, images, noise, **options)) == (1 + 4) / 2
    # Normalised, the second patch is -+1/sqrt(2) about its mean.
    own = reconstruction_loss(jnp.zeros((1, 2, 2)), images, noise, **options, normalised=True)
    np.testing.assert_allclose(own, 0.5, rtol=1e-6)


def test_fresh_positions_are_fixed_sines_and_cosines():
    table = _made().params["embeddings"]["position_embeddings"]
    np.testing.assert_array_equal(table[0], sincos_2d(3, 3, 16))
    head = attach(_made(), {"head": VIT_MAE.heads["masked_image"].make(_made().config, _made())},
                  key=jax.random.key(0))  # fmt: skip
    np.testing.assert_array_equal(
        head.params["heads"]["head"]["decoder_pos_embed"][0], sincos_2d(3, 3, 8)
    )


def test_the_encoder_sees_what_the_noise_keeps():
    made, batch = _made(), _batch()
    hidden = made.module.apply({"params": made.params}, batch, frozenset(), 1)
    whole = made.module.apply({"params": made.params}, _batch(noise=False), frozenset(), 1)
    assert hidden.shape == (2, 1 + 3, 16) and whole.shape == (2, 10, 16)
    order = np.argsort(np.asarray(batch["noise"]), axis=1)[:, :3]
    for row in range(2):
        np.testing.assert_array_equal(hidden[row, 1:], whole[row, 1 + order[row]])
        np.testing.assert_array_equal(hidden[row, 0], whole[row, 0])


def test_poolings():
    batch = _batch(noise=False)
    out = {name: _made(name)(batch) for name in VIT_MAE.poolings}
    tokens = out["cls"]["tokens"]
    np.testing.assert_array_equal(out["cls"]["pooled"], tokens[:, 0])
    np.testing.assert_allclose(out["mean"]["pooled"], tokens[:, 1:].mean(1), atol=1e-6)
    mean = np.asarray(out["mean_norm"]["tokens"][:, 1:]).mean(1)
    normal = (mean - mean.mean(1, keepdims=True)) / mean.std(1, keepdims=True)
    np.testing.assert_allclose(out["mean_norm"]["pooled"], normal, atol=1e-5)


def test_a_decoder_without_noise_or_with_other_noise_is_named():
    made, head = _made(), MaskedImage(3, 3, 48, 8, 1, 2, 12, 0.6)
    out = {"tokens": jnp.zeros((2, 10, 16))}
    own = head.init(jax.random.key(0), out, _batch())
    with pytest.raises(ValueError, match=r"needs the column 'noise' of \(n, 9\).*'pixel_values'"):
        head.apply(own, out, _batch(noise=False))
    with pytest.raises(ValueError, match="gives 10 tokens and the noise keeps 3 of 9 patches"):
        head.apply(own, out, _batch())
    with pytest.raises(ValueError, match=r"'max' is not known to MAE"):
        VIT_MAE.make(made.config, "max", jnp.float32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae")
    peer = oracle.peer("ViTMAEForPreTraining", folder, **CONFIG)
    backbone = load.load_backbone(folder)
    return peer, backbone, load_head(folder, backbone, "masked_image"), folder


def _theirs(peer, batch):
    import torch

    images = oracle.to_torch({"pixel_values": batch["pixel_values"]})
    return peer(**images, noise=torch.tensor(np.asarray(batch["noise"])), output_hidden_states=True)


def _loss(backbone, head, params, own, batch):
    out = backbone.module.apply({"params": params}, batch)
    predicted = head.apply({"params": own}, out, batch)
    loss = reconstruction_loss(
        predicted, batch["pixel_values"], batch["noise"], patch=(4, 4), mask_ratio=0.6,
        normalised=True,
    )  # fmt: skip
    return loss, predicted


@pytest.mark.parity
def test_pre_training_is_that_of_transformers(pair):
    peer, backbone, (head, own), _ = pair
    assert backbone.report.fresh == ()
    batch = _batch()
    theirs = _theirs(peer, batch)
    loss, predicted = _loss(backbone, head, backbone.params, own, batch)
    oracle.close(predicted, theirs.logits)
    oracle.close(loss, theirs.loss)
    oracle.close(masking(batch["noise"], 0.6).mask, theirs.mask)
    for stop, hidden in enumerate(theirs.hidden_states, start=1):
        run = backbone.module.apply({"params": backbone.params}, batch, frozenset(), stop)
        oracle.close(run, hidden)


@pytest.mark.parity
def test_gradients_of_pre_training_are_those_of_transformers(pair):
    peer, backbone, (head, own), _ = pair
    batch = _batch()
    fixed = ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed")
    loss = _theirs(peer, batch).loss
    oracle.same_gradients(
        backbone,
        lambda params: _loss(backbone, head, params, own, batch)[0],
        *(peer, loss),
        without=fixed,
    )
    gradient = jax.grad(lambda own: _loss(backbone, head, backbone.params, own, batch)[0])(own)
    theirs = dict(peer.named_parameters())
    expected = {
        ("decoder_embed", "bias"): "decoder.decoder_embed.bias",
        ("mask_token",): "decoder.mask_token",
        ("decoder_layers", "1", "layernorm_after", "scale"):
            "decoder.decoder_layers.1.layernorm_after.weight",
        ("decoder_pred", "bias"): "decoder.decoder_pred.bias",
    }  # fmt: skip
    for path, name in expected.items():
        leaf = gradient
        for part in path:
            leaf = leaf[part]
        oracle.close(leaf, theirs[name].grad, 1e-4)
    assert not np.any(gradient["decoder_pos_embed"])


@pytest.mark.parity
def test_the_whole_image_is_that_of_vitmae_without_masking(pair, tmp_path):
    import torch

    _, backbone, _, folder = pair
    import transformers

    peer = transformers.ViTMAEModel.from_pretrained(folder, mask_ratio=0.0).eval()
    batch = _batch()
    noise = torch.arange(9.0).repeat(2, 1)
    images = oracle.to_torch({"pixel_values": batch["pixel_values"]})
    theirs = peer(**images, noise=noise).last_hidden_state
    oracle.close(backbone(_batch(noise=False))["tokens"], theirs)


@pytest.mark.parity
def test_transformers_opens_what_is_written(pair, tmp_path):
    import transformers

    peer, backbone, (head, own), _ = pair
    model = attach(backbone, {"decoder": head}, key=jax.random.key(0))
    model.params["heads"]["decoder"] = own
    export.export(tmp_path / "x", model)
    again = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "x").eval()
    oracle.close(_theirs(again, _batch()).logits.detach().numpy(), _theirs(peer, _batch()).logits)
    back = export.import_model(tmp_path / "x")
    jax.tree.map(np.testing.assert_array_equal, back.params["heads"]["decoder"], own)


@pytest.mark.parity
def test_names_at_base_are_those_of_transformers():
    assert oracle.names_agree("ViTMAEForPreTraining", "vit_mae") == 4 + 12 * 16 + 2
