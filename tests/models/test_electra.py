"""ELECTRA: embeddings of another width, generator and discriminator heads; parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from text_parity import SIZES, same_backbone, same_forward, same_head, text_batch
from torch_oracle import names_agree, peer

from jtl.models.backbone import stage_labels
from jtl.models.families.electra import ELECTRA
from jtl.models.heads import ReplacedToken
from jtl.models.load import load_backbone, new_backbone

NARROW = dict(SIZES, embedding_size=8)
EQUAL = dict(SIZES, embedding_size=16)
SMALL = dict(
    vocab_size=30522,
    embedding_size=128,
    hidden_size=256,
    num_hidden_layers=12,
    num_attention_heads=4,
    intermediate_size=1024,
    max_position_embeddings=512,
)
KINDS = (
    "masked_lm",
    "discriminator",
    "classification",
    "token_classification",
    "question_answering",
)


def test_the_projection_is_there_where_the_widths_differ():
    narrow, equal = (
        new_backbone("electra", config, key=jax.random.key(0)) for config in (NARROW, EQUAL)
    )
    leaves = flatten_dict(narrow.params, sep="/")
    assert leaves["embeddings/word_embeddings/embedding"].shape == (31, 8)
    assert leaves["embeddings_project/kernel"].shape == (8, 16)
    assert "embeddings_project" not in equal.params and "pooler" not in equal.params
    for made in (narrow, equal):
        assert made.labels == stage_labels(2)[:-1], "without a pooler the top owns nothing"
    stem = narrow.module.apply({"params": narrow.params}, text_batch(), frozenset(), 1)
    assert stem.shape == (3, 7, 16)


def test_the_discriminator_by_hand():
    head = ReplacedToken(activation="relu")
    params = {
        "dense": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)},
        "dense_prediction": {"kernel": jnp.array([[1.0], [10.0]]), "bias": jnp.array([0.5])},
    }
    tokens = jnp.array([[[1.0, 2.0], [-1.0, 3.0]]])
    logits = head.apply({"params": params}, {"tokens": tokens}, {})
    np.testing.assert_allclose(logits, [[21.5, 30.5]])


def test_it_has_no_pooler():
    with pytest.raises(ValueError, match=r"'pooler' is not known to ELECTRA.*'cls', 'mean'"):
        ELECTRA.make(NARROW, "pooler", jnp.float32)


@pytest.mark.parity
def test_backbone_is_that_of_transformers(tmp_path):
    model = peer("ElectraModel", tmp_path, **NARROW)
    same_backbone(model, load_backbone(tmp_path), text_batch(types=2))


@pytest.mark.parity
def test_without_projection_it_is_that_of_transformers(tmp_path):
    model = peer("ElectraModel", tmp_path, **EQUAL)
    same_forward(model, load_backbone(tmp_path), text_batch(11))


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_those_of_transformers(tmp_path, kind):
    labels = 2 if kind == "question_answering" else 5
    same_head(tmp_path, kind, text_batch(), "electra", **NARROW, num_labels=labels)


@pytest.mark.parity
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(embedding_size=768, hidden_size=768, num_attention_heads=12, intermediate_size=3072),
        dict(embedding_size=768, num_attention_heads=4),  # the generator of the base size
        dict(embedding_size=1024, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
    ],
)
def test_names_agree_at_published_sizes(changes):
    config = {**SMALL, **changes}
    projection = 2 if config["embedding_size"] != config["hidden_size"] else 0
    count = names_agree("ElectraForPreTraining", "electra", **config)
    assert count == 5 + projection + 16 * config["num_hidden_layers"]
