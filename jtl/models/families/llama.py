"""LLaMA 1 to 3, and the decoder that Mistral, Qwen and StarCoder2 share with it.

The tree of parameters is that of transformers' FlaxLlamaModel, with `scale` for the weight of a
norm. Stages: "stem" is the embedding of words, "block_i" is `layers/i`, "top" is the last norm.

Positions are counted from 0 over padding too, as transformers does where none are given; a column
"position_ids" says other ones. They turn the queries and keys in float32 whatever the dtype.

Reference: Touvron et al. 2023, arXiv:2302.13971 and arXiv:2307.09288; Dubey et al. 2024,
arXiv:2407.21783; Ainslie et al. 2023, arXiv:2305.13245 (grouped queries).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch, Family, Out, Rules, run_stages
from jtl.models.heads import pool
from jtl.models.heads.pretrained import (
    causal_lm,
    classification,
    question_answering,
    token_classification,
)
from jtl.models.layers import (
    Dropout,
    RMSNorm,
    activation,
    attention,
    flat_dot,
    layer_norm,
    rotary,
    rotate,
)
from jtl.models.layers.feed_forward import MLP, GatedMLP
from jtl.models.layers.positions import positions
from jtl.models.layers.rope import Rope, frequencies, rope_of
from jtl.models.layers.token_embeddings import token_ids

POOLINGS = ("last", "mean")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What the decoders of this architecture differ in.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the feed-forward layers.
        num_hidden_layers: number of blocks.
        num_attention_heads: of queries.
        num_key_value_heads: of keys and values, a divisor of that of queries.
        head_dim: of a head.
        rope: how positions turn queries and keys.
        windows: of each block, how many keys a query sees at most; None for all.
        hidden_act: of the feed-forward layers.
        epsilon: of the norms.
        initializer_range: standard deviation of initial kernels.
        query_bias: whether the projections to query, key and value have one.
        output_bias: whether the projection after attention has one.
        mlp_bias: whether the feed-forward layers have one.
        query_norm: whether queries and keys are normalised (Qwen3).
        gated: whether the feed-forward layers have a gate (not in StarCoder2).
        centred: whether the norms are LayerNorm (StarCoder2) rather than by the root mean square.
        attention_dropout: of the attention probabilities.
        residual_dropout: of what a layer adds to the residual stream.
        embedding_dropout: of the embeddings.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope
    windows: tuple[int | None, ...]
    hidden_act: str = "silu"
    epsilon: float = 1e-6
    initializer_range: float = 0.02
    query_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_norm: bool = False
    gated: bool = True
    centred: bool = False
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0


_NEEDED = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads"),
)
_TAKEN = ("attention_dropout", "residual_dropout", "embedding_dropout", "initializer_range")


def decoder_config(
    config: Mapping[str, Any],
    *,
    windows: Sequence[int | None] = (),
    epsilon: str = "rms_norm_eps",
) -> DecoderConfig:
    """Return the sizes and rates that the decoder reads, checked; a family sets its flags itself.

    Args:
        config: the dict of `config.json`; other fields are left alone.
        windows: of each block; () gives every block all keys.
        epsilon: name of the norms' epsilon in the config.

    Raises:
        ValueError: a size is missing, the heads do not fit the groups of keys, the activation is
            not known, or the positions are of a kind that is not built here.

    >>> sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2)
    >>> decoder_config(dict(sizes, num_attention_heads=2)).head_dim
    4
    """
    missing = [name for name in _NEEDED if config.get(name) is None]
    if missing:
        raise ValueError(
            f"the config of the decoder lacks {missing}; it has {sorted(config)}; "
            "add them, or correct model_type if the checkpoint is of another kind"
        )
    sizes = {name: int(config[name]) for name in _NEEDED}
    heads, layers = sizes["num_attention_heads"], sizes["num_hidden_layers"]
    groups = int(config.get("num_key_value_heads") or heads)
    if heads % groups or (config.get("head_dim") is None and sizes["hidden_size"] % heads):
        raise ValueError(
            f"num_attention_heads={heads} has to be a multiple of num_key_value_heads={groups} "
            f"and to divide hidden_size={sizes['hidden_size']} where no head_dim is stated; "
            "correct config.json"
        )
    size = int(config.get("head_dim") or sizes["hidden_size"] // heads)
    hidden_act = config.get("hidden_act") or "silu"
    activation(hidden_act)
    taken: dict[str, Any] = {
        name: float(config[name]) for name in _TAKEN if config.get(name) is not None
    }
    return DecoderConfig(
        **sizes,
        num_key_value_heads=groups,
        head_dim=size,
        rope=rope_of(config, size),
        windows=tuple(windows) or (None,) * layers,
        hidden_act=hidden_act,
        epsilon=float(config.get(epsilon) or 1e-6),
        **taken,
    )


def _norm(config: DecoderConfig, dtype: Any, name: str) -> nn.Module:
    if config.centred:
        return layer_norm(config.epsilon, dtype, name=name)
    return RMSNorm(config.epsilon, dtype, name=name)


class _Attention(nn.Module):
    config: DecoderConfig
    index: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, batch: Batch, live: bool) -> jax.Array:
        config = self.config
        query = self._heads(hidden, config.num_attention_heads, "q_proj")
        key = self._heads(hidden, config.num_key_value_heads, "k_proj")
        value = self._heads(hidden, config.num_key_value_heads, "v_proj")
        if config.query_norm:
            query = RMSNorm(config.epsilon, self.dtype, name="q_norm")(query)
            key = RMSNorm(config.epsilon, self.dtype, name="k_norm")(key)
        turn = _turn(config.rope, batch, hidden.shape[1])
        drop = None
        if live and config.attention_dropout > 0:
            drop = Dropout(config.attention_dropout, deterministic=False)
        mask = batch.get("attention_mask")
        mixed = attention(
            rotate(query, *turn),
            rotate(key, *turn),
            value,
            mask=None if mask is None else jnp.asarray(mask),
            causal=True,
            window=config.windows[self.index],
            dropout=drop,
        )
        mixed = mixed.reshape(*hidden.shape[:2], -1)
        return self._dense(config.hidden_size, config.output_bias, "o_proj")(mixed)

    def _heads(self, hidden: jax.Array, heads: int, name: str) -> jax.Array:
        dense = self._dense(heads * self.config.head_dim, self.config.query_bias, name)
        return dense(hidden).reshape(*hidden.shape[:2], heads, -1)

    def _dense(self, width: int, bias: bool, name: str) -> nn.Dense:
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(
            width,
            use_bias=bias,
            dtype=self.dtype,
            kernel_init=init,
            dot_general=flat_dot,
            name=name,
        )


def _turn(rope: Rope, batch: Batch, length: int) -> tuple[jax.Array, jax.Array]:
    """Return cosine and sine of the positions; the layers' calls are one in the compiled step."""
    places = positions(batch, length)
    longest = length if batch.get("position_ids") is None else jnp.max(places) + 1
    return rotary(places, frequencies(rope, longest), factor=rope.scale)


class _Layer(nn.Module):
    config: DecoderConfig
    index: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, batch: Batch, live: bool) -> jax.Array:
        config = self.config
        drop = Dropout(config.residual_dropout, deterministic=not live)
        normal = _norm(config, self.dtype, "input_layernorm")(hidden)
        mixed = _Attention(config, self.index, self.dtype, name="self_attn")(normal, batch, live)
        hidden = hidden + drop(mixed)
        made = GatedMLP if config.gated else MLP
        mlp = made(
            config.intermediate_size,
            config.hidden_act,
            bias=config.mlp_bias,
            scale=config.initializer_range,
            dtype=self.dtype,
            name="mlp",
        )
        normal = _norm(config, self.dtype, "post_attention_layernorm")(hidden)
        return hidden + drop(mlp(normal))


class DecoderLayers(nn.Module):
    """The layers under the names "0", "1", ... as in the checkpoints, called one by one.

    Attributes:
        config: sizes, kinds and rates.
        dtype: of the computation; parameters are float32.
    """

    config: DecoderConfig
    dtype: Any

    def setup(self) -> None:
        """Declare the layers."""
        count = self.config.num_hidden_layers
        self.layers = [_Layer(self.config, i, self.dtype, name=str(i)) for i in range(count)]

    def __call__(self, index: int, hidden: jax.Array, batch: Batch, live: bool) -> jax.Array:
        """Return the output of layer `index` (n, positions, dim)."""
        return self.layers[index](hidden, batch, live)


class Decoder(nn.Module):
    """LLaMA and its relatives in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes, kinds and rates.
        pooling: what `out["pooled"]` is: "last" (the last real token) or "mean" (over
            `attention_mask`).
        dtype: of the computation; parameters are float32.
    """

    config: DecoderConfig
    pooling: str = "last"
    dtype: Any = jnp.float32

    beside = ("attention_mask", "position_ids")

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        # float32 whatever the dtype: the gradient of a row is a sum over all tokens that took it.
        self.embed_tokens = nn.Embed(
            config.vocab_size, config.hidden_size, dtype=jnp.float32, embedding_init=init
        )
        self.drop = Dropout(config.embedding_dropout)
        self.layers = DecoderLayers(config, self.dtype)
        self.norm = _norm(config, self.dtype, "norm")

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings (n, positions, dim)."""
        hidden = self.embed_tokens(token_ids(batch))
        return (self.drop(hidden) if live else hidden).astype(self.dtype)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index` (n, positions, dim)."""
        return self.layers(index, hidden, batch, live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens", after the last norm, and "pooled"."""
        tokens = self.norm(hidden)
        return {"tokens": tokens, "pooled": pool({"tokens": tokens}, batch, self.pooling)}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    blocks = ((rf"layers/{i}/.*", f"block_{i}") for i in range(config["num_hidden_layers"]))
    return (("embed_tokens/.*", "stem"), *blocks, ("norm/.*", "top"))


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    ids = jnp.zeros((1, 4), jnp.int32)
    return {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}


def decoder_family(
    model_type: str,
    classes: str,
    read: Callable[[Mapping[str, Any]], DecoderConfig],
    *,
    spans: str | None = "transformer",
) -> Family:
    """Return the row of a family of this architecture.

    Args:
        model_type: of `config.json`.
        classes: what the names of its classes in transformers begin with, such as "Llama".
        read: from `config.json` to the fields that the decoder reads.
        spans: what its class for question answering calls the backbone; None where there is none.
    """

    def make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Decoder:
        if pooling not in POOLINGS:
            raise ValueError(
                f"pooling {pooling!r} is not known to {model_type}; give one of {POOLINGS}"
            )
        return Decoder(read(config), pooling, dtype)

    whole = f"{classes}ForSequenceClassification"
    heads = {
        "causal_lm": causal_lm(f"{classes}ForCausalLM"),
        "classification": classification(whole, "last", "score", bias=False),
        "token_classification": token_classification(f"{classes}ForTokenClassification", "score"),
    }
    if spans is not None:
        answers = question_answering(f"{classes}ForQuestionAnswering")
        heads["question_answering"] = answers._replace(prefix=spans)
    return Family(
        model_type=model_type,
        modality="text",
        make=make,
        groups=_groups,
        poolings=POOLINGS,
        dim=lambda config: config["hidden_size"],
        example=_example,
        aliases=(("^(model|transformer)[./]", ""),),
        ignored=(
            r"(.*[./])?rotary_emb[./]inv_freq",
            r"(lm_head|score|qa_outputs)[./].*",
        ),
        class_name=f"{classes}Model",
        prefix="model",
        table="embed_tokens/embedding",
        heads=heads,
    )


def _llama(config: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(config.get("attention_bias"))
    inner = bool(config.get("mlp_bias"))
    made = decoder_config(config)
    return dataclasses.replace(made, query_bias=bias, output_bias=bias, mlp_bias=inner)


LLAMA = decoder_family("llama", "Llama", _llama)
