"""A LLaMA in GGUF by hand: blocks of four bits, the order of rotated rows, the tokenizer."""

import struct

import gguf
import numpy as np
import pytest

from benchmarks.assets import llama_gguf
from jtl.data.text import load_text_inputs
from jtl.weights.files import read, read_safetensors

HIDDEN, HEADS = 32, 2
WORDS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "a",
    "b",
    "Ġ",
    "1",
    "2",
    "ab",
    "<user>",
    "12",
)


@pytest.fixture
def folders(tmp_path):
    """The folder of what was fetched, and that of the asset."""
    fetched, made = tmp_path / "fetched", tmp_path / "made"
    fetched.mkdir()
    made.mkdir()
    return fetched, made


def _blocks(scale, least, nibbles):
    """Q4_1: float16 scale and least, then 32 numbers of 4 bits: 0 to 15 low, 16 to 31 high."""
    low, high = np.asarray(nibbles, np.uint8).reshape(2, 16)
    return [*struct.pack("<ee", scale, least), *(low | high << 4).tolist()]


def _write_gguf(folder, *, extra=None, split="smollm", architecture="llama"):
    path = folder / llama_gguf.SOURCE
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1, 1, 4, 1])
    writer.add_token_merges(["a b", "1 2"])
    for number, end in enumerate(("unk", "bos", "eos", "pad")):
        getattr(writer, f"add_{end}_token_id")((0, 1, 2, 2)[number])
    rows = np.array([_blocks(0.0, row, [0] * 32) for row in range(HIDDEN)], np.uint8)
    ramp = _blocks(0.5, -1.0, [*range(16), *reversed(range(16))])
    four_bits = {"attn_q": rows, "attn_k": rows[:16], "ffn_down": np.array([ramp] * HIDDEN)}
    random = np.random.default_rng(0)
    for name, array in four_bits.items():
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"blk.0.{name}.weight", array.astype(np.uint8), raw_dtype=kind)
    whole = {"attn_v": (16, 32), "attn_output": (32, 32), "ffn_gate": (32, 32), "ffn_up": (32, 32)}
    whole |= {"attn_norm": (32,), "ffn_norm": (32,)}
    whole = {f"blk.0.{name}": shape for name, shape in whole.items()}
    whole |= {"token_embd": (len(WORDS), 32), "output_norm": (32,), **(extra or {})}
    for name, shape in whole.items():
        array = random.standard_normal(shape).astype(np.float16).astype(np.float32)
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_blocks_of_four_bits_are_multiplied_out(folders):
    _write_gguf(folders[0])
    llama_gguf.convert(*folders)
    names, get = read_safetensors(folders[1] / "model.safetensors")
    down = get("model.layers.0.mlp.down_proj.weight")
    assert (down.shape, down.dtype) == ((32, 32), np.float16)
    np.testing.assert_array_equal(down[5, :4], [-1.0, -0.5, 0.0, 0.5])
    np.testing.assert_array_equal(down[5, 16:19], [6.5, 6.0, 5.5])
    assert names["model.layers.0.self_attn.v_proj.weight"].shape == (16, 32)
    assert "lm_head.weight" not in names


def test_the_two_rows_of_a_rotated_pair_lie_half_a_head_apart(folders):
    _write_gguf(folders[0])
    llama_gguf.convert(*folders)
    _, get = read_safetensors(folders[1] / "model.safetensors")
    # Two heads of 16 rows: row 2 i + p of a head in llama.cpp is row 8 p + i of that head here.
    one = [*range(0, 16, 2), *range(1, 16, 2)]
    query = get("model.layers.0.self_attn.q_proj.weight")[:, 0]
    assert query.tolist() == [*one, *(16 + row for row in one)]
    assert get("model.layers.0.self_attn.k_proj.weight")[:, 7].tolist() == one


def test_the_config_and_the_tokenizer_of_a_gguf_file(folders):
    _write_gguf(folders[0])
    llama_gguf.convert(*folders)
    config = read(folders[1]).config
    wanted = {"rms_norm_eps": 1e-5, "rope_theta": 1000.0, "head_dim": 16, "vocab_size": 11}
    wanted |= {"num_key_value_heads": 1, "tie_word_embeddings": True, "pad_token_id": 2}
    assert {name: config[name] for name in wanted} == wanted
    inputs = load_text_inputs(folders[1], config)
    assert inputs.max_length == 64
    # Digits stand alone, a special word is one token, a space is a letter of the byte alphabet.
    assert inputs.tokens(["ab 12<|im_end|><user>"])["input_ids"] == [[8, 5, 6, 7, 2, 9]]
    assert inputs.tokenizer.decode([8, 5, 6, 7, 2], skip_special_tokens=True) == "ab 12"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": {"blk.0.ffn_gate_exps": (2,)}}, "no place is known for 'blk.0.ffn_gate_exps"),
        ({"split": "qwen2"}, "split as 'qwen2'"),
        ({"architecture": "phi3"}, "holds a 'phi3'"),
    ],
)
def test_another_gguf_file_is_refused(folders, options, message):
    _write_gguf(folders[0], **options)
    with pytest.raises(ValueError, match=message):
        llama_gguf.convert(*folders)


@pytest.mark.parity
def test_a_llama_of_gguf_is_what_transformers_makes_of_it(folders):
    import torch
    from transformers import LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    _write_gguf(folders[0], extra={"output": (len(WORDS), 32)})
    llama_gguf.convert(*folders)
    ours, loaded = LlamaForCausalLM.from_pretrained(
        folders[1], dtype=torch.float32, output_loading_info=True
    )
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    peer = load_gguf_checkpoint(
        str(folders[0] / llama_gguf.SOURCE), return_tensors=True, model_to_load=ours
    )
    assert peer["tensors"].keys() == ours.state_dict().keys()
    for name, value in peer["tensors"].items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert ours.config.rms_norm_eps == pytest.approx(peer["config"]["rms_norm_eps"])
