"""Qwen2, which has biases in attention, and Qwen3, which normalises queries and keys.

Both may have blocks in which a query sees the last keys alone.

Reference: Yang et al. 2024, arXiv:2407.10671 (Qwen2); Yang et al. 2025, arXiv:2505.09388 (Qwen3).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jtl.models.families.llama import DecoderConfig, decoder_config, decoder_family


def layer_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the window of each block from `layer_types`, `sliding_window`, `use_sliding_window`.

    Raises:
        ValueError: the kinds are not as many as the blocks, or one is not known.

    >>> kinds = ["full_attention", "sliding_attention"]
    >>> layer_windows(dict(num_hidden_layers=2, layer_types=kinds, sliding_window=8))
    (None, 8)
    """
    kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    known = {"full_attention": None, "sliding_attention": window}
    wrong = set(kinds) - set(known)
    unset = window is None and "sliding_attention" in kinds
    if wrong or unset or len(kinds) != config["num_hidden_layers"]:
        raise ValueError(
            f"layer_types is {kinds} and the window {window}, of {config['num_hidden_layers']} "
            f"blocks; each block has one of {sorted(known)}, the latter with a window; "
            "correct layer_types, sliding_window or use_sliding_window in config.json"
        )
    return tuple(known[kind] for kind in kinds)


def _qwen2(config: Mapping[str, Any]) -> DecoderConfig:
    made = decoder_config(config, windows=layer_windows(config))
    return dataclasses.replace(made, query_bias=True)


def _qwen3(config: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(config.get("attention_bias"))
    made = decoder_config(config, windows=layer_windows(config))
    return dataclasses.replace(made, query_bias=bias, output_bias=bias, query_norm=True)


QWEN2 = decoder_family("qwen2", "Qwen2", _qwen2)
QWEN3 = decoder_family("qwen3", "Qwen3", _qwen3)
