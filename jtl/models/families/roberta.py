"""RoBERTa and what has its layout: CodeBERT, XLM-R, CamemBERT.

The encoder is BERT's. Places are counted over the tokens that are no padding, from the padding
token's number on, so that the table of 514 places serves texts of 512 tokens. The masked-LM head
and the classification head, of two layers, are RoBERTa's own.

Reference: Liu et al. 2019, arXiv:1907.11692; Conneau et al. 2019, arXiv:1911.02116 (XLM-R);
Feng et al. 2020, arXiv:2002.08155 (CodeBERT); Martin et al. 2019, arXiv:1911.03894 (CamemBERT).
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jtl.models.backbone import Family, PretrainedHead
from jtl.models.families.bert import POOLINGS, Bert, example, groups, make_bert
from jtl.models.heads.pretrained import (
    masked_lm,
    question_answering,
    token_classification,
    two_layer,
)
from jtl.models.layers.post_norm import EncoderConfig, encoder_config
from jtl.models.layers.token_embeddings import longest_text


def roberta_config(config: Mapping[str, Any]) -> EncoderConfig:
    """Return the fields that the encoder reads, checked.

    Args:
        config: the dict of `config.json`.

    Raises:
        ValueError: as `encoder_config`, and where there is no padding token.

    >>> sizes = dict(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
    >>> sizes = dict(sizes, intermediate_size=8, max_position_embeddings=514, pad_token_id=1)
    >>> longest_text(roberta_config(sizes))
    512
    """
    padding = config.get("pad_token_id")
    if padding is None:
        raise ValueError(
            "the RoBERTa config has no pad_token_id, from which places are counted; it has "
            f"{sorted(config)}; add it (1 in every published RoBERTa)"
        )
    return encoder_config(config, "RoBERTa", fixed={"embedding_size": None, "padding": padding})


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Bert:
    return make_bert(roberta_config(config), pooling, dtype, "RoBERTa")


LM_HEAD = (
    ("dense/kernel", "lm_head.dense.weight", "dense"),
    ("dense/bias", "lm_head.dense.bias", "same"),
    ("LayerNorm/scale", "lm_head.layer_norm.weight", "same"),
    ("LayerNorm/bias", "lm_head.layer_norm.bias", "same"),
    ("bias", "lm_head.bias", "same"),
)


def heads(name: str) -> dict[str, PretrainedHead]:
    """Return the rows of the heads of `{name}ForMaskedLM` and its like."""
    return {
        "masked_lm": masked_lm(f"{name}ForMaskedLM", LM_HEAD, fixed={"activation": "gelu"}),
        "classification": two_layer(f"{name}ForSequenceClassification", "tanh"),
        "token_classification": token_classification(f"{name}ForTokenClassification"),
        "question_answering": question_answering(f"{name}ForQuestionAnswering"),
    }


ROBERTA = Family(
    model_type="roberta",
    modality="text",
    make=_make,
    groups=groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_size"],
    example=example,
    aliases=(("^roberta[./]", ""), ("[.]gamma$", ".weight"), ("[.]beta$", ".bias")),
    optional=("pooler/.*",),
    ignored=(
        r"embeddings[.](position_ids|token_type_ids)",
        r"(lm_head|classifier|qa_outputs)[./].*",
    ),
    class_name="RobertaModel",
    table="embeddings/word_embeddings/embedding",
    heads=heads("Roberta"),
    longest=lambda config: longest_text(roberta_config(config)),
)
XLM_ROBERTA = ROBERTA._replace(
    model_type="xlm-roberta",
    class_name="XLMRobertaModel",
    prefix="roberta",
    heads=heads("XLMRoberta"),
)
CAMEMBERT = ROBERTA._replace(
    model_type="camembert",
    class_name="CamembertModel",
    prefix="roberta",
    heads=heads("Camembert"),
)
