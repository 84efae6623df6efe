"""wav2vec 2.0 and HuBERT: convolutions over the samples of a recording, then a transformer.

The tree of parameters is that of transformers' FlaxWav2Vec2Model. Stages: "stem" is the
convolutions, their projection and the positional convolution, "block_i" is `encoder/layers/i`,
"top" is the last LayerNorm of the models that have one (`do_stable_layer_norm`). A batch has
`input_values` (n, samples) and, where the checkpoint's extractor makes one, `attention_mask` of the
same shape. `out["token_mask"]` (n, frames) then says which frames are real.

SpecAugment is off unless it is asked for: frames that the column `mask_time_indices` (n, frames)
marks are replaced by the learned vector, live or not; `mask_time_prob` of the config draws nothing
here. LayerDrop (`layerdrop`) is on where a block is live.

Reference: Baevski et al. 2020, arXiv:2006.11477; Hsu et al. 2021, arXiv:2106.07447 (HuBERT).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models.backbone import Batch, Family, Out, Rules, run_stages
from jtl.models.heads import pool
from jtl.models.heads.pretrained import ctc, projected
from jtl.models.layers import Dropout, activation, layer_norm
from jtl.models.layers.frames import frame_mask, samples_of
from jtl.models.layers.nest import Nest
from jtl.models.layers.positional_conv import PositionalConv
from jtl.models.layers.vit_encoder import check_heads, dense
from jtl.models.layers.wav2vec2_layers import Wav2Vec2Layer

POOLINGS = ("mean",)


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config:
    """The fields of `config.json` that the model reads, under their names there.

    `conv_*` have one entry for each convolution. `mask_time_prob` and `mask_feature_prob` say only
    whether there is a vector for masked frames.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    conv_dim: tuple[int, ...]
    conv_kernel: tuple[int, ...]
    conv_stride: tuple[int, ...]
    conv_bias: bool = False
    feat_extract_norm: str = "group"
    feat_extract_activation: str = "gelu"
    feat_proj_layer_norm: bool = True
    feat_proj_dropout: float = 0.0
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    do_stable_layer_norm: bool = False
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.1
    activation_dropout: float = 0.1
    attention_dropout: float = 0.1
    layerdrop: float = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    mask_time_prob: float = 0.05
    mask_feature_prob: float = 0.0

    @property
    def masked(self) -> bool:
        """Whether the checkpoint has a vector for masked frames."""
        return self.mask_time_prob > 0 or self.mask_feature_prob > 0


# Variants that would change the numbers and are not built here.
_REFUSED = {
    "add_adapter": "convolutions after the encoder",
    "adapter_attn_dim": "adapters of MMS in each layer",
    "conv_pos_batch_norm": "a BatchNorm before the positional convolution",
}


def wav2vec2_config(config: Mapping[str, Any]) -> Wav2Vec2Config:
    """Return the fields that the model reads, checked.

    Args:
        config: the dict of `config.json`; other fields are left alone.

    Raises:
        ValueError: a size is missing or they do not fit together, or the config asks for a variant
            that is not built here.

    >>> sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> convolutions = dict(conv_dim=[8], conv_kernel=[10], conv_stride=[5])
    >>> wav2vec2_config(dict(sizes, intermediate_size=8, **convolutions)).conv_dim
    (8,)
    """
    for name, what in _REFUSED.items():
        if config.get(name):
            raise ValueError(
                f"the config has {name}={config[name]!r}, {what}; the encoder here has none; "
                "use a checkpoint without"
            )
    fields = dataclasses.fields(Wav2Vec2Config)
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [name for name in needed if config.get(name) is None]
    if missing:
        raise ValueError(
            f"the config of the speech model lacks {missing}; it has {sorted(config)}; add them, "
            "or correct model_type if the checkpoint is of another kind"
        )
    own = {f.name: config[f.name] for f in fields if config.get(f.name) is not None}
    for name in ("conv_dim", "conv_kernel", "conv_stride"):
        own[name] = tuple(own[name])
    made = Wav2Vec2Config(**own)
    _check(made)
    return made


def _check(made: Wav2Vec2Config) -> None:
    lengths = {len(made.conv_dim), len(made.conv_kernel), len(made.conv_stride)}
    if len(lengths) > 1 or not made.conv_dim:
        raise ValueError(
            f"conv_dim={made.conv_dim}, conv_kernel={made.conv_kernel} and "
            f"conv_stride={made.conv_stride} are of different lengths; give one entry in each for "
            "every convolution"
        )
    if made.feat_extract_norm not in ("group", "layer"):
        raise ValueError(
            f"feat_extract_norm is {made.feat_extract_norm!r}; there are 'group' and 'layer'; "
            "correct the config"
        )
    if made.hidden_size % made.num_conv_pos_embedding_groups:
        raise ValueError(
            f"num_conv_pos_embedding_groups={made.num_conv_pos_embedding_groups} does not divide "
            f"hidden_size={made.hidden_size}; give a number of groups that does"
        )
    check_heads(made.hidden_size, made.num_attention_heads)
    activation(made.hidden_act)
    activation(made.feat_extract_activation)


class _ConvLayer(nn.Module):
    """A convolution, a norm over time or over channels or none, an activation."""

    config: Wav2Vec2Config
    index: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        config, i = self.config, self.index
        hidden = nn.Conv(
            config.conv_dim[i],
            (config.conv_kernel[i],),
            (config.conv_stride[i],),
            padding="VALID",
            use_bias=config.conv_bias,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
            name="conv",
        )(hidden)
        if config.feat_extract_norm == "layer":
            hidden = layer_norm(1e-5, self.dtype, name="layer_norm")(hidden)
        elif i == 0:  # each channel by itself over time, padding included
            hidden = nn.GroupNorm(
                num_groups=None,
                group_size=1,
                epsilon=1e-5,
                use_fast_variance=False,
                dtype=self.dtype,
                name="layer_norm",
            )(hidden)
        return activation(config.feat_extract_activation)(hidden)


class _FeatureProjection(nn.Module):
    config: Wav2Vec2Config
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, live: bool) -> jax.Array:
        config = self.config
        if config.feat_proj_layer_norm:
            hidden = layer_norm(config.layer_norm_eps, self.dtype, name="layer_norm")(hidden)
        width, scale = config.hidden_size, config.initializer_range
        hidden = dense(width, scale, self.dtype, "projection")(hidden)
        return Dropout(config.feat_proj_dropout, deterministic=not live)(hidden)


class _PositionalEmbedding(nn.Module):
    config: Wav2Vec2Config
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        config = self.config
        width, groups = config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
        places = PositionalConv(width, groups, self.dtype, name="conv")(hidden)
        return activation(config.feat_extract_activation)(places)


class _Encoder(nn.Module):
    config: Wav2Vec2Config
    dtype: Any

    def setup(self) -> None:
        config = self.config
        self.pos_conv_embed = _PositionalEmbedding(config, self.dtype)
        self.layer_norm = layer_norm(config.layer_norm_eps, self.dtype)
        self.layers = Nest(
            tuple(
                (str(i), functools.partial(Wav2Vec2Layer, config, self.dtype))
                for i in range(config.num_hidden_layers)
            )
        )
        self.dropout = Dropout(config.hidden_dropout)

    def start(self, hidden: jax.Array, live: bool) -> jax.Array:
        hidden = hidden + self.pos_conv_embed(hidden)
        if not self.config.do_stable_layer_norm:
            hidden = self.layer_norm(hidden)
        return self.dropout(hidden) if live else hidden

    def layer(self, index: int, hidden: jax.Array, mask: Any, live: bool) -> jax.Array:
        return self.layers(str(index), hidden, mask, live)

    def end(self, hidden: jax.Array) -> jax.Array:
        return self.layer_norm(hidden) if self.config.do_stable_layer_norm else hidden


class Wav2Vec2(nn.Module):
    """The speech encoder in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes and rates.
        pooling: what `out["pooled"]` is: "mean" over the real frames.
        dtype: of the computation; parameters are float32.
    """

    config: Wav2Vec2Config
    pooling: str = "mean"
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the modules of the three kinds of stages."""
        config = self.config
        self.feature_extractor = Nest(
            tuple(
                (f"conv_layers/{i}", functools.partial(_ConvLayer, config, i, self.dtype))
                for i in range(len(config.conv_dim))
            )
        )
        self.feature_projection = _FeatureProjection(config, self.dtype)
        if config.masked:
            init = nn.initializers.uniform(1.0)
            self.masked_spec_embed = self.param("masked_spec_embed", init, (config.hidden_size,))
        self.encoder = _Encoder(config, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the frames with their positions, (n, frames, dim)."""
        hidden = _recordings(batch, self.config).astype(self.dtype)[:, :, None]
        for i in range(len(self.config.conv_dim)):
            hidden = self.feature_extractor(f"conv_layers/{i}", hidden)
        hidden = self._masked(self.feature_projection(hidden, live), batch)
        mask = self._mask(batch)
        if mask is not None:
            hidden = jnp.where(mask[:, :, None], hidden, 0)
        return self.encoder.start(hidden, live)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of layer `index` (n, frames, dim)."""
        return self.encoder.layer(index, hidden, self._mask(batch), live)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens", "pooled", and "token_mask" where the batch has a mask."""
        out = {"tokens": self.encoder.end(hidden)}
        mask = self._mask(batch)
        if mask is not None:
            out["token_mask"] = mask
        return {**out, "pooled": pool(out, {}, "mean")}

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)

    def _mask(self, batch: Batch) -> jax.Array | None:
        mask = batch.get("attention_mask")
        if mask is None:
            return None
        return frame_mask(jnp.asarray(mask), self.config.conv_kernel, self.config.conv_stride)

    def _masked(self, hidden: jax.Array, batch: Batch) -> jax.Array:
        chosen = batch.get("mask_time_indices")
        if chosen is None:
            return hidden
        if not self.config.masked or chosen.shape != hidden.shape[:2]:
            raise ValueError(
                f"mask_time_indices is {chosen.shape} for frames {hidden.shape[:2]}, and the "
                f"config has mask_time_prob={self.config.mask_time_prob}; the checkpoint has a "
                "vector for masked frames where that is above 0; give one entry for each frame"
            )
        vector = self.masked_spec_embed.astype(hidden.dtype)[None, None, :]
        return jnp.where(jnp.asarray(chosen).astype(bool)[:, :, None], vector, hidden)


def _recordings(batch: Batch, config: Wav2Vec2Config) -> jax.Array:
    """Return `batch["input_values"]` (n, samples), checked.

    Raises:
        ValueError: there are none, of another rank, or too short for one frame.
    """
    there: Any = batch["input_values"].shape if "input_values" in batch else sorted(batch)
    least = samples_of(1, config.conv_kernel, config.conv_stride)
    if "input_values" not in batch or len(there) != 2 or there[1] < least:
        raise ValueError(
            f"speech models read 'input_values' of (n, samples), {least} samples at least; the "
            f"batch has {there}; make batches with backbone.inputs(recordings)"
        )
    return jnp.asarray(batch["input_values"])


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Wav2Vec2:
    return Wav2Vec2(wav2vec2_config(config), pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    layers = range(config["num_hidden_layers"])
    blocks = ((rf"encoder/layers/{i}/.*", f"block_{i}") for i in layers)
    last = "top" if config.get("do_stable_layer_norm") else "stem"
    stem = "feature_(extractor|projection)/.*|masked_spec_embed|encoder/pos_conv_embed/.*"
    return ((stem, "stem"), *blocks, ("encoder/layer_norm/.*", last))


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return a recording of four frames."""
    made = wav2vec2_config(config)
    samples = samples_of(4, made.conv_kernel, made.conv_stride)
    ones = jnp.ones((1, samples), jnp.int32)
    return {"input_values": jnp.zeros((1, samples)), "attention_mask": ones}


_WEIGHT = r"\1.parametrizations.weight.original"
WAV2VEC2 = Family(
    model_type="wav2vec2",
    modality="audio",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["hidden_size"],
    example=_example,
    rules=(
        (r"(feature_extractor/conv_layers/\d+/conv)/kernel", r"\1.weight", "conv"),
        (r"(.*/pos_conv_embed/conv)/weight_g", _WEIGHT + "0", "same"),
        (r"(.*/pos_conv_embed/conv)/weight_v", _WEIGHT + "1", "same"),
    ),
    aliases=(
        (r"^(wav2vec2|hubert)[./]", ""),
        (r"(pos_conv_embed[.]conv)[.]weight_g$", _WEIGHT + "0"),
        (r"(pos_conv_embed[.]conv)[.]weight_v$", _WEIGHT + "1"),
    ),
    optional=("masked_spec_embed",),
    ignored=(
        "masked_spec_embed",
        r"(lm_head|projector|classifier|quantizer|project_q|project_hid|tdnn|objective)[./].*",
        r"feature_extractor[./](weight|kernel|bias)",  # of Wav2Vec2ForXVector's head
    ),
    class_name="Wav2Vec2Model",
    heads={
        "ctc": ctc("Wav2Vec2ForCTC"),
        "classification": projected("Wav2Vec2ForSequenceClassification", "mean"),
    },
)
HUBERT = WAV2VEC2._replace(
    model_type="hubert",
    class_name="HubertModel",
    heads={
        "ctc": ctc("HubertForCTC"),
        "classification": projected("HubertForSequenceClassification", "mean"),
    },
)
