"""Rows for the heads that checkpoints carry: how one is made from a config and where it lies."""

from collections.abc import Mapping
from typing import Any

from jtl.models.backbone import Backbone, PretrainedHead
from jtl.models.heads.ctc import CTC
from jtl.models.heads.distilled import Distilled
from jtl.models.heads.language import CausalLM, MaskedLM
from jtl.models.heads.linear import Linear
from jtl.models.heads.projected import Projected
from jtl.models.heads.tokens import Span, TokenLinear
from jtl.models.heads.two_layer import TwoLayer

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

    rules = _dense("classifier", at)
    return PretrainedHead(class_name, Linear, make, rules, pooling, fields={"bias": bias})


def two_layer(
    class_name: str,
    activation: str,
    layers: tuple[str, str] = ("classifier.dense", "classifier.out_proj"),
    *,
    first: bool = True,
) -> PretrainedHead:
    """Return the row of two dense layers on the first token: classification.

    Args:
        class_name: of transformers.
        activation: between the layers.
        layers: their names in the checkpoint.
        first: whether the class has dropout before the first layer too.
    """

    def make(config: Mapping[str, Any], backbone: Backbone) -> TwoLayer:
        return TwoLayer(outputs=len(config["id2label"]), activation=activation, first=first)

    rules = (*_dense("dense", layers[0]), *_dense("out_proj", layers[1]))
    fields = {"activation": activation}
    return PretrainedHead(class_name, TwoLayer, make, rules, fields=fields)


def projected(class_name: str, pooling: str) -> PretrainedHead:
    """Return the row of two dense layers on pooled features, without an activation.

    Args:
        class_name: of transformers.
        pooling: of the backbone, that the class reads.
    """

    def make(config: Mapping[str, Any], backbone: Backbone) -> Projected:
        if config.get("use_weighted_layer_sum"):
            raise ValueError(
                f"the config has use_weighted_layer_sum=True; the head of {class_name} here reads "
                "the last layer; use a checkpoint without it, or attach a fresh head"
            )
        return Projected(outputs=len(config["id2label"]), width=config["classifier_proj_size"])

    def stated(head: Projected) -> dict[str, Any]:
        return {"classifier_proj_size": head.width, "use_weighted_layer_sum": False}

    return PretrainedHead(class_name, Projected, make, (), pooling, stated=stated)


def ctc(class_name: str) -> PretrainedHead:
    """Return the row of the letters at each frame.

    Args:
        class_name: of transformers.
    """

    def make(config: Mapping[str, Any], backbone: Backbone) -> CTC:
        return CTC(vocabulary=config["vocab_size"])

    def stated(head: CTC) -> dict[str, Any]:
        return {"vocab_size": head.vocabulary}

    return PretrainedHead(class_name, CTC, make, (), stated=stated)


def token_classification(class_name: str, at: str = "classifier") -> PretrainedHead:
    """Return the row of one linear layer on each token.

    Args:
        class_name: of transformers.
        at: name of the layer in the checkpoint.
    """

    def make(config: Mapping[str, Any], backbone: Backbone) -> TokenLinear:
        return TokenLinear(outputs=len(config["id2label"]))

    return PretrainedHead(class_name, TokenLinear, make, _dense("classifier", at))


def question_answering(class_name: str, at: str = "qa_outputs") -> PretrainedHead:
    """Return the row of the logits of a span's two ends.

    Args:
        class_name: of transformers.
        at: name of the layer in the checkpoint.
    """

    def make(config: Mapping[str, Any], backbone: Backbone) -> Span:
        return Span()

    return PretrainedHead(class_name, Span, make, _dense("qa_outputs", at))


def _dense(ours: str, theirs: str) -> Rules:
    return (
        (f"{ours}/kernel", f"{theirs}.weight", "dense"),
        (f"{ours}/bias", f"{theirs}.bias", "same"),
    )


def masked_lm(
    class_name: str,
    rules: Rules,
    *,
    dim: str = "hidden_size",
    hidden_act: str = "hidden_act",
    fixed: Mapping[str, Any] | None = None,
) -> PretrainedHead:
    """Return the row of BERT's masked-LM head: dense, activation, LayerNorm, tied decoder.

    Args:
        class_name: of transformers.
        rules: where dense, LayerNorm and bias lie.
        dim: field of the config with the width of the word embedding.
        hidden_act: field of the config with the activation.
        fixed: {field of `MaskedLM`: its value}, whatever the config has.
    """
    fixed = fixed or {}

    def make(config: Mapping[str, Any], backbone: Backbone) -> MaskedLM:
        if config.get("tie_word_embeddings", True) is False:
            raise ValueError(
                f"the config has tie_word_embeddings=False; the head of {class_name} here reads "
                "the word embedding; use a checkpoint with the two tied, or attach a fresh head"
            )
        return MaskedLM(
            dim=config[dim],
            vocabulary=config["vocab_size"],
            activation=fixed["activation"] if "activation" in fixed else config[hidden_act],
            epsilon=fixed["epsilon"] if "epsilon" in fixed else config["layer_norm_eps"],
        )

    return PretrainedHead(class_name, MaskedLM, make, rules, fields=fixed)


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
    return PretrainedHead(class_name, CausalLM, make, rules, fields={"bias": False})


def distilled(class_name: str) -> PretrainedHead:
    """Return the row of DeiT's two classifiers, whose mean is read.

    Args:
        class_name: of transformers.
    """

    def make(config: Mapping[str, Any], backbone: Backbone) -> Distilled:
        return Distilled(outputs=len(config["id2label"]))

    return PretrainedHead(class_name, Distilled, make, ())
