"""A tiny config of every family in the table, and batches for it: what contract tests run on."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtl.models.load import new_backbone

ROWS = 3
_TEXT = dict(
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
    initializer_range=0.3,
)
_GPT = dict(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=16, initializer_range=0.3)
_GROUPED = dict(_TEXT, num_key_value_heads=1)
_DISTIL = dict(
    vocab_size=31,
    dim=16,
    n_layers=2,
    n_heads=2,
    hidden_dim=24,
    max_position_embeddings=16,
    initializer_range=0.3,
)
_PATCHES = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=8,
    patch_size=4,
    initializer_range=0.3,
)
_CELLVIT = dict(
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    mlp_ratio=1.5,
    image_size=32,
    extract_layers=[1, 2, 3, 4],
    initializer_range=0.3,
)
# The tests' tokens are 3 to 30: the largest one ends a text.
_CLIP_TEXT = dict(_TEXT, hidden_size=12, num_hidden_layers=1, eos_token_id=2)
_DEBERTA = dict(
    _TEXT,
    relative_attention=True,
    pos_att_type="p2c|c2p",
    position_buckets=4,
    share_att_key=True,
    norm_rel_ebd="layer_norm",
    position_biased_input=False,
    conv_kernel_size=3,
)
_DINOV2 = {**_PATCHES, "mlp_ratio": 2, "intermediate_size": None}

_CONVNEXT = dict(hidden_sizes=[8, 16], depths=[1, 1], layer_scale_init_value=1.0)
_EFFICIENTNET = dict(
    width_coefficient=0.0125,
    depth_coefficient=1.0,
    hidden_dim=16,
    kernel_sizes=[3, 5],
    in_channels=[640, 640],
    out_channels=[640, 640],
    strides=[1, 2],
    num_block_repeats=[1, 2],
    expand_ratios=[1, 2],
    drop_connect_rate=0.0,
)

# A layer that LayerDrop leaves out has no gradient, so there is none.
_SPEECH = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    conv_dim=[8, 8],
    conv_kernel=[10, 3],
    conv_stride=[5, 2],
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    layerdrop=0.0,
    initializer_range=0.3,
)
_SIGLIP_TEXT = dict(_TEXT, num_hidden_layers=1, projection_size=16)
_SAM = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    mlp_ratio=1.5,
    image_size=12,
    patch_size=4,
    output_channels=8,
    window_size=2,
    global_attn_indexes=[1],
    initializer_range=0.3,
)
_SATELLITE = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    mlp_ratio=2.0,
    image_size=8,
    patch_size=4,
    num_frames=2,
    initializer_range=0.3,
)
_T5 = dict(
    vocab_size=31,
    d_model=16,
    d_kv=4,
    d_ff=24,
    num_layers=2,
    num_decoder_layers=1,
    num_heads=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
)
_MEDCLIP = dict(
    vision_config=dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    text_config=_TEXT,
    image_size=32,
    projection_dim=8,
)
_IDEFICS = dict(
    {name: value for name, value in _TEXT.items() if name != "max_position_embeddings"},
    additional_vocab_size=2,
    cross_layer_interval=2,
    vision_config=dict(
        embed_dim=12,
        intermediate_size=20,
        image_size=8,
        patch_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
    ),
    perceiver_config=dict(
        resampler_n_latents=3,
        resampler_depth=1,
        resampler_n_heads=2,
        resampler_head_dim=4,
    ),
    use_resampler=True,
    alpha_initializer="ones",  # through a closed gate no gradient reaches the images
)
_OPENFLAMINGO = dict(
    vision_config=dict(_PATCHES, model_type="clip_vision_model", num_hidden_layers=1),
    text_config=dict(_TEXT, model_type="llama", hidden_size=12),
    cross_attn_every_n_layers=2,
    resampler_n_latents=3,
    resampler_depth=1,
    n_heads=2,
    head_dim=4,
    alpha_initializer="ones",
)
_LLAVA = dict(
    vision_config=dict(_PATCHES, model_type="clip_vision_model"),
    text_config=dict(_TEXT, model_type="llama", hidden_size=12),
    image_token_index=2,
)


def _llava_batch(config: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Texts with an image of four patches; the first row is padded."""
    ids = rng.integers(3, 31, (ROWS, 7)).astype(np.int32)
    ids[:, 1:5] = config["image_token_index"]
    mask = np.ones((ROWS, 7), np.int32)
    mask[0, -1] = 0
    images = rng.normal(size=(ROWS, 8, 8, 3)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": images}


_SWIN = dict(
    embed_dim=8,
    depths=[2, 1],
    num_heads=[1, 2],
    window_size=2,
    patch_size=2,
    image_size=12,
    initializer_range=0.3,
)
_WHISPER = dict(
    vocab_size=31,
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    num_mel_bins=4,
    max_source_positions=6,
    max_target_positions=8,
    init_std=0.3,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    decoder_start_token_id=1,
)


class Case(NamedTuple):
    """A family's tiny config.

    Attributes:
        config: fields of its `config.json`; every dropout as the family has it.
        batch: `(config, rng) -> batch` of ROWS rows; None draws one after the family's example.
    """

    config: Mapping[str, Any]
    batch: Callable[[Mapping[str, Any], np.random.Generator], dict[str, Any]] | None = None


# {model_type: case}, in the order of the alphabet.
CASES: dict[str, Case] = {
    "bert": Case(_TEXT),
    "biovil_image": Case(
        dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], projection_size=6)
    ),
    "camembert": Case(_TEXT),
    "cellvit": Case(_CELLVIT),
    "cellvit_sam": Case(
        {**_CELLVIT, "output_channels": 8, "window_size": 2, "global_attn_indexes": [1, 3]}
    ),
    "clip": Case(dict(text_config=_CLIP_TEXT, vision_config=_PATCHES, projection_dim=8)),
    "clip_text_model": Case(_CLIP_TEXT),
    "clip_vision_model": Case(_PATCHES),
    "convnext": Case(_CONVNEXT),
    "convnextv2": Case(_CONVNEXT),
    "cxr-bert": Case(dict(_TEXT, projection_size=6)),
    "deberta-v2": Case(_DEBERTA),
    "deit": Case(_PATCHES),
    "dinov2": Case({**_DINOV2, "use_swiglu_ffn": True}),
    "dinov2_with_registers": Case({**_DINOV2, "num_register_tokens": 2}),
    "distilbert": Case(_DISTIL),
    "electra": Case(dict(_TEXT, embedding_size=8)),
    "efficientnet": Case(_EFFICIENTNET),
    "efficientnet_lite": Case(dict(_EFFICIENTNET, variant="lite0", hidden_dim=1280)),
    "gpt2": Case(_GPT),
    "gpt_bigcode": Case(_GPT),
    "hubert": Case(_SPEECH),
    "idefics": Case(_IDEFICS),
    "llama": Case(_GROUPED),
    "llava": Case(_LLAVA, _llava_batch),
    "medclip": Case(_MEDCLIP),
    "mistral": Case(dict(_GROUPED, sliding_window=2)),
    "mlp": Case(dict(image_size=6, hidden_sizes=[16, 16, 8])),
    "mpnet": Case(dict(_TEXT, max_position_embeddings=18)),
    "openflamingo": Case(_OPENFLAMINGO),
    "prithvi": Case(
        {**_SATELLITE, "patch_size": [1, 4, 4], "coords_encoding": ["time", "location"]}
        | {"num_channels": 6, "coords_scale_learn": True}
    ),
    "mt5": Case(_T5),
    "qwen2": Case(_GROUPED),
    "qwen3": Case(dict(_GROUPED, head_dim=8)),
    "resnet": Case(dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
    "roberta": Case(_TEXT),
    "sam_vision_model": Case(_SAM),
    "satmae": Case(
        {**_SATELLITE, "num_channels": 4, "channel_groups": [[0, 2], [3]], "channel_embed": 4}
    ),
    "satmae_temporal": Case({**_SATELLITE, "hidden_size": 32, "time_embed": 12}),
    "siglip": Case(dict(text_config=_SIGLIP_TEXT, vision_config=_PATCHES)),
    "siglip_text_model": Case(_SIGLIP_TEXT),
    "siglip_vision_model": Case(_PATCHES),
    "starcoder2": Case(_GROUPED),
    "swin": Case(_SWIN),
    "t5": Case(_T5),
    "t5_encoder": Case(_T5),
    "vit": Case(_PATCHES),
    "vit_mae": Case(_PATCHES),
    "wav2vec2": Case(dict(_SPEECH, feat_extract_norm="layer", do_stable_layer_norm=True)),
    "whisper": Case(_WHISPER),
    "whisper_encoder": Case(_WHISPER),
    "xlm-roberta": Case(_TEXT),
}


@functools.cache
def backbone(model_type: str, pooling: str | None = None) -> Any:
    """A backbone of random weights of the family's tiny config."""
    config = CASES[model_type].config
    return new_backbone(model_type, config, key=jax.random.key(0), pooling=pooling)


def batch_of(made: Any, seed: int = 0) -> dict[str, jax.Array]:
    """ROWS random rows for a backbone; the first row is padded where there is an attention mask."""
    rng = np.random.default_rng(seed)
    own = CASES[made.family.model_type].batch
    if own is not None:
        return {name: jnp.asarray(value) for name, value in own(made.config, rng).items()}
    batch = {}
    for name, example in made.family.example(made.config).items():
        shape = (ROWS, *example.shape[1:])
        if name.endswith("attention_mask"):
            batch[name] = jnp.ones(shape, jnp.int32).at[0, -1].set(0)
        elif name == "token_type_ids":
            batch[name] = jnp.zeros(shape, jnp.int32)
        elif jnp.issubdtype(example.dtype, jnp.integer):
            batch[name] = jnp.asarray(rng.integers(3, 31, shape), jnp.int32)
        else:
            batch[name] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return batch
