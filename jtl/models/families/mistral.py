"""Mistral: LLaMA's decoder in which every query sees the last keys alone.

Reference: Jiang et al. 2023, arXiv:2310.06825.
"""

from collections.abc import Mapping
from typing import Any

from jtl.models.families.llama import DecoderConfig, decoder_config, decoder_family


def _mistral(config: Mapping[str, Any]) -> DecoderConfig:
    windows = [config.get("sliding_window")] * int(config["num_hidden_layers"])
    return decoder_config(config, windows=windows)


MISTRAL = decoder_family("mistral", "Mistral", _mistral, spans="model")
