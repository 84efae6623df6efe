"""Another vocabulary: kept rows, means of pieces, heads over the vocabulary, folders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.data.text import TextInputs
from jtl.models.export import export, import_model
from jtl.models.heads import CausalLM, Linear, MaskedLM
from jtl.models.load import new_backbone
from jtl.models.model import attach
from jtl.models.vocabulary import adapt_vocab, new_rows, old_pieces

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "heart", "beat", "##beat", "##s", "a", "the"]


def _tokenizer(folder, words):
    from transformers import AutoTokenizer

    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 8, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


def _backbone(tokenizer, **config):
    sizes = dict(vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    config = {**sizes, "intermediate_size": 8, "max_position_embeddings": 8, **config}
    inputs = TextInputs(tokenizer, 8)
    return new_backbone("bert", config, key=jax.random.key(0), inputs=inputs)


def test_new_rows_by_hand():
    table = jnp.array([[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]])
    got = new_rows(table, [(1,), (0, 1), ()], known=2)
    assert got.tolist() == [[3.0, 6.0], [2.0, 4.0], [2.0, 4.0]]
    assert new_rows(jnp.array([1.0, 5.0]), [(1,), (0, 1)], known=2).tolist() == [5.0, 3.0]


def test_pieces_are_those_of_the_old_tokenizer(tmp_path):
    old = _tokenizer(tmp_path / "old", WORDS)
    new = _tokenizer(tmp_path / "new", [*WORDS[:5], "the", "heartbeats", "zzz"])
    ids = old.get_vocab()
    assert old_pieces(old, new)[5:] == (
        (ids["the"],),
        (ids["heart"], ids["##beat"], ids["##s"]),
        (),
    )


def test_added_tokens_keep_all_that_was(tmp_path):
    old, new = (_tokenizer(tmp_path / name, WORDS) for name in ("old", "new"))
    new.add_tokens(["heartbeats"])
    model = attach(
        _backbone(old),
        {"lm": MaskedLM(8, 13), "next": CausalLM(13, tied=False, bias=True), "head": Linear(2)},
        key=jax.random.key(1),
    )
    adapted = adapt_vocab(model, new)
    before = model.params["backbone"]["embeddings"]["word_embeddings"]["embedding"]
    after = adapted.params["backbone"]["embeddings"]["word_embeddings"]["embedding"]
    assert after.shape == (12, 8) and adapted.backbone.config["vocab_size"] == 12
    np.testing.assert_array_equal(after[:11], before[:11])
    np.testing.assert_allclose(after[11], before[jnp.array([5, 7, 8])].mean(0), atol=1e-6)
    kernel = model.params["heads"]["next"]["kernel"]
    np.testing.assert_allclose(
        adapted.params["heads"]["next"]["kernel"][:, 11],
        kernel[:, jnp.array([5, 7, 8])].mean(1),
        atol=1e-6,
    )
    assert adapted.params["heads"]["lm"]["bias"].shape == (12,)
    assert adapted.params["heads"]["head"] is model.params["heads"]["head"]
    # Texts of old words alone give what they gave.
    batch, same = model.backbone.inputs(["the heart"]), adapted.backbone.inputs(["the heart"])
    np.testing.assert_array_equal(batch["input_ids"], same["input_ids"])
    np.testing.assert_allclose(model.backbone(batch)["pooled"], adapted.backbone(same)["pooled"])
    out, _ = adapted.apply(adapted.params, {}, adapted.backbone.inputs(["heartbeats"]))
    assert out["lm"].shape == out["next"].shape == (1, 3, 12)


def test_another_vocabulary_is_written_and_read_back(tmp_path):
    old = _tokenizer(tmp_path / "old", WORDS)
    new = _tokenizer(tmp_path / "new", ["the", *WORDS[:5], "heartbeats", "zzz"])
    backbone = adapt_vocab(_backbone(old, pad_token_id=0), new)
    assert backbone.config["pad_token_id"] == new.pad_token_id == 1
    model = attach(backbone, {"head": Linear(2)}, key=jax.random.key(1))
    export(tmp_path / "x", model)
    again = import_model(tmp_path / "x")
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    texts = ["the heartbeats", "zzz"]
    np.testing.assert_array_equal(
        backbone.inputs(texts)["input_ids"], again.backbone.inputs(texts)["input_ids"]
    )


def test_mean_is_the_mean_of_all_rows_of_tokens(tmp_path):
    old = _tokenizer(tmp_path / "old", WORDS)
    new = _tokenizer(tmp_path / "new", [*WORDS[:5], "heartbeats"])
    backbone = _backbone(old)
    table = backbone.params["embeddings"]["word_embeddings"]["embedding"]
    got = adapt_vocab(backbone, new, start="mean").params["embeddings"]["word_embeddings"]
    np.testing.assert_allclose(got["embedding"][5], table[:11].mean(0), atol=1e-6)
    np.testing.assert_array_equal(got["embedding"][:5], table[:5])


def test_what_cannot_be_adapted_is_refused(tmp_path):
    old = _tokenizer(tmp_path / "old", WORDS)
    bare = dataclasses.replace(_backbone(old), inputs=None)
    with pytest.raises(ValueError, match="has no tokenizer; adapt_vocab is for a text model"):
        adapt_vocab(bare, old)
    with pytest.raises(ValueError, match="start is 'zero'; give 'subword_mean' or 'mean'"):
        adapt_vocab(_backbone(old), old, start="zero")
