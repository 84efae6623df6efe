"""RoBERTa: places counted past the padding, the longest text, names, heads; parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from text_parity import SIZES, same_backbone, same_forward, same_head, text_batch
from torch_oracle import names_agree, peer

from jtl.models.families.roberta import ROBERTA, XLM_ROBERTA
from jtl.models.layers.token_embeddings import positions_of
from jtl.models.load import load_backbone, new_backbone
from jtl.weights.rename import torch_name

BASE = dict(
    vocab_size=50265,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=514,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
)
KINDS = ("masked_lm", "classification", "token_classification", "question_answering")


@pytest.fixture(scope="module")
def tiny():
    return new_backbone("roberta", SIZES, key=jax.random.key(0), pooling="mean")


def test_places_are_counted_over_real_tokens_from_the_padding_on():
    ids = jnp.array([[7, 8, 9, 1], [1, 7, 1, 8]])
    assert positions_of(ids, 1).tolist() == [[2, 3, 4, 1], [1, 2, 1, 3]]
    assert positions_of(ids).tolist() == [[0, 1, 2, 3]]


def test_the_stem_reads_those_rows(tiny):
    ids = jnp.array([[1, 7, 8]])
    table = tiny.params["embeddings"]
    total = table["word_embeddings"]["embedding"][ids[0]]
    total += table["position_embeddings"]["embedding"][jnp.array([1, 2, 3])]
    total += table["token_type_embeddings"]["embedding"][jnp.array([0, 0, 0])]
    total -= total.mean(-1, keepdims=True)
    expected = total / jnp.sqrt((total**2).mean(-1, keepdims=True))
    got = tiny.module.apply({"params": tiny.params}, {"input_ids": ids}, frozenset(), 1)
    np.testing.assert_allclose(got[0], expected, atol=1e-5)


def test_text_longer_than_the_table_is_an_error(tiny):
    fits, long = (jnp.full((1, length), 5, jnp.int32) for length in (18, 19))
    assert tiny.module.apply({"params": tiny.params}, {"input_ids": fits}, frozenset(), 1).shape
    with pytest.raises(ValueError, match="19 tokens; the model has 18 positions; truncate"):
        tiny.module.apply({"params": tiny.params}, {"input_ids": long}, frozenset(), 1)


def test_inputs_cut_at_the_places_that_texts_have():
    assert ROBERTA.longest(dict(BASE, pad_token_id=1)) == 512
    assert XLM_ROBERTA.longest(dict(BASE, pad_token_id=1)) == 512


def test_a_config_without_padding_token_is_an_error():
    with pytest.raises(ValueError, match="no pad_token_id.*it has.*add it"):
        ROBERTA.make({**SIZES, "pad_token_id": None}, "mean", jnp.float32)
    with pytest.raises(ValueError, match=r"'max' is not known to RoBERTa; give one of \('pooler'"):
        ROBERTA.make({**SIZES, "pad_token_id": 1}, "max", jnp.float32)


def test_names_are_those_of_the_checkpoints(tiny):
    names = {torch_name(path, ROBERTA.rules)[0] for path in flatten_dict(tiny.params, sep="/")}
    assert {
        "embeddings.position_embeddings.weight",
        "encoder.layer.1.attention.self.query.weight",
        "encoder.layer.1.attention.output.LayerNorm.bias",
        "pooler.dense.weight",
    } <= names
    assert len(names) == 5 + 2 * 16 + 2


@pytest.mark.parity
def test_backbone_is_that_of_transformers(tmp_path):
    model = peer("RobertaModel", tmp_path, **SIZES)
    same_backbone(model, load_backbone(tmp_path), text_batch(pad=1, types=2))


@pytest.mark.parity
@pytest.mark.parametrize("class_name", ["XLMRobertaModel", "CamembertModel"])
def test_those_of_its_layout_load(tmp_path, class_name):
    model = peer(class_name, tmp_path, **{**SIZES, "type_vocab_size": 1})
    backbone = load_backbone(tmp_path)
    assert backbone.family.class_name == class_name
    same_forward(model, backbone, text_batch(pad=1))


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_those_of_transformers(tmp_path, kind):
    same_head(tmp_path, kind, text_batch(pad=1), "roberta", **SIZES, num_labels=_labels(kind))


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS[:2])
def test_heads_of_xlm_roberta_are_those_of_transformers(tmp_path, kind):
    same_head(tmp_path, kind, text_batch(pad=1), "xlm-roberta", **SIZES, num_labels=_labels(kind))


def _labels(kind):
    return 2 if kind == "question_answering" else 5


@pytest.mark.parity
@pytest.mark.parametrize(
    ("class_name", "model_type", "changes"),
    [
        ("RobertaModel", "roberta", {}),  # also CodeBERT, of the same sizes
        ("RobertaForMaskedLM", "roberta", {}),
        ("RobertaModel", "roberta", dict(num_hidden_layers=24, hidden_size=1024)),
        ("XLMRobertaModel", "xlm-roberta", dict(vocab_size=250002)),
        ("CamembertModel", "camembert", dict(vocab_size=32005)),
    ],
)
def test_names_agree_at_published_sizes(class_name, model_type, changes):
    config = {**BASE, **changes}
    count = names_agree(class_name, model_type, **{**config, "num_attention_heads": 16})
    pooler = 0 if "MaskedLM" in class_name else 2
    assert count == 5 + 16 * config["num_hidden_layers"] + pooler
