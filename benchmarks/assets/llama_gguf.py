"""A LLaMA from GGUF, the file of llama.cpp, to the layout of Hugging Face.

Blocks of 4 and 8 bits are multiplied out. They are stored as float16: their scales have that
precision in the file, and bfloat16 would round eight times more coarsely.

Reference: Touvron et al. 2023, arXiv:2302.13971.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.assets.tensors import write
from jtl.weights.files import Tensor

SOURCE = "model.gguf"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HALF = np.dtype(np.float16)
_CONTROL, _USER = 3, 4
_ENDS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def convert(fetched: Path, made: Path) -> None:
    """Write weights, config and tokenizer.

    Raises:
        ValueError: the file holds another architecture, or a tensor that LLaMA does not have.
    """
    from gguf import GGUFReader

    reader = GGUFReader(fetched / SOURCE)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(
            f"the GGUF file holds a {fields['general.architecture']!r}; converted is 'llama' only; "
            "give a file of that architecture"
        )
    tensors = {_name(tensor.name): tensor for tensor in reader.tensors}
    config = _config(fields, tied="lm_head.weight" not in tensors)
    # GGUF counts the sizes from the innermost.
    names = {
        name: Tensor(tuple(int(size) for size in reversed(tensor.shape)), _HALF)
        for name, tensor in tensors.items()
    }
    write(made / "model.safetensors", names, lambda name: _array(name, tensors[name], config))
    _write(made / "config.json", config)
    _write_tokenizer(fields, made)


def _name(name: str) -> str:
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if found is None or found[2] not in _NAMES:
        raise ValueError(
            f"no place is known for {name!r} of the GGUF file; known are {sorted(_NAMES)}; "
            "give a LLaMA without biases and experts"
        )
    block = "" if found[1] is None else f"model.layers.{found[1]}."
    return f"{block}{_NAMES[found[2]]}.weight"


def _array(name: str, tensor: Any, config: dict[str, Any]) -> np.ndarray:
    from gguf import dequantize

    array = dequantize(tensor.data, tensor.tensor_type).astype(_HALF)
    if "q_proj" in name:
        return unpermuted(array, config["num_attention_heads"])
    if "k_proj" in name:
        return unpermuted(array, config["num_key_value_heads"])
    return array


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return query or key rows in the order of Hugging Face.

    The rotation of positions turns pairs of rows: llama.cpp has the two of a pair side by side,
    Hugging Face half a head apart.

    >>> unpermuted(np.array([0, 2, 1, 3]), heads=1).tolist()
    [0, 1, 2, 3]
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # The file has it in float32: its shortest spelling is the number that was meant.
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": fields["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **{f"{end}_token_id": fields[f"tokenizer.ggml.{end}_token_id"] for end in ("bos", "eos")},
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _write_tokenizer(fields: dict[str, Any], made: Path) -> None:
    words = fields["tokenizer.ggml.tokens"]
    _tokenizer(fields).save(str(made / "tokenizer.json"))
    ends = {
        there: words[fields[f"tokenizer.ggml.{here}_token_id"]] for here, there in _ENDS.items()
    }
    stated = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **ends,
    }
    if "tokenizer.chat_template" in fields:
        stated["chat_template"] = fields["tokenizer.chat_template"]
    _write(made / "tokenizer_config.json", stated)


def _tokenizer(fields: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    stated = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if stated != ("gpt2", "smollm"):
        raise ValueError(
            f"the tokenizer is {stated[0]!r}, split as {stated[1]!r}; built here is 'gpt2', split "
            "as 'smollm'; give a file with that"
        )
    words, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer: Any = Tokenizer(models.BPE(vocab=numbers, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    named = list(zip(words, kinds, strict=True))
    special = [AddedToken(word, normalized=False) for word, kind in named if kind == _CONTROL]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word, k in named if k == _USER])
    return tokenizer


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
