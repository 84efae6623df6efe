"""DistilBERT: its names, fields of its own, heads; parity with transformers."""

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict
from text_parity import same_backbone, same_head, text_batch
from torch_oracle import names_agree, peer

from jtl.models.families.distilbert import DISTILBERT
from jtl.models.load import load_backbone, new_backbone

TINY = dict(
    vocab_size=31,
    dim=16,
    n_layers=2,
    n_heads=2,
    hidden_dim=24,
    max_position_embeddings=20,
    initializer_range=0.3,
)
KINDS = ("masked_lm", "classification", "token_classification", "question_answering")
_WIDE = [f"attention/{name}" for name in ("q_lin", "k_lin", "v_lin", "out_lin")]
_NORMS = ("sa_layer_norm", "output_layer_norm")
_LAYER = {
    **{f"{name}/kernel": (16, 16) for name in _WIDE},
    **{f"{name}/bias": (16,) for name in (*_WIDE, *_NORMS, "ffn/lin2")},
    **{f"{name}/scale": (16,) for name in _NORMS},
    "ffn/lin1/kernel": (16, 24),
    "ffn/lin1/bias": (24,),
    "ffn/lin2/kernel": (24, 16),
}
GOLDEN = {
    "embeddings/LayerNorm/bias": (16,),
    "embeddings/LayerNorm/scale": (16,),
    "embeddings/position_embeddings/embedding": (20, 16),
    "embeddings/word_embeddings/embedding": (31, 16),
    **{f"transformer/layer/{i}/{name}": shape for i in range(2) for name, shape in _LAYER.items()},
}


def test_golden_tree():
    made = new_backbone("distilbert", TINY, key=jax.random.key(0))
    leaves = flatten_dict(made.params, sep="/")
    assert {name: leaf.shape for name, leaf in leaves.items()} == GOLDEN
    assert made.dim == 16 and made.module.config.hidden_act == "gelu"


@pytest.mark.parametrize(
    ("changes", "pooling", "message"),
    [
        (dict(dim=None), "cls", r"DistilBERT config lacks \['dim'\]"),
        (dict(n_heads=3), "cls", "n_heads=3 does not divide dim=16"),
        ({}, "pooler", "'pooler' is not known to DistilBERT, which has no pooler"),
    ],
)
def test_config_errors(changes, pooling, message):
    with pytest.raises(ValueError, match=message):
        DISTILBERT.make({**TINY, **changes}, pooling, jnp.float32)


@pytest.mark.parity
def test_backbone_is_that_of_transformers(tmp_path):
    model = peer("DistilBertModel", tmp_path, **TINY)
    same_backbone(model, load_backbone(tmp_path), text_batch())


@pytest.mark.parity
def test_a_table_of_sines_is_read_from_the_checkpoint(tmp_path):
    import torch

    model = peer("DistilBertModel", tmp_path, **TINY, sinusoidal_pos_embds=True)
    table = load_backbone(tmp_path).params["embeddings"]["position_embeddings"]["embedding"]
    theirs = model.embeddings.position_embeddings.weight
    assert torch.equal(torch.tensor(jax.device_get(table)), theirs.detach())


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_those_of_transformers(tmp_path, kind):
    labels = 2 if kind == "question_answering" else 5
    config = dict(TINY, activation="relu")
    same_head(tmp_path, kind, text_batch(), "distilbert", **config, num_labels=labels)


@pytest.mark.parity
@pytest.mark.parametrize("vocabulary", [30522, 28996, 119547])  # uncased, cased, multilingual
def test_names_agree_at_published_sizes(vocabulary):
    sizes = dict(dim=768, n_layers=6, n_heads=12, hidden_dim=3072, max_position_embeddings=512)
    count = names_agree("DistilBertModel", "distilbert", vocab_size=vocabulary, **sizes)
    assert count == 4 + 6 * 16
