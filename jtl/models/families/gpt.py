"""GPT-2, and StarCoder (GPT-BigCode), whose heads share one key and value.

The tree of parameters is that of transformers' FlaxGPT2Model, with kernels (in, out) as everywhere
here: PyTorch's GPT-2 has them so too, Flax's had them (out, in), which `Family.layout` turns.
Stages: "stem" is the embeddings of words and positions, "block_i" is `h/i`, "top" is the last
LayerNorm.

Positions are counted from 0 over padding too, as transformers does where none are given; a column
"position_ids" says other ones.

Reference: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Shazeer 2019,
arXiv:1911.02150 (multi-query attention); Li et al. 2023, arXiv:2305.06161 (StarCoder).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jtl.models.backbone import Batch, Family, Out, Rules, run_stages
from jtl.models.heads import pool
from jtl.models.heads.pretrained import (
    causal_lm,
    classification,
    question_answering,
    token_classification,
)
from jtl.models.layers import Dropout, activation, attention, flat_dot, layer_norm
from jtl.models.layers.feed_forward import MLP
from jtl.models.layers.positions import positions
from jtl.models.layers.stated import stated
from jtl.models.layers.token_embeddings import token_ids
from jtl.weights.checkpoint import Checkpoint
from jtl.weights.layouts import mapped

POOLINGS = ("last", "mean")


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The fields of `config.json` that the decoder reads, under their names there.

    `multi_query` is None for GPT-2, whose fused layer holds all queries, then all keys, then all
    values. In GPT-BigCode it is True (one key and value for all heads), or False: then the fused
    layer holds query, key and value of one head after the other.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    multi_query: bool | None = None


def gpt_config(config: Mapping[str, Any]) -> GPTConfig:
    """Return the fields that the decoder reads, checked.

    Args:
        config: the dict of `config.json`; other fields are left alone.

    Raises:
        ValueError: a size is missing, the heads do not divide the width, the activation is not
            known, or the config asks for cross-attention.

    >>> sizes = dict(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=2)
    >>> gpt_config(sizes).activation_function
    'gelu_new'
    """
    if config.get("add_cross_attention"):
        raise ValueError(
            "the GPT config has add_cross_attention=True; the decoder here has self-attention "
            "alone; use a checkpoint without cross-attention"
        )
    made = stated(GPTConfig, config, "GPT")
    if made.n_embd % made.n_head:
        raise ValueError(
            f"n_head={made.n_head} does not divide n_embd={made.n_embd}; "
            "give a number of heads that does"
        )
    activation(made.activation_function)
    return made


class _Attention(nn.Module):
    config: GPTConfig
    index: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        config, dim = self.config, self.config.n_embd
        size = dim // config.n_head
        groups = 1 if config.multi_query else config.n_head
        fused = self._dense(dim + 2 * groups * size, "c_attn", config.initializer_range)(hidden)
        if config.multi_query is False:
            parts = jnp.split(fused.reshape(*hidden.shape[:2], groups, -1), 3, axis=-1)
        else:
            parts = jnp.split(fused, (dim, dim + groups * size), axis=-1)
        query, key, value = (part.reshape(*hidden.shape[:2], -1, size) for part in parts)
        scale = 1 / math.sqrt(size) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale = scale / (self.index + 1)
        drop = None
        if live and config.attn_pdrop > 0:
            drop = Dropout(config.attn_pdrop, deterministic=False)
        options: dict[str, Any] = dict(mask=mask, causal=True, scale=scale, dropout=drop)
        mixed = attention(query, key, value, **options).reshape(hidden.shape)
        return self._dense(dim, "c_proj", _last_scale(config))(mixed)

    def _dense(self, width: int, name: str, scale: float) -> nn.Dense:
        init = nn.initializers.normal(scale)
        return nn.Dense(width, dtype=self.dtype, kernel_init=init, dot_general=flat_dot, name=name)


def _last_scale(config: GPTConfig) -> float:
    """Return the initial scale of layers that write to the residual stream (GPT-2, section 2.3)."""
    return config.initializer_range / math.sqrt(2 * config.n_layer)


class _Block(nn.Module):
    config: GPTConfig
    index: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array | None, live: bool) -> jax.Array:
        config = self.config
        drop = Dropout(config.resid_pdrop, deterministic=not live)
        norm = functools.partial(layer_norm, config.layer_norm_epsilon, self.dtype)
        mixed = _Attention(config, self.index, self.dtype, name="attn")(
            norm(name="ln_1")(hidden), mask, live
        )
        hidden = hidden + drop(mixed)
        mlp = MLP(
            config.n_inner or 4 * config.n_embd,
            config.activation_function,
            scale=config.initializer_range,
            last_scale=_last_scale(config),
            dtype=self.dtype,
            name="mlp",
        )
        return hidden + drop(mlp(norm(name="ln_2")(hidden)))


class _Blocks(nn.Module):
    """The blocks under the names "0", "1", ... as in the checkpoints."""

    config: GPTConfig
    dtype: Any

    def setup(self) -> None:
        count = self.config.n_layer
        self.blocks = [_Block(self.config, i, self.dtype, name=str(i)) for i in range(count)]

    def __call__(
        self, index: int, hidden: jax.Array, mask: jax.Array | None, live: bool
    ) -> jax.Array:
        return self.blocks[index](hidden, mask, live)


class GPT(nn.Module):
    """GPT-2 or GPT-BigCode in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "last" (the last real token) or "mean" (over
            `attention_mask`).
        dtype: of the computation; parameters are float32.
    """

    config: GPTConfig
    pooling: str = "last"
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        # float32 whatever the dtype: the gradient of a row is a sum over all tokens that took it.
        table = functools.partial(nn.Embed, dtype=jnp.float32, embedding_init=init)
        self.wte = table(config.vocab_size, config.n_embd)
        self.wpe = table(config.n_positions, config.n_embd)
        self.drop = Dropout(config.embd_pdrop)
        self.h = _Blocks(config, self.dtype)
        self.ln_f = layer_norm(config.layer_norm_epsilon, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.n_layer

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, positions, dim); token types are rows of the words' table."""
        ids = token_ids(batch, self.config.n_positions)
        hidden = self.wte(ids) + self.wpe(positions(batch, ids.shape[1]))
        if batch.get("token_type_ids") is not None:
            hidden = hidden + self.wte(jnp.asarray(batch["token_type_ids"]))
        return (self.drop(hidden) if live else hidden).astype(self.dtype)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of block `index` (n, positions, dim)."""
        mask = batch.get("attention_mask")
        return self.h(index, hidden, None if mask is None else jnp.asarray(mask), live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens", after the last LayerNorm, and "pooled"."""
        tokens = self.ln_f(hidden)
        return {"tokens": tokens, "pooled": pool({"tokens": tokens}, batch, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> GPT:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not known to GPT; give one of {POOLINGS}")
    return GPT(gpt_config(config), pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    blocks = ((rf"h/{i}/.*", f"block_{i}") for i in range(config["n_layer"]))
    return (("wte/.*", "stem"), ("wpe/.*", "stem"), *blocks, ("ln_f/.*", "top"))


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    ids = jnp.zeros((1, min(4, config["n_positions"])), jnp.int32)
    return {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}


def _layout(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Turn the kernels of transformers' Flax class, which are (out, in)."""
    turned = (3 * config["n_embd"], config["n_embd"])
    fused = (t.shape for n, t in checkpoint.names.items() if n.endswith("attn/c_attn/kernel"))
    # By the shape, since our own trees are "flax" too and have (in, out).
    if checkpoint.layout != "flax" or next(fused, None) != turned:
        return checkpoint
    pattern = r".*/(c_attn|c_proj|c_fc)/kernel"
    return mapped(checkpoint, pattern, np.transpose, shape=lambda shape: shape[::-1])


GPT_BIGCODE = Family(
    model_type="gpt_bigcode",
    modality="text",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["n_embd"],
    example=_example,
    aliases=(("^transformer[./]", ""),),
    ignored=(
        r"h[./]\d+[./]attn[./](masked_)?bias",
        r"bias",
        r"(lm_head|score|classifier|qa_outputs|multiple_choice_head)[./].*",
    ),
    class_name="GPTBigCodeModel",
    prefix="transformer",
    table="wte/embedding",
    longest=lambda config: config["n_positions"],
    heads={
        "causal_lm": causal_lm("GPTBigCodeForCausalLM"),
        "classification": classification(
            "GPTBigCodeForSequenceClassification", "last", "score", bias=False
        ),
        "token_classification": token_classification("GPTBigCodeForTokenClassification"),
    },
)
GPT2 = GPT_BIGCODE._replace(
    model_type="gpt2",
    # PyTorch's Conv1D has its kernels (in, out).
    rules=((r"(.*)/(c_attn|c_proj|c_fc)/kernel", r"\1.\2.weight", "same"),),
    layout=_layout,
    class_name="GPT2Model",
    heads={
        "causal_lm": causal_lm("GPT2LMHeadModel"),
        "classification": classification(
            "GPT2ForSequenceClassification", "last", "score", bias=False
        ),
        "token_classification": token_classification("GPT2ForTokenClassification"),
        "question_answering": question_answering("GPT2ForQuestionAnswering"),
    },
)
