"""Qwen2, which has biases in attention, and Qwen3, which normalises queries and keys.

Both may have blocks in which a query sees the last keys alone.

Reference: Yang et al. 2024, arXiv:2407.10671 (Qwen2); Yang et al. 2025, arXiv:2505.09388 (Qwen3).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jtl.models.families.llama import (
    DecoderConfig,
    decoder_config,
    decoder_family,
    layer_windows,
)


def _qwen2(config: Mapping[str, Any]) -> DecoderConfig:
    made = decoder_config(config, windows=layer_windows(config))
    return dataclasses.replace(made, query_bias=True)


def _qwen3(config: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(config.get("attention_bias"))
    made = decoder_config(config, windows=layer_windows(config))
    return dataclasses.replace(made, query_bias=bias, output_bias=bias, query_norm=True)


QWEN2 = decoder_family("qwen2", "Qwen2", _qwen2)
QWEN3 = decoder_family("qwen3", "Qwen3", _qwen3)
