r"""OpenFlamingo's own file in the terms of IDEFICS: names, and sizes that they tell.

    perceiver.layers.0.0.to_q.weight                   perceiver_resampler.blocks.0.0.q_proj.weight
    lang_encoder.gated_cross_attn_layers.3.attn_gate   gated_cross_attn_layers.0.alpha_cross_attn
    lang_encoder.model.embed_tokens.weight             embed_tokens.weight

A fused `to_kv` is cut into two. The file numbers cross-attentions by the layer that they stand
before, here they are counted.

Reference: Awadalla et al. 2023, arXiv:2308.01390.
"""

import re
from typing import Any

from jtl.weights import layouts
from jtl.weights.checkpoint import Checkpoint

_CROSS = r"lang_encoder\.gated_cross_attn_layers\.(\d+)\."
_RESAMPLER = r"perceiver\.layers\.(\d+)\."
_BLOCK = r"perceiver_resampler.blocks.\1"
_NAMES: tuple[tuple[str, Any], ...] = (
    (r"perceiver\.latents", "perceiver_resampler.latents"),
    (r"perceiver\.norm\.(.*)", r"perceiver_resampler.layer_norm.\1"),
    (rf"{_RESAMPLER}0\.norm_media\.(.*)", rf"{_BLOCK}.0.context_layer_norm.\2"),
    (rf"{_RESAMPLER}0\.norm_latents\.(.*)", rf"{_BLOCK}.0.latents_layer_norm.\2"),
    (rf"{_RESAMPLER}0\.to_([qkv])\.(.*)", rf"{_BLOCK}.0.\2_proj.\3"),
    (rf"{_RESAMPLER}0\.to_out\.(.*)", rf"{_BLOCK}.0.output_proj.\2"),
    (rf"{_RESAMPLER}1\.0\.(.*)", rf"{_BLOCK}.1.ln.\2"),
    (rf"{_RESAMPLER}1\.1\.(.*)", rf"{_BLOCK}.1.fc.\2"),
    (rf"{_RESAMPLER}1\.3\.(.*)", rf"{_BLOCK}.1.c_proj.\2"),
    # Frozen parts that a file may repeat come from their own checkpoints.
    (r"(lang_encoder\.old_decoder_blocks|vision_encoder)\..*", None),
    (r"lang_encoder\.model\.layers\.(\d+)\.decoder_layer\.(.*)", r"layers.\1.\2"),
    (r"lang_encoder\.model\.(.*)", r"\1"),
    (r"lang_encoder\.lm_head\.(.*)", r"lm_head.\1"),
)
_PARTS = (
    ("attn_gate", "alpha_cross_attn"),
    ("ff_gate", "alpha_dense"),
    ("attn.norm.", "input_layernorm."),
    ("attn.to_q.", "cross_attn.q_proj."),
    ("attn.to_k.", "cross_attn.k_proj."),
    ("attn.to_v.", "cross_attn.v_proj."),
    ("attn.to_out.", "cross_attn.o_proj."),
    ("ff.0.", "post_attention_layernorm."),
    ("ff.1.", "mlp.c_fc."),
    ("ff.3.", "mlp.c_proj."),
)


def open_flamingo_names(checkpoint: Checkpoint) -> Checkpoint:
    """Return the file under the names of IDEFICS; one that has them already stays as it is.

    Raises:
        ValueError: the cross-attentions do not stand before each n-th layer.
    """
    checkpoint = _listed(checkpoint)
    every = _interval(checkpoint)
    halves = (r"\1.to_k.weight", r"\1.to_v.weight")
    checkpoint = layouts.split(
        checkpoint, r"((?:perceiver|lang_encoder)\..*)\.to_kv\.weight", halves
    )

    def cross(match: re.Match[str]) -> str:
        rest = match[2]
        for theirs, ours in _PARTS:
            if rest.startswith(theirs):
                rest = ours + rest.removeprefix(theirs)
                break
        return f"gated_cross_attn_layers.{(int(match[1]) + 1) // every - 1}.{rest}"

    return layouts.renamed(checkpoint, [(f"{_CROSS}(.*)", cross), *_NAMES])


def open_flamingo_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Return what the names and shapes of the file tell of the config.

    Raises:
        ValueError: it has no resampler or no cross-attention, or these do not stand before each
            n-th layer.
    """
    checkpoint = _listed(checkpoint)
    depth = {m[1] for m in _matches(_RESAMPLER, checkpoint)}
    latents = checkpoint.names.get("perceiver.latents")
    if latents is None or not depth or not _matches(_CROSS, checkpoint):
        tops = sorted({name.split(".")[0] for name in checkpoint.names})
        raise ValueError(
            f"{str(checkpoint.folder)!r} has no 'perceiver' with latents and layers, or no "
            f"'lang_encoder.gated_cross_attn_layers'; its names begin with {tops[:12]}; give the "
            "checkpoint.pt of OpenFlamingo"
        )
    return {
        "cross_attn_every_n_layers": _interval(checkpoint),
        "resampler_n_latents": latents.shape[0],
        "resampler_depth": len(depth),
    }


def _listed(checkpoint: Checkpoint) -> Checkpoint:
    """Return the file with each cross-attention in the list of them, once.

    PyTorch's model has them there and below their layers, and files have either or both.
    """
    checkpoint = layouts.renamed(checkpoint, [(r"module\.(.*)", r"\1")])
    both = bool(_matches(_CROSS, checkpoint))
    there = None if both else r"lang_encoder.gated_cross_attn_layers.\1.\2"
    below = r"lang_encoder\.model\.layers\.(\d+)\.gated_cross_attn_layer\.(.*)"
    return layouts.renamed(checkpoint, [(below, there)])


def _interval(checkpoint: Checkpoint) -> int:
    """Return n where the cross-attentions stand before each n-th layer, 1 where there are none."""
    found = {int(m[1]) for m in _matches(_CROSS, checkpoint)}
    every = min(found, default=0) + 1
    if found and found != set(range(every - 1, max(found) + 1, every)):
        raise ValueError(
            f"{str(checkpoint.folder)!r} has gated cross-attentions before the layers "
            f"{sorted(found)}, which are not each n-th one; OpenFlamingo's are; give its file"
        )
    return every


def _matches(pattern: str, checkpoint: Checkpoint) -> list[re.Match[str]]:
    found = (re.match(pattern, name) for name in checkpoint.names)
    return [match for match in found if match]
