"""The models of the step benchmarks: published shapes with random weights, and random batches."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jtl.models.heads import Linear
from jtl.models.load import new_backbone
from jtl.models.model import Model, attach


class Shape(NamedTuple):
    """A model and what it reads.

    Attributes:
        family: `model_type`.
        config: fields of its `config.json`.
        length: tokens of a text, or pixels of a side.
        rows: of a batch, {"cpu", "gpu"}.
        dropout: the rate that its checkpoints are published with.
    """

    family: str
    config: Mapping[str, Any]
    length: int
    rows: Mapping[str, int]
    dropout: float


_BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
_MINILM = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
_TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
_IMAGE = dict(image_size=224, patch_size=16)
_RESNET = dict(embedding_size=64, hidden_sizes=[256, 512, 1024, 2048], depths=[3, 4, 6, 3])
_SMOL = dict(
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    vocab_size=49152,
    max_position_embeddings=2048,
)
_DROPPING = ("bert", "vit")
POOLINGS = {"bert": "mean", "vit": "cls", "resnet": "mean", "llama": "last"}

SHAPES = {
    "bert": Shape("bert", _BASE, 128, {"cpu": 8, "gpu": 64}, 0.1),
    "vit": Shape("vit", {**_BASE, **_IMAGE}, 224, {"cpu": 8, "gpu": 128}, 0.0),
    "minilm": Shape("bert", _MINILM, 128, {"cpu": 8, "gpu": 256}, 0.1),
    "resnet": Shape("resnet", _RESNET, 224, {"cpu": 8, "gpu": 128}, 0.0),
    "llama": Shape("llama", _SMOL, 128, {"cpu": 4, "gpu": 32}, 0.0),
    "tiny": Shape("bert", {**_TINY, "vocab_size": 500}, 32, {"cpu": 4, "gpu": 4}, 0.0),
}


def config_of(shape: Shape, dropout: float | None) -> dict[str, Any]:
    """Return the config with its dropout: the published rate, or the one that is given."""
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    rate = shape.dropout if dropout is None else dropout
    return {**shape.config, **(dict.fromkeys(names, rate) if shape.family in _DROPPING else {})}


def make_model(shape: Shape, *, dropout: float | None, dtype: str) -> Model:
    """Return our model with a head of two classes; the head has no dropout."""
    backbone = new_backbone(
        shape.family,
        config_of(shape, dropout),
        key=jax.random.key(0),
        pooling=POOLINGS[shape.family],
        dtype=np.dtype(dtype) if dtype == "float32" else jax.numpy.dtype(dtype),
    )
    return attach(backbone, {"head": Linear(2)}, key=jax.random.key(1))


def columns(shape: Shape, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random rows as the model reads them, all texts of full length."""
    rng = np.random.default_rng(seed)
    if shape.family in ("vit", "resnet"):
        size = (rows, shape.length, shape.length, 3)
        return {"pixel_values": rng.standard_normal(size, np.float32)}
    words = shape.config.get("vocab_size", 30000)
    ids = rng.integers(words // 30, words, (rows, shape.length)).astype(np.int32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def make_batch(shape: Shape, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random rows with random labels."""
    labels = np.random.default_rng(seed + 1).integers(0, 2, rows).astype(np.int32)
    return {**columns(shape, rows, seed), "label": labels, "mask": np.ones(rows, bool)}
