"""ELECTRA: BERT's encoder with embeddings of a width of their own, and no pooler.

The tree of parameters is that of transformers' FlaxElectraModel. The same rows read generators,
which carry a masked-LM head, and discriminators, whose head tells tokens that were replaced.

Reference: Clark et al. 2020, arXiv:2003.10555.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Backbone, Batch, Family, Out, PretrainedHead, Rules, run_stages
from jtl.models.families.bert import example
from jtl.models.heads import ReplacedToken, pool
from jtl.models.heads.pretrained import (
    masked_lm,
    question_answering,
    token_classification,
    two_layer,
)
from jtl.models.layers.post_norm import EncoderConfig, PostNormEncoder, dense, encoder_config
from jtl.models.layers.token_embeddings import TokenEmbeddings

POOLINGS = ("cls", "mean")


class Electra(nn.Module):
    """The ELECTRA encoder in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "cls" (the first token) or "mean" (over `attention_mask`).
        dtype: of the computation; parameters are float32.
    """

    config: EncoderConfig
    pooling: str = "cls"
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the modules; the projection is there where the two widths differ."""
        config = self.config
        self.embeddings = TokenEmbeddings(config, self.dtype)
        if config.embedding_size not in (None, config.hidden_size):
            self.embeddings_project = dense(
                config.hidden_size, config, self.dtype, "embeddings_project"
            )
        self.encoder = PostNormEncoder(config, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings at the width of the layers (n, positions, dim)."""
        hidden = self.embeddings(batch, live)
        if self.config.embedding_size in (None, self.config.hidden_size):
            return hidden
        return self.embeddings_project(hidden)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index` (n, positions, dim)."""
        mask = batch.get("attention_mask")
        return self.encoder(index, hidden, None if mask is None else jnp.asarray(mask), live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" and "pooled"."""
        return {"tokens": hidden, "pooled": pool({"tokens": hidden}, batch, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Electra:
    if pooling not in POOLINGS:
        raise ValueError(
            f"pooling {pooling!r} is not known to ELECTRA, which has no pooler; "
            f"give one of {POOLINGS}"
        )
    return Electra(encoder_config(config, "ELECTRA"), pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    layers = range(config["num_hidden_layers"])
    blocks = ((rf"encoder/layer/{i}/.*", f"block_{i}") for i in layers)
    return (("embeddings(_project)?/.*", "stem"), *blocks)


def _discriminator(config: Mapping[str, Any], backbone: Backbone) -> ReplacedToken:
    return ReplacedToken(activation=config["hidden_act"])


_GENERATOR = (
    ("dense/kernel", "generator_predictions.dense.weight", "dense"),
    ("dense/bias", "generator_predictions.dense.bias", "same"),
    ("LayerNorm/scale", "generator_predictions.LayerNorm.weight", "same"),
    ("LayerNorm/bias", "generator_predictions.LayerNorm.bias", "same"),
    ("bias", "generator_lm_head.bias", "same"),
)
_DISCRIMINATOR = (
    (r"(.*)/kernel", r"discriminator_predictions.\1.weight", "dense"),
    (r"(.*)/bias", r"discriminator_predictions.\1.bias", "same"),
)

ELECTRA = Family(
    model_type="electra",
    modality="text",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_size"],
    example=example,
    aliases=(("^electra[./]", ""), ("[.]gamma$", ".weight"), ("[.]beta$", ".bias")),
    ignored=(
        r"embeddings[.](position_ids|token_type_ids)",
        r"(generator_predictions|generator_lm_head|discriminator_predictions)[./].*",
        r"(classifier|qa_outputs|sequence_summary)[./].*",
    ),
    class_name="ElectraModel",
    table="embeddings/word_embeddings/embedding",
    heads={
        "masked_lm": masked_lm(
            "ElectraForMaskedLM", _GENERATOR, dim="embedding_size", fixed={"activation": "gelu"}
        ),
        "discriminator": PretrainedHead(
            "ElectraForPreTraining", ReplacedToken, _discriminator, _DISCRIMINATOR
        ),
        "classification": two_layer("ElectraForSequenceClassification", "gelu"),
        "token_classification": token_classification("ElectraForTokenClassification"),
        "question_answering": question_answering("ElectraForQuestionAnswering"),
    },
)
