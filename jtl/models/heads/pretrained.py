"""Rows for the heads that checkpoints carry: how one is made from a config and where it lies."""

from collections.abc import Mapping
from typing import Any

from jtl.models.backbone import Backbone, PretrainedHead
from jtl.models.heads.language import CausalLM, MaskedLM
from jtl.models.heads.linear import Linear

Rules = tuple[tuple[str, str, str], ...]


def classification(
    class_name: str, pooling: str, at: str = "classifier", *, bias: bool = True
) -> PretrainedHead:
    """Return the row of one linear layer on pooled features.

    Args:
        class_name: of transformers.
        pooling: of the backbone, that the class reads.
        at: name of the layer in the checkpoint.
        bias: whether the layer has one.
    """

    def make(config: Mapping[str, Any], backbone: Backbone) -> Linear:
        return Linear(outputs=len(config["id2label"]), bias=bias)

    rules = (
        ("classifier/kernel", f"{at}.weight", "dense"),
        ("classifier/bias", f"{at}.bias", "same"),
    )
    return PretrainedHead(class_name, Linear, make, rules, pooling, fields={"bias": bias})


def masked_lm(class_name: str, rules: Rules) -> PretrainedHead:
    """Return the row of BERT's masked-LM head: dense, activation, LayerNorm, tied decoder.

    Args:
        class_name: of transformers.
        rules: where dense, LayerNorm and bias lie.
    """

    def make(config: Mapping[str, Any], backbone: Backbone) -> MaskedLM:
        return MaskedLM(
            dim=backbone.dim,
            vocabulary=config["vocab_size"],
            activation=config["hidden_act"],
            epsilon=config["layer_norm_eps"],
        )

    return PretrainedHead(class_name, MaskedLM, make, rules)


def causal_lm(class_name: str, *, tied: bool | None = None, at: str = "lm_head") -> PretrainedHead:
    """Return the row of the next token's logits, tied to the word embedding or not.

    Args:
        class_name: of transformers.
        tied: None has `tie_word_embeddings` of the config say it.
        at: name of the layer in the checkpoint.
    """

    def make(config: Mapping[str, Any], backbone: Backbone) -> CausalLM:
        shared = bool(config.get("tie_word_embeddings", True)) if tied is None else tied
        return CausalLM(vocabulary=config["vocab_size"], tied=shared)

    rules = (("kernel", f"{at}.weight", "dense"), ("bias", f"{at}.bias", "same"))
    return PretrainedHead(class_name, CausalLM, make, rules)
