"""A whole run on made-up tones: recordings of a folder, and pairs of arrays and rates."""

import wave

import jax
import numpy as np
import pytest
import tiny

import jtl
from jtl import data as jdata
from jtl.models.load import new_backbone
from jtl.recipes import sources

RATE = 4000
SPEECH = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    conv_dim=[8, 8],
    conv_kernel=[16, 4],
    conv_stride=[8, 4],
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    feat_extract_norm="layer",
    do_stable_layer_norm=True,
    layerdrop=0.5,
)
WHISPER = dict(
    d_model=16,
    encoder_layers=2,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    num_mel_bins=8,
    max_source_positions=50,
    vocab_size=8,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    decoder_start_token_id=1,
)


def _tones(count, seed=0):
    """Return recordings of high and low tones in noise, of unequal lengths, and their classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    made = []
    for label in labels:
        times = np.arange(int(rng.uniform(0.1, 0.2) * RATE)) / RATE
        pitch = (300.0, 900.0)[label] * rng.uniform(0.9, 1.1)
        noise = 0.05 * rng.normal(size=len(times))
        made.append((0.5 * np.sin(2 * np.pi * pitch * times) + noise).astype(np.float32))
    return made, [("low", "high")[label] for label in labels]


@pytest.fixture(scope="module")
def backbone():
    inputs = jdata.audio_inputs(RATE, mask=True)
    return new_backbone("wav2vec2", SPEECH, key=jax.random.key(0), inputs=inputs)


def test_a_folder_of_recordings(tmp_path, backbone):
    waves, labels = _tones(24)
    for number, (samples, label) in enumerate(zip(waves, labels, strict=True)):
        path = tmp_path / "tones" / label / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((samples * 32000).astype("<i2").tobytes())
    data = sources.folder(str(tmp_path / "tones"), train=16, validation=4, test=4)
    options = {"plan": tiny.everything, "batch_size": 8, "buckets": 1}
    result = jtl.fine_tune(backbone, data, folder=tmp_path / "run", **options)
    assert result["held_bit_equal"] is True
    assert [row["steps"] for row in result["phases"]] == [2]
    again = jtl.load(tmp_path / "run")
    assert again.model.backbone.inputs.sampling_rate == RATE
    raw = data["test"].columns["audio"]
    said = again.predict(raw)
    assert {one.label for one in said} <= {"low", "high"}
    trained = again.model.params["backbone"]["feature_extractor"]["conv_layers"]["0"]["conv"]
    before = backbone.params["feature_extractor"]["conv_layers"]["0"]["conv"]
    assert not np.array_equal(trained["kernel"], before["kernel"])


def test_a_head_on_whispers_encoder(tmp_path):
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    inputs = jdata.AudioInputs(extractor, 16000, 1.0)
    backbone = new_backbone("whisper_encoder", WHISPER, key=jax.random.key(0), inputs=inputs)
    waves, labels = _tones(24)
    pairs = [(samples, RATE) for samples in waves]
    source = jdata.from_arrays({"audio": pairs, "label": labels})
    data = jdata.split(source, {"train": 16, "validation": 4, "test": 4}, seed=0)
    options = {"plan": tiny.head_only, "batch_size": 8}
    result = jtl.fine_tune(backbone, data, folder=tmp_path / "run", **options)
    assert result["held_bit_equal"] is True and result["phases"][0]["steps"] == 2
    again = jtl.load(tmp_path / "run")
    assert again.model.backbone.family.model_type == "whisper_encoder"
    assert again.model.backbone.inputs.max_seconds == 1.0
    jax.tree.map(np.testing.assert_array_equal, again.model.backbone.params, backbone.params)
