"""StarCoder2: LLaMA's decoder with LayerNorm, biases, a plain feed-forward layer and dropout.

The first StarCoder is GPT-BigCode (`gpt.py`).

Reference: Lozhkov et al. 2024, arXiv:2402.19173.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jtl.models.families.llama import DecoderConfig, decoder_config, decoder_family


def _starcoder2(config: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(config.get("use_bias", True))
    windows = [config.get("sliding_window")] * int(config["num_hidden_layers"])
    made = decoder_config(config, windows=windows, epsilon="norm_epsilon")
    made = dataclasses.replace(made, query_bias=bias, output_bias=bias, mlp_bias=bias)
    return dataclasses.replace(made, gated=False, centred=True)


STARCODER2 = decoder_family("starcoder2", "Starcoder2", _starcoder2, spans=None)
