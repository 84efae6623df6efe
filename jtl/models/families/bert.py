"""BERT and what has its layout: MiniLM, SciBERT, BiomedBERT, LegalBERT, ClinicalBERT, CXR-BERT.

The tree of parameters is that of transformers' FlaxBertModel, so `flax_model.msgpack` loads as it
is and PyTorch checkpoints by the default rules. Stages: "stem" is the three embeddings, "block_i"
is `encoder/layer/i`, "top" is the pooler. CXR-BERT, the text side of BioViL, has a projection of
the first token beside the masked-LM head; it is written back as a BERT.

Reference: Devlin et al. 2018, arXiv:1810.04805; Wang et al. 2020, arXiv:2002.10957 (MiniLM);
Boecking et al. 2022, arXiv:2204.09817 (CXR-BERT).
"""

import json
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import (
    UNUSED,
    Backbone,
    Batch,
    Family,
    Out,
    PretrainedHead,
    Rules,
    run_stages,
)
from jtl.models.heads import TokenProjection, pool
from jtl.models.heads.pretrained import (
    classification,
    masked_lm,
    question_answering,
    token_classification,
)
from jtl.models.layers.post_norm import EncoderConfig, Pooler, PostNormEncoder, encoder_config
from jtl.models.layers.token_embeddings import TokenEmbeddings

POOLINGS = ("pooler", "cls", "mean")


class Bert(nn.Module):
    """The BERT encoder in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "pooler" (tanh of a dense layer on the first token),
            "cls" (the first token) or "mean" (over `attention_mask`).
        dtype: of the computation; parameters are float32.
    """

    config: EncoderConfig
    pooling: str = "pooler"
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        self.embeddings = TokenEmbeddings(self.config, self.dtype)
        self.encoder = PostNormEncoder(self.config, self.dtype)
        self.pooler = Pooler(self.config, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, positions, dim)."""
        return self.embeddings(batch, live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index` (n, positions, dim)."""
        mask = batch.get("attention_mask")
        return self.encoder(index, hidden, None if mask is None else jnp.asarray(mask), live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens" and "pooled"; the pooler's weights exist under every pooling."""
        if self.pooling == "pooler" or self.is_initializing():
            pooled = self.pooler(hidden)
            if self.pooling == "pooler":
                return {"tokens": hidden, "pooled": pooled}
        return {"tokens": hidden, "pooled": pool({"tokens": hidden}, batch, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def make_bert(
    config: EncoderConfig, pooling: str, dtype: Any = jnp.float32, name: str = "BERT"
) -> Bert:
    """Return the module of a config that `encoder_config` has checked.

    Raises:
        ValueError: the pooling is not known.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not known to {name}; give one of {POOLINGS}")
    return Bert(config, pooling, dtype)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Bert:
    return make_bert(encoder_config(config, "BERT", fixed=_FIXED), pooling, dtype)


def groups(config: Mapping[str, Any], pooling: str) -> Rules:
    """Return the labels of embeddings, layers and pooler."""
    layers = range(config["num_hidden_layers"])
    blocks = ((rf"encoder/layer/{i}/.*", f"block_{i}") for i in layers)
    top = "top" if pooling == "pooler" else UNUSED
    return (("embeddings/.*", "stem"), *blocks, ("pooler/.*", top))


def example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return a row of four tokens, or of as many as the model has positions."""
    length = min(4, config["max_position_embeddings"])
    ids = jnp.zeros((1, length), jnp.int32)
    return {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}


def _projection(config: Mapping[str, Any], backbone: Backbone) -> TokenProjection:
    if config.get("projection_size") is None:
        raise ValueError(
            f"the config has no projection_size; it has {sorted(config)}; only CXR-BERT "
            "checkpoints carry a projection of the first token, so attach a fresh head"
        )
    return TokenProjection(outputs=config["projection_size"])


def _cxr(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a CXR-BERT config as that of a BERT with the width of its projection."""
    from transformers import BertConfig

    own = {name: value for name, value in config.items() if name not in ("model_type", "auto_map")}
    whole = json.loads(BertConfig(**own).to_json_string(use_diff=False))
    return {"projection_size": 128, **whole, **own, "model_type": "bert"}


_FIXED = {"embedding_size": None}
_MASKED_LM = (
    ("dense/kernel", "cls.predictions.transform.dense.weight", "dense"),
    ("dense/bias", "cls.predictions.transform.dense.bias", "same"),
    ("LayerNorm/scale", "cls.predictions.transform.LayerNorm.weight", "same"),
    ("LayerNorm/bias", "cls.predictions.transform.LayerNorm.bias", "same"),
    ("bias", "cls.predictions.bias", "same"),
)
_PROJECTION = tuple(
    (f"{layer}/{leaf}", f"cls_projection_head.{layer}.{theirs}", layout)
    for layer in ("dense_to_hidden", "LayerNorm", "dense_to_output")
    for leaf, theirs, layout in (
        *(("kernel", "weight", "dense"), ("scale", "weight", "same"), ("bias", "bias", "same")),
    )
)

BERT = Family(
    model_type="bert",
    modality="text",
    make=_make,
    groups=groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_size"],
    example=example,
    aliases=(("^bert[./]", ""), ("[.]gamma$", ".weight"), ("[.]beta$", ".bias")),
    optional=("pooler/.*",),
    ignored=(
        r"embeddings[.](position_ids|token_type_ids)",
        r"(cls|cls_projection_head|classifier|qa_outputs|dropout)[./].*",
    ),
    class_name="BertModel",
    table="embeddings/word_embeddings/embedding",
    heads={
        "masked_lm": masked_lm("BertForMaskedLM", _MASKED_LM),
        "classification": classification("BertForSequenceClassification", "pooler"),
        "token_classification": token_classification("BertForTokenClassification"),
        "question_answering": question_answering("BertForQuestionAnswering"),
        "projection": PretrainedHead("CXRBertModel", TokenProjection, _projection, _PROJECTION),
    },
)
CXR_BERT = BERT._replace(model_type="cxr-bert", prefix="bert", complete=_cxr)
