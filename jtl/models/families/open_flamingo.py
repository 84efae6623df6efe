"""OpenFlamingo on LLaMA: a trained file on top of a language model and CLIP's image tower.

The published `checkpoint.pt` holds what was trained: the resampler, the gated cross-attentions and
the word embedding with its new tokens. The rest comes from the two models that it was trained on:

    checkpoint = openflamingo_checkpoint(file, language=folder, vision=folder)
    backbone = load_backbone(checkpoint)
    head = load_head(checkpoint, backbone, "causal_lm")

`load_openflamingo` does the first two and joins the inputs of both folders. The stages and names
are those of IDEFICS (`families/flamingo.py`); a word reads the last image before it, which
`<image>` in `input_ids` says, unless the batch has an `image_attention_mask`. Positions are counted
over padding too, as LLaMA does. The checkpoints on MPT are not read: jtl has no MPT.

Reference: Awadalla et al. 2023, arXiv:2308.01390; Alayrac et al. 2022, arXiv:2204.14198.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jtl.data.pairs import PairInputs
from jtl.data.text import TextInputs
from jtl.models import families
from jtl.models.backbone import Backbone, Family, PretrainedHead
from jtl.models.families.flamingo import (
    POOLINGS,
    RULES,
    Flamingo,
    FlamingoConfig,
    small_batch,
    stage_groups,
)
from jtl.models.families.open_flamingo_names import open_flamingo_names, open_flamingo_sizes
from jtl.models.heads.language import CausalLM
from jtl.models.inputs import load_inputs
from jtl.models.layers.clip_towers import vision_config
from jtl.models.layers.resampler import EPSILON
from jtl.models.load import Place, load_backbone
from jtl.models.stated import full_config, opened
from jtl.weights import Checkpoint, layouts, locate, read
from jtl.weights.rename import normalise

_DEFAULTS: dict[str, Any] = dict(
    cross_attn_every_n_layers=4,
    resampler_n_latents=64,
    resampler_depth=6,
    n_heads=8,  # of the resampler and of the cross-attentions: the published ones all have these
    head_dim=64,
    alpha_initializer="zeros",  # closed gates, or "ones"
)
_TOKENS = ("<|endofchunk|>", "<image>")


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with its defaults, both towers' among them."""
    lacking = [name for name in ("text_config", "vision_config") if name not in config]
    if lacking:
        raise ValueError(
            f"the config of openflamingo lacks {lacking}; it has {sorted(config)}: the published "
            "file holds the trained parts alone; give it with the folders of its language model "
            "and of CLIP to load_openflamingo"
        )
    _is_llama(config["text_config"].get("model_type", "llama"), "text_config")
    text = full_config(families.family("llama"), config["text_config"])
    vision = full_config(families.family("clip_vision_model"), config["vision_config"])
    words = text["vocab_size"]
    own = dict(vocab_size=words + 3, media_token_id=words + 1, head_vocab_size=words)
    own["tie_word_embeddings"] = bool(text.get("tie_word_embeddings"))
    return {**_DEFAULTS, **own, **config, "text_config": text, "vision_config": vision}


def _is_llama(model_type: Any, source: str) -> None:
    if model_type != "llama":
        raise ValueError(
            f"the language model of OpenFlamingo is {model_type!r} by {source}; read is LLaMA, "
            "and MPT is not built here; take OpenFlamingo-9B and the LLaMA that it stands on"
        )


def open_flamingo_config(config: Mapping[str, Any]) -> FlamingoConfig:
    """Return what the model reads, checked.

    Raises:
        ValueError: the language model is no LLaMA, a size is missing or does not fit, or no layer
            of the decoder has a cross-attention.
    """
    text_config = config["text_config"]
    _is_llama(text_config.get("model_type", "llama"), "text_config")
    text = families.family("llama").make(text_config, "last", jnp.float32).config
    every = int(config["cross_attn_every_n_layers"])
    if not 1 <= every <= text.num_hidden_layers:
        raise ValueError(
            f"cross_attn_every_n_layers is {every} and the decoder has {text.num_hidden_layers} "
            "layers, so that none has a cross-attention; give a number from 1 to that of layers"
        )
    heads = (("heads", int(config["n_heads"])), ("size", int(config["head_dim"])))
    return FlamingoConfig(
        vision=vision_config(config["vision_config"]),
        text=dataclasses.replace(text, vocab_size=int(config["vocab_size"])),
        resampler=(
            *heads,
            ("latents", int(config["resampler_n_latents"])),
            ("depth", int(config["resampler_depth"])),
            ("act", "gelu"),
        ),
        cross=(
            *heads,
            ("inner", 4 * text.hidden_size),
            ("act", "gelu"),
            ("gated", False),
            ("centred", True),
            ("start", {"zeros": 0.0, "ones": 1.0}[config["alpha_initializer"]]),
            ("epsilon", EPSILON),
        ),
        every=every,
        first=every - 1,
        whole=False,
        image_token=int(config["media_token_id"]),
        counted=False,
    )


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Flamingo:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is not known to openflamingo; give {POOLINGS}")
    return Flamingo(open_flamingo_config(config), pooling, dtype)


def _causal_lm(config: Mapping[str, Any], backbone: Any) -> CausalLM:
    tied = bool(config["tie_word_embeddings"])
    return CausalLM(config["vocab_size" if tied else "head_vocab_size"], tied)


def openflamingo_checkpoint(
    file: str | Path,
    *,
    language: str | Path,
    vision: str | Path,
    media_token_id: int | None = None,
) -> Checkpoint:
    """Return the trained file and the two models that it stands on as one checkpoint.

    What the file has stands for what the models have. How many layers lie between two
    cross-attentions is seen from its names.

    Args:
        file: `checkpoint.pt`, or a folder or hub id with that file alone.
        language: folder or hub id of the LLaMA.
        vision: folder or hub id of the CLIP, in any layout that jtl reads.
        media_token_id: which token stands for an image; None is the second one after the language
            model's own, since `<|endofchunk|>` and `<image>` were added in this order.

    Raises:
        ValueError: the language model is no LLaMA, the file is not OpenFlamingo's, or a part is of
            another layout than PyTorch's.
    """
    place = locate(str(language))
    _is_llama(read(place).config.get("model_type"), f"{str(place)!r}")
    words, llama, text = opened(language)
    images, clip, tower = opened(vision, family="clip_vision_model")
    words, images = _spelled(words, llama.aliases), _spelled(images, clip.aliases)
    images = layouts.renamed(images, [(r"(?!vision_model\.).*", None)])
    own = read(locate(str(file)), config={})
    sizes = open_flamingo_sizes(own)
    own = open_flamingo_names(own)
    owned = [(re.escape(name), None) for name in own.names]
    whole = layouts.united(layouts.renamed(words, owned), own, layouts.renamed(images, owned))
    rows = whole.names["embed_tokens.weight"].shape[0]
    head = whole.names.get("lm_head.weight")
    config = {
        "model_type": "openflamingo",
        "text_config": text,
        "vision_config": tower,
        "vocab_size": rows,
        "head_vocab_size": rows if head is None else head.shape[0],
        **sizes,
    }
    stated = {} if media_token_id is None else {"media_token_id": media_token_id}
    return whole._replace(config={**config, **stated})


def _spelled(checkpoint: Checkpoint, aliases: Sequence[tuple[str, str]]) -> Checkpoint:
    return layouts.renamed(checkpoint, [(".*", lambda match: normalise(match[0], aliases))])


def load_openflamingo(
    file: str | Path,
    *,
    language: str | Path,
    vision: str | Path,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    place: Place | None = None,
) -> Backbone:
    """Load OpenFlamingo with the tokenizer of its language model and CLIP's image processor.

    The tokenizer gets `<|endofchunk|>` and `<image>`; a text says by `<image>` where its image is.

    Args:
        file: as for `openflamingo_checkpoint`, like the two others.
        language: of the LLaMA.
        vision: of the CLIP.
        dtype: as for `load_backbone`, like the two others.
        param_dtype: in which the weights are kept.
        place: puts each leaf onto its devices.

    Raises:
        ValueError: as `openflamingo_checkpoint` and `load_backbone`.
    """
    checkpoint = openflamingo_checkpoint(file, language=language, vision=vision)
    made = load_backbone(checkpoint, dtype=dtype, param_dtype=param_dtype, place=place)
    text = load_inputs(checkpoint.folder, "text", made.config["text_config"])
    if isinstance(text, TextInputs):
        text.tokenizer.add_special_tokens({"additional_special_tokens": list(_TOKENS)})
    folder = locate(str(vision))
    images = load_inputs(folder, "image", made.config["vision_config"])
    return dataclasses.replace(made, inputs=PairInputs(text, images))


OPENFLAMINGO = Family(
    model_type="openflamingo",
    modality="image_text",
    make=_make,
    groups=lambda config, pooling: stage_groups(open_flamingo_config(config)),
    poolings=POOLINGS,
    dim=lambda config: config["text_config"]["hidden_size"],
    example=lambda config: small_batch(open_flamingo_config(config)),
    rules=RULES,
    ignored=(
        r".*rotary_emb[.]inv_freq",
        r"vision_model[.]embeddings[.]position_ids",
        r"lm_head[.].*",
    ),
    layout=lambda checkpoint, config: open_flamingo_names(checkpoint),
    prefix="",
    table="embed_tokens/embedding",
    heads={
        "causal_lm": PretrainedHead(
            "Flamingo", CausalLM, _causal_lm, (("kernel", "lm_head.weight", "dense"),)
        )
    },
    complete=_complete,
)
