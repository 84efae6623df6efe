"""MPNet: one table of relative places for all layers; rematerialisation, heads; parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from text_parity import SIZES, same_backbone, same_forward, same_head, text_batch
from torch_oracle import names_agree, peer

from jtl import masks
from jtl.models.families.mpnet import MPNET
from jtl.models.heads import Linear
from jtl.models.layers.relative_buckets import relative_buckets
from jtl.models.load import load_backbone, new_backbone
from jtl.models.model import attach

TABLE = "encoder/relative_attention_bias/embedding"
KINDS = ("masked_lm", "classification", "token_classification", "question_answering")


@pytest.fixture(scope="module")
def tiny():
    return new_backbone("mpnet", SIZES, key=jax.random.key(0), pooling="mean")


def test_the_table_of_relative_places_is_one_leaf_of_the_stem(tiny):
    leaves = flatten_dict(tiny.params, sep="/")
    assert leaves[TABLE].shape == (32, 2)
    labels = masks.label(tiny.params, tiny.groups, optional=("pooler/.*",))
    assert flatten_dict(labels, sep="/")[TABLE] == "stem"
    assert "encoder/layer/1/attention/attn/q/kernel" in leaves
    assert "encoder/layer/1/attention/LayerNorm/scale" in leaves
    assert "embeddings/token_type_embeddings/embedding" not in leaves


def test_a_bias_that_hides_all_other_keys_makes_a_token_blind_to_them(tiny):
    flat = flatten_dict(tiny.params, sep="/")
    # Bucket 0 is the token's own place: with a large bias there, each token reads itself alone.
    flat[TABLE] = flat[TABLE].at[0].set(1e4)
    params = unflatten_dict(flat, sep="/")
    one, other = (jnp.array([[5, 6, 7, token]]) for token in (8, 9))
    outs = [
        tiny.module.apply({"params": params}, {"input_ids": ids})["tokens"] for ids in (one, other)
    ]
    np.testing.assert_array_equal(outs[0][:, :3], outs[1][:, :3])
    plain = [
        tiny.module.apply({"params": tiny.params}, {"input_ids": x})["tokens"] for x in (one, other)
    ]
    assert np.abs(np.asarray(plain[0] - plain[1]))[:, :3].max() > 1e-3


def test_recomputed_blocks_read_the_table_and_give_it_its_gradient(tiny):
    model = attach(tiny, {"head": Linear(3)}, key=jax.random.key(1))
    batch, live = text_batch(pad=1), frozenset({*tiny.labels, "head"})

    def gradient(model):
        def loss(params):
            out, _ = model.apply(params, {}, batch, key=jax.random.key(2), live=live)
            return jnp.sum(jnp.square(out["head"] - 1.0))

        return jax.jit(jax.grad(loss))(model.params)

    plain, again = gradient(model), gradient(model.computing(remat=True))
    table = flatten_dict(plain["backbone"], sep="/")[TABLE]
    assert np.abs(table).max() > 1e-6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, again)


def test_config_errors():
    with pytest.raises(ValueError, match="relative_attention_num_buckets=16; published MPNets"):
        MPNET.make({**SIZES, "relative_attention_num_buckets": 16}, "mean", jnp.float32)
    with pytest.raises(ValueError, match="'max' is not known to MPNet"):
        MPNET.make(SIZES, "max", jnp.float32)
    assert MPNET.longest(dict(SIZES, max_position_embeddings=514)) == 512


@pytest.mark.parity
def test_backbone_is_that_of_transformers(tmp_path):
    model = peer("MPNetModel", tmp_path, **SIZES)
    same_backbone(model, load_backbone(tmp_path), text_batch(pad=1))


@pytest.mark.parity
def test_far_places_are_those_of_transformers(tmp_path):
    model = peer("MPNetModel", tmp_path, **{**SIZES, "max_position_embeddings": 160})
    same_forward(model, load_backbone(tmp_path), text_batch(150, pad=1))


@pytest.mark.parity
def test_buckets_are_those_of_transformers():
    import torch
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    places = np.arange(-600, 601)
    theirs = MPNetEncoder.relative_position_bucket(torch.tensor(places)).numpy()
    ours = relative_buckets(places, buckets=32, farthest=128, both_ways=True)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_those_of_transformers(tmp_path, kind):
    labels = 2 if kind == "question_answering" else 5
    same_head(tmp_path, kind, text_batch(pad=1), "mpnet", **SIZES, num_labels=labels)


@pytest.mark.parity
def test_names_agree_at_the_published_size():
    sizes = dict(vocab_size=30527, max_position_embeddings=514, layer_norm_eps=1e-5)
    assert names_agree("MPNetModel", "mpnet", **sizes) == 4 + 1 + 12 * 16 + 2
