"""CTranslate2's binary, and a Whisper in it, by hand on made-up files."""

import json
import struct

import numpy as np
import pytest

from benchmarks.assets import ctranslate2, whisper
from jtl.weights.files import Tensor, read, read_safetensors

DIM = 4


@pytest.fixture
def folders(tmp_path):
    """The folder of what was fetched, and that of the asset."""
    fetched, made = tmp_path / "fetched", tmp_path / "made"
    fetched.mkdir()
    made.mkdir()
    return fetched, made


def _name(name):
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


def _binary(arrays, aliases=(), *, version=6, architecture="WhisperSpec"):
    """A file of CTranslate2: float32 is dtype 0, int8 is 1, int16 is 2, float16 is 4."""
    numbers = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
    parts = [struct.pack("<I", version), _name(architecture), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        sizes = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        kind = struct.pack("<BI", numbers[array.dtype.name], array.nbytes)
        parts += [_name(name), sizes, kind, array.tobytes()]
    parts.append(struct.pack("<I", len(aliases)))
    parts += [_name(name) for pair in aliases for name in pair]
    return b"".join(parts)


def test_a_binary_of_ctranslate2_by_hand(tmp_path):
    plain = bytes([6, 0, 0, 0, 2, 0, 65, 0, 3, 0, 0, 0, 1, 0, 0, 0])  # version, "A", 3, one array
    array = bytes([2, 0, 119, 0, 1, 2, 0, 0, 0, 2, 4, 0, 0, 0, 5, 0, 255, 255])  # "w", int16 (2,)
    (tmp_path / "model.bin").write_bytes(plain + array + bytes(4))
    binary = ctranslate2.read(tmp_path / "model.bin")
    assert (binary.architecture, binary.aliases) == ("A", {})
    assert binary.names == {"w": Tensor((2,), np.dtype(np.int16))}
    assert binary.get("w").tolist() == [5, -1]


def test_arrays_and_aliases_of_ctranslate2(tmp_path):
    arrays = {"a/weight": np.arange(6, dtype=np.float16).reshape(2, 3), "n": np.array(7, np.int8)}
    (tmp_path / "model.bin").write_bytes(_binary(arrays, [("b/weight", "a/weight")]))
    binary = ctranslate2.read(tmp_path / "model.bin")
    assert binary.aliases == {"b/weight": "a/weight"}
    np.testing.assert_array_equal(binary.get("a/weight"), [[0, 1, 2], [3, 4, 5]])
    assert binary.get("n") == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-5], "is cut off or no file of CTranslate2"),
        (lambda content: b"\x09" + content[1:], "is of version 9 .*read are"),
    ],
)
def test_a_damaged_binary_is_refused(tmp_path, change, message):
    whole = _binary({"w": np.zeros(3, np.float32)})
    (tmp_path / "model.bin").write_bytes(change(whole))
    with pytest.raises(ValueError, match=message):
        ctranslate2.read(tmp_path / "model.bin")


def _whisper_arrays():
    """One block on each side, width 4, 2 heads; every number is another."""
    count = iter(range(1, 10**6))

    def numbers(*shape):
        return np.array([next(count) for _ in range(int(np.prod(shape)))], np.float16) / 16

    def layer(width, height=DIM):
        made = numbers(height, width), numbers(height)
        return {"weight": made[0].reshape(height, width), "bias": made[1]}

    def norm():
        return {"gamma": numbers(DIM), "beta": numbers(DIM)}

    attention = {"linear_0": layer(DIM), "linear_1": layer(DIM, 2 * DIM), "linear_2": layer(DIM)}
    attention["linear_1"]["bias"][:DIM] = 0
    arrays = {}
    for side in ("encoder", "decoder"):
        own = {"linear_0": layer(DIM, 3 * DIM), "linear_1": layer(DIM), "layer_norm": norm()}
        own["linear_0"]["bias"][DIM : 2 * DIM] = 0
        feed = {"linear_0": layer(DIM, 8), "linear_1": layer(8), "layer_norm": norm()}
        block = {"self_attention": own, "ffn": feed}
        if side == "decoder":
            block["attention"] = attention | {"layer_norm": norm()}
        parts = {f"{part}/{name}": leaf for part in block for name, leaf in block[part].items()}
        layers = {f"layer_0/{name}": leaf for name, leaf in parts.items()} | {"layer_norm": norm()}
        for inner, leaves in layers.items():
            arrays |= {f"{side}/{inner}/{leaf}": array for leaf, array in leaves.items()}
        arrays[f"{side}/num_heads"] = np.array(2, np.int16)
        positions = numbers({"encoder": 10, "decoder": 6}[side], DIM)
        arrays[f"{side}/position_encodings/encodings"] = positions.reshape(-1, DIM)
    for name, width in {"conv1": 80, "conv2": DIM}.items():
        arrays[f"encoder/{name}/weight"] = numbers(DIM, width, 3).reshape(DIM, width, 3)
        arrays[f"encoder/{name}/bias"] = numbers(DIM)
    arrays["decoder/embeddings/weight"] = numbers(12, DIM).reshape(12, DIM)
    arrays["decoder/activation"] = np.array(3, np.int8)
    arrays["decoder/alignment_heads"] = np.array(1, np.int16)
    return arrays


SPECIAL = ("endoftext", "startoftranscript", "en", "transcribe", "translate", "startofprev")


def _write_whisper(fetched, arrays, **options):
    aliases = [("decoder/projection/weight", "decoder/embeddings/weight")]
    (fetched / "model.bin").write_bytes(_binary(arrays, aliases, **options))
    stated = {"suppress_ids": [1], "suppress_ids_begin": [2], "alignment_heads": [[0, 1]]}
    (fetched / "config.json").write_text(json.dumps(stated))
    words = (*SPECIAL, "notimestamps")
    added = [{"content": f"<|{word}|>", "id": 5 + number} for number, word in enumerate(words)]
    (fetched / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))


def test_whisper_is_renamed_and_its_joined_projections_are_split(folders):
    fetched, made = folders
    arrays = _whisper_arrays()
    _write_whisper(fetched, arrays)
    whisper.convert(fetched, made)
    names, get = read_safetensors(made / "model.safetensors")
    joined = arrays["decoder/layer_0/attention/linear_1/weight"]
    inside = "model.decoder.layers.0.encoder_attn"
    np.testing.assert_array_equal(get(f"{inside}.k_proj.weight"), joined[:DIM])
    np.testing.assert_array_equal(get(f"{inside}.v_proj.weight"), joined[DIM:])
    three = arrays["encoder/layer_0/self_attention/linear_0/bias"]
    inside = "model.encoder.layers.0.self_attn"
    np.testing.assert_array_equal(get(f"{inside}.q_proj.bias"), three[:DIM])
    np.testing.assert_array_equal(get(f"{inside}.v_proj.bias"), three[2 * DIM :])
    assert f"{inside}.k_proj.bias" not in names
    scale = get("model.decoder.layers.0.final_layer_norm.weight")
    np.testing.assert_array_equal(scale, arrays["decoder/layer_0/ffn/layer_norm/gamma"])
    assert names["model.encoder.layers.0.fc1.weight"] == Tensor((8, DIM), np.dtype(np.float16))
    assert names["model.encoder.layers.0.fc2.weight"] == Tensor((DIM, 8), np.dtype(np.float16))


def test_the_config_of_whisper_follows_from_the_arrays(folders):
    fetched, made = folders
    _write_whisper(fetched, _whisper_arrays())
    whisper.convert(fetched, made)
    config = read(made).config
    wanted = {"vocab_size": 12, "d_model": DIM, "encoder_layers": 1, "decoder_ffn_dim": 8}
    wanted |= {"max_source_positions": 10, "max_target_positions": 6, "num_mel_bins": 80}
    wanted |= {"decoder_attention_heads": 2, "decoder_start_token_id": 6, "eos_token_id": 5}
    assert {name: config[name] for name in wanted} == wanted
    generation = json.loads((made / "generation_config.json").read_text())
    assert generation["no_timestamps_token_id"] == 11
    assert not generation["is_multilingual"]
    assert sorted(file.name for file in made.iterdir()) == sorted(whisper.FILES)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("decoder/layer_0/gate/weight", np.zeros(2, np.float16), "no place is known for"),
        ("decoder/activation", np.array(0, np.int8), "'decoder/activation' .*value is no Whisper"),
        (
            "encoder/layer_0/self_attention/linear_0/bias",
            np.ones(3 * DIM, np.float16),
            "has a bias for keys",
        ),
    ],
)
def test_another_whisper_is_refused(folders, name, array, message):
    fetched, made = folders
    _write_whisper(fetched, _whisper_arrays() | {name: array})
    with pytest.raises(ValueError, match=message):
        whisper.convert(fetched, made)


def test_another_model_of_ctranslate2_is_refused(folders):
    _write_whisper(folders[0], _whisper_arrays(), architecture="TransformerSpec")
    with pytest.raises(ValueError, match="is a TransformerSpec of CTranslate2"):
        whisper.convert(*folders)


@pytest.mark.parity
def test_whisper_opens_in_pytorch_with_nothing_missing(folders):
    from transformers import WhisperForConditionalGeneration

    _write_whisper(folders[0], _whisper_arrays())
    whisper.convert(*folders)
    _, loaded = WhisperForConditionalGeneration.from_pretrained(
        folders[1], output_loading_info=True
    )
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    assert not loaded["mismatched_keys"]
