"""LLaVA 1.5: CLIP's image tower, a projector, and a decoder that reads patches as if words.

Stages: "stem" is the embeddings of patches and of words, then a block for each layer of the image
tower that is read (`vision_feature_layer`), one block for the projector, which also puts the
patches in the places of the image's tokens, then a block for each layer of the decoder; "top" is
the decoder's last norm. The layers of the tower that nothing reads are "unused". Names are those of
the published files; the decoder's own are those of its family (LLaMA, Mistral).

A batch has `input_ids` with a token for each patch, as `backbone.inputs(texts=, images=)` makes
them, and `pixel_values` with an image for each row; a row without image tokens does not read its
image. A batch of texts alone has no `pixel_values`; the image tower then does not run.

Reference: Liu et al. 2023, arXiv:2304.08485 and arXiv:2310.03744.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl.models import families
from jtl.models.backbone import UNUSED, Batch, Family, Out, PretrainedHead, Rules, run_stages
from jtl.models.families.llama import POOLINGS, Decoder, DecoderConfig
from jtl.models.heads.language import CausalLM
from jtl.models.layers import activation, flat_dot, two_towers
from jtl.models.layers.clip_towers import ClipVisionConfig, ClipVisionTower, vision_config


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """What the model reads of `config.json`.

    Attributes:
        vision: sizes of the image tower.
        text: sizes of the decoder.
        layers: how many layers of the image tower are read.
        whole: whether the token of the whole image is read beside those of its patches.
        image_token: which token stands for a patch.
        act: activation of the projector.
        bias: whether the projector has one.
    """

    vision: ClipVisionConfig
    text: DecoderConfig
    layers: int
    whole: bool = False
    image_token: int = 32000
    act: str = "gelu"
    bias: bool = True


def llava_config(config: Mapping[str, Any]) -> LlavaConfig:
    """Return what the model reads, checked.

    Raises:
        ValueError: a tower is of another kind than CLIP's or LLaMA's, or the layer of the image
            tower that is read does not exist or is not one alone.
    """
    text, vision = config["text_config"], config["vision_config"]
    row = families.family(text.get("model_type", "llama"), "text_config")
    language = row.make(text, row.poolings[0], jnp.float32)
    kind = vision.get("model_type", "clip_vision_model")
    if not isinstance(language, Decoder) or kind != "clip_vision_model":
        raise ValueError(
            f"the LLaVA config has a decoder {text.get('model_type')!r} and an image tower "
            f"{kind!r}; read are LLaMA's kind and CLIP's tower; take a checkpoint of these"
        )
    tower = vision_config(vision)
    stated = config.get("vision_feature_layer", -2)
    one = stated[0] if isinstance(stated, list | tuple) and len(stated) == 1 else stated
    depth = tower.num_hidden_layers
    if not isinstance(one, int) or not -depth - 1 <= one <= depth:
        raise ValueError(
            f"vision_feature_layer is {stated}; the image tower has {depth} layers, of which one "
            f"is read; give a number of -{depth + 1} to {depth}"
        )
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise ValueError(
            f"vision_feature_select_strategy is {strategy!r}; there are 'default', which leaves "
            "the token of the whole image out, and 'full'; give one of them"
        )
    act = config.get("projector_hidden_act", "gelu")
    activation(act)
    return LlavaConfig(
        tower,
        language.config,
        one if one >= 0 else depth + 1 + one,
        strategy == "full",
        config.get("image_token_index", config.get("image_token_id", 32000)),
        act,
        bool(config.get("multimodal_projector_bias", True)),
    )


class _Projector(nn.Module):
    """Two dense layers with an activation between, from the tower's width to the decoder's."""

    config: LlavaConfig
    dtype: Any

    def setup(self) -> None:
        config, width = self.config, self.config.text.hidden_size
        init = nn.initializers.normal(config.text.initializer_range)
        options = dict(dtype=self.dtype, kernel_init=init, dot_general=flat_dot)
        self.linear_1 = nn.Dense(width, use_bias=config.bias, **options)
        self.linear_2 = nn.Dense(width, use_bias=config.bias, **options)

    def __call__(self, patches: jax.Array) -> jax.Array:
        return self.linear_2(activation(self.config.act)(self.linear_1(patches)))


def merged(words: jax.Array, patches: jax.Array, places: jax.Array) -> jax.Array:
    """Return the words with the patches of each row put at its places, in their order.

    Args:
        words: (n, length, dim).
        patches: (n, patches, dim).
        places: True where a patch belongs (n, length).

    >>> words, patches = jnp.zeros((1, 4, 1)), jnp.array([[[1.0], [2.0]]])
    >>> merged(words, patches, jnp.array([[False, True, True, False]])).ravel().tolist()
    [0.0, 1.0, 2.0, 0.0]
    """
    order = jnp.clip(jnp.cumsum(places, axis=1) - 1, 0, patches.shape[1] - 1)
    chosen = jnp.take_along_axis(patches, order[:, :, None], axis=1)
    return jnp.where(places[:, :, None], chosen, words)


class Llava(nn.Module):
    """LLaVA in stages; see `models/backbone.py` for the contract.

    Attributes:
        config: sizes of the towers and what joins them.
        pooling: what `out["pooled"]` is: "last" (the last real token) or "mean" (over
            `attention_mask`).
        dtype: of the computation; parameters are float32.
    """

    config: LlavaConfig
    pooling: str = "last"
    dtype: Any = jnp.float32

    beside = ("attention_mask", "input_ids", "position_ids")

    def setup(self) -> None:
        """Declare the two towers and the projector."""
        self.vision_tower = ClipVisionTower(self.config.vision, self.dtype)
        self.multi_modal_projector = _Projector(self.config, self.dtype)
        self.language_model = Decoder(self.config.text, self.pooling, self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config.layers + 1 + self.config.text.num_hidden_layers

    def stem(self, batch: Batch, live: bool = False) -> jax.Array:
        """Return the embeddings of patches and words (n, 1 + patches + length, dim)."""
        words = self.language_model.stem(batch, live)
        has_images = "pixel_values" in batch
        return two_towers.joint(self.vision_tower.stem(batch) if has_images else None, words)

    def block(self, index: int, hidden: jax.Array, batch: Batch, live: bool = False) -> jax.Array:
        """Return the output of a layer of the image tower, of the projector, or of the decoder."""
        before = self.config.layers
        if index > before:
            return self.language_model.block(index - before - 1, hidden, batch, live)
        widths = (self.config.vision.hidden_size, self.config.text.hidden_size)
        images, words = two_towers.streams(hidden, batch, widths)
        if images is None:
            return hidden
        if index == before:
            return self._merged(images, words, batch)
        return two_towers.joint(self.vision_tower.layer(index, images, batch, live), words)

    def _merged(self, images: jax.Array, words: Any, batch: Batch) -> jax.Array:
        if self.is_initializing():  # what is stored and not read
            last = images
            for layer in range(self.config.layers, self.vision_tower.depth):
                last = self.vision_tower.layer(layer, last, batch, False)
            self.vision_tower.pooled(last)
        read = images if self.config.whole else images[:, 1:]
        places = jnp.asarray(batch["input_ids"]) == self.config.image_token
        return merged(words, self.multi_modal_projector(read), places)

    def top(self, hidden: jax.Array, batch: Batch, live: bool = False) -> Out:
        """Return "tokens", after the last norm, and "pooled"."""
        return self.language_model.top(hidden, batch, live)

    def __call__(
        self, batch: Batch, live: frozenset[str] = frozenset(), stop: int | None = None
    ) -> Any:
        """Run the stages; see `run_stages`."""
        return run_stages(self, batch, live, stop)


def _make(config: Mapping[str, Any], pooling: str, dtype: Any = jnp.float32) -> Llava:
    return Llava(llava_config(config), pooling, dtype)


def _groups(config: Mapping[str, Any], pooling: str) -> Rules:
    made = llava_config(config)
    tower, depth = "vision_tower/encoder/layers", made.vision.num_hidden_layers
    first = made.layers + 1
    return (
        (r"(vision_tower/(embeddings|pre_layrnorm)|language_model/embed_tokens)/.*", "stem"),
        *((f"{tower}/{i}/.*", f"block_{i}") for i in range(made.layers)),
        (r"multi_modal_projector/.*", f"block_{made.layers}"),
        *(
            (f"language_model/layers/{i}/.*", f"block_{first + i}")
            for i in range(made.text.num_hidden_layers)
        ),
        ("language_model/norm/.*", "top"),
        *((f"{tower}/{i}/.*", UNUSED) for i in range(made.layers, depth)),
        ("vision_tower/post_layernorm/.*", UNUSED),
    )


def _example(config: Mapping[str, Any]) -> dict[str, jax.Array]:
    made = llava_config(config)
    side, channels = made.vision.image_size, made.vision.num_channels
    patches = made.vision.positions - (not made.whole)
    ids = jnp.concatenate([jnp.full((1, patches), made.image_token), jnp.zeros((1, 2))], axis=1)
    ids = ids.astype(jnp.int32)
    images = jnp.zeros((1, side, side, channels))
    return {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "pixel_values": images}


def _causal_lm(config: Mapping[str, Any], backbone: Any) -> CausalLM:
    tied = bool(config.get("tie_word_embeddings", False))
    return CausalLM(vocabulary=config["text_config"]["vocab_size"], tied=tied)


LLAVA = Family(
    model_type="llava",
    modality="image_text",
    make=_make,
    groups=_groups,
    poolings=POOLINGS,
    dim=lambda config: config["text_config"]["hidden_size"],
    example=_example,
    rules=(
        (
            r"vision_tower/(embeddings/patch_embedding)/kernel",
            r"vision_tower.vision_model.\1.weight",
            "conv",
        ),
        (r"vision_tower/(.*)/kernel", r"vision_tower.vision_model.\1.weight", "dense"),
        (r"vision_tower/(.*)/(?:scale|embedding)", r"vision_tower.vision_model.\1.weight", "same"),
        (r"vision_tower/(.*)", r"vision_tower.vision_model.\1", "same"),
        (r"language_model/(.*)/kernel", r"language_model.model.\1.weight", "dense"),
        (r"language_model/(.*)/(?:scale|embedding)", r"language_model.model.\1.weight", "same"),
        (r"language_model/(.*)", r"language_model.model.\1", "same"),
    ),
    aliases=(
        (r"^model[.]", ""),
        (r"^lm_head[.]", "language_model.lm_head."),
        (r"^vision_tower[.](?!vision_model[.])", "vision_tower.vision_model."),
        (r"^language_model[.](?!model[.]|lm_head[.])", "language_model.model."),
    ),
    ignored=(r"language_model[.]lm_head[.].*", r".*rotary_emb[.]inv_freq"),
    class_name="LlavaModel",
    prefix="",
    table="language_model/embed_tokens/embedding",
    heads={
        "causal_lm": PretrainedHead(
            "LlavaForConditionalGeneration",
            CausalLM,
            _causal_lm,
            (("kernel", "language_model.lm_head.weight", "dense"),),
        )
    },
)
