"""Whisper from CTranslate2's binary to the layout of Hugging Face.

Reference: Radford et al. 2022, arXiv:2212.04356.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.assets import ctranslate2
from benchmarks.assets.tensors import write
from jtl.weights.files import Tensor

SOURCES = ("model.bin", "config.json", "tokenizer.json")
FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json"),
)
_ATTENTION = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "ffn/layer_norm": ("final_layer_norm",),
}
_WHOLE = {
    "conv1": "conv1",
    "conv2": "conv2",
    "embeddings": "embed_tokens",
    "layer_norm": "layer_norm",
    "position_encodings": "embed_positions",
}
_LEAVES = {
    "weight": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "encodings": "weight",
}
# What CTranslate2 states about the architecture: the values that Whisper has.
_STATED = {
    "activation": 3,
    "alibi": 0,
    "pre_norm": 1,
    "scale_embeddings": 0,
    "start_from_zero_embedding": 0,
}
_SIZES = ("num_heads", "alignment_heads", "alignment_layer")


def convert(fetched: Path, made: Path) -> None:
    """Write weights, configs and tokenizer; float16 as they are stored."""
    binary = ctranslate2.read(fetched / "model.bin")
    pieces = _pieces(binary)
    stated = json.loads((fetched / "config.json").read_text())
    tokens = _special_tokens(fetched / "tokenizer.json")

    def get(name: str) -> np.ndarray:
        source, part, parts = pieces[name]
        return np.split(binary.get(source), parts)[part]

    names = {name: _shape(binary, *piece) for name, piece in pieces.items()}
    write(made / "model.safetensors", names, get)
    os.replace(fetched / "tokenizer.json", made / "tokenizer.json")
    config = _config(binary, tokens, stated)
    for file, value in {
        "config.json": config,
        "generation_config.json": _generation(config, tokens, stated),
        "preprocessor_config.json": _preprocessing(config),
        "tokenizer_config.json": _TOKENIZER,
    }.items():
        (made / file).write_text(json.dumps(value, indent=2) + "\n")


def _pieces(binary: ctranslate2.Binary) -> dict[str, tuple[str, int, int]]:
    """Return {name there: (name here, which part, of how many)}; nothing is dropped unseen."""
    if binary.architecture != "WhisperSpec":
        raise ValueError(
            f"the model is a {binary.architecture} of CTranslate2; converted are WhisperSpec only; "
            "give a Whisper"
        )
    pieces = {}
    for name in binary.names:
        targets = _targets(binary, name)
        pieces |= {target: (name, part, len(targets)) for part, target in enumerate(targets)}
    # Keys have no bias in Whisper: CTranslate2 fills that part with zeros.
    for target in [target for target in pieces if target.endswith("k_proj.bias")]:
        source, part, parts = pieces.pop(target)
        if np.split(binary.get(source), parts)[part].any():
            raise ValueError(
                f"{source!r} has a bias for keys, which Whisper does not have; give a model that "
                "was converted from a Whisper"
            )
    return pieces


def _targets(binary: ctranslate2.Binary, name: str) -> list[str]:
    side, _, rest = name.partition("/")
    if rest in _SIZES:
        return []
    if rest in _STATED and int(binary.get(name)) == _STATED[rest]:
        return []
    inner, _, leaf = rest.rpartition("/")
    block = re.fullmatch(r"layer_(\d+)/(.+)", inner)
    if leaf in _LEAVES and block and block[2] in _ATTENTION:
        inside = f"model.{side}.layers.{block[1]}"
        return [f"{inside}.{target}.{_LEAVES[leaf]}" for target in _ATTENTION[block[2]]]
    if leaf in _LEAVES and inner in _WHOLE:
        return [f"model.{side}.{_WHOLE[inner]}.{_LEAVES[leaf]}"]
    raise ValueError(
        f"no place is known for {name!r} of shape {binary.names[name].shape}, or its value is no "
        "Whisper's; give a Whisper that was converted by CTranslate2 3 or 4"
    )


def _shape(binary: ctranslate2.Binary, source: str, part: int, parts: int) -> Tensor:
    shape, dtype = binary.names[source]
    return Tensor((shape[0] // parts, *shape[1:]), dtype)


def _special_tokens(tokenizer: Path) -> dict[str, int]:
    added = json.loads(tokenizer.read_text(encoding="utf-8"))["added_tokens"]
    return {token["content"].strip("<|>"): token["id"] for token in added}


def _config(
    binary: ctranslate2.Binary, tokens: dict[str, int], stated: dict[str, Any]
) -> dict[str, Any]:
    def shape(name: str) -> tuple[int, ...]:
        return binary.names[name].shape

    config: dict[str, Any] = {"model_type": "whisper", "dtype": "float16"}
    config["architectures"] = ["WhisperForConditionalGeneration"]
    config["vocab_size"], config["d_model"] = shape("decoder/embeddings/weight")
    config["num_mel_bins"] = shape("encoder/conv1/weight")[1]
    config["max_source_positions"] = shape("encoder/position_encodings/encodings")[0]
    config["max_target_positions"] = shape("decoder/position_encodings/encodings")[0]
    for side in ("encoder", "decoder"):
        blocks = [name for name in binary.names if name.startswith(f"{side}/layer_")]
        numbers = [re.match(r"\w+/layer_(\d+)/", name) for name in blocks]
        config[f"{side}_layers"] = 1 + max(int(found[1]) for found in numbers if found)
        config[f"{side}_attention_heads"] = int(binary.get(f"{side}/num_heads"))
        config[f"{side}_ffn_dim"] = shape(f"{side}/layer_0/ffn/linear_0/weight")[0]
    config["activation_function"], config["scale_embedding"] = "gelu", False
    config |= _ends(tokens)
    config["suppress_tokens"] = stated["suppress_ids"]
    config["begin_suppress_tokens"] = stated["suppress_ids_begin"]
    return config


def _ends(tokens: dict[str, int]) -> dict[str, int]:
    end = tokens["endoftext"]
    return {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": tokens["startoftranscript"],
    }


def _generation(
    config: dict[str, Any], tokens: dict[str, int], stated: dict[str, Any]
) -> dict[str, Any]:
    languages = {f"<|{name}|>": number for name, number in tokens.items() if len(name) <= 3}
    # The English models have the tokens of languages and tasks too, and do not use them.
    several = config["vocab_size"] > 51_864
    return {
        **_ends(tokens),
        "max_length": config["max_target_positions"],
        "suppress_tokens": config["suppress_tokens"],
        "begin_suppress_tokens": config["begin_suppress_tokens"],
        "no_timestamps_token_id": tokens["notimestamps"],
        "prev_sot_token_id": tokens["startofprev"],
        "max_initial_timestamp_index": 50,
        "return_timestamps": False,
        "alignment_heads": stated["alignment_heads"],
        "is_multilingual": several,
        **({"lang_to_id": languages, "task_to_id": _tasks(tokens)} if several else {}),
    }


def _tasks(tokens: dict[str, int]) -> dict[str, int]:
    return {task: tokens[task] for task in ("transcribe", "translate")}


def _preprocessing(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": config["num_mel_bins"],
        "sampling_rate": 16_000,
        "n_fft": 400,
        "hop_length": 160,
        "chunk_length": 30,
        "n_samples": 480_000,
        "nb_max_frames": 3_000,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


_TOKENIZER = {
    "tokenizer_class": "WhisperTokenizer",
    "processor_class": "WhisperProcessor",
    "model_max_length": 1024,
    "errors": "replace",
    "add_prefix_space": False,
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
