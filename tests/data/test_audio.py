"""Recordings: WAV files, rates, padding, the extractors of checkpoints, what is refused."""

import struct
import wave

import numpy as np
import pytest

from jtl import data
from jtl.data.audio import AudioInputs, audio_inputs, load_audio_inputs, resampled
from jtl.data.wav import read_wav, wav_length
from jtl.models.inputs import MissingInputs, load_inputs


def _header(tag, channels, rate, bits, body, extra=b"", stated=None):
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * block, block, bits) + extra
    size = len(body) if stated is None else stated
    parts = b"fmt " + struct.pack("<I", len(form)) + form
    parts += b"LIST" + struct.pack("<I", 3) + b"abc\0"  # an odd part is padded to even
    parts += b"data" + struct.pack("<I", size) + body
    return b"RIFF" + struct.pack("<I", 4 + len(parts)) + b"WAVE" + parts


def _tone(seconds=0.1, rate=16000, pitch=440.0):
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)).astype(
        np.float32
    )


def _write(path, values, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(values * 32767).astype("<i2").tobytes())
    return path


def test_numbers_of_every_width(tmp_path):
    guid = struct.pack("<HHIH", 22, 0, 0, 1) + b"\0" * 14
    cases = {
        "8": (_header(1, 1, 8, 8, bytes([128, 192, 0])), [0.0, 0.5, -1.0]),
        "16": (_header(1, 1, 8, 16, struct.pack("<3h", 0, 16384, -32768)), [0.0, 0.5, -1.0]),
        "24": (_header(1, 1, 8, 24, b"\0\0\0" + b"\0\0\x40" + b"\0\0\x80"), [0.0, 0.5, -1.0]),
        "32": (_header(1, 1, 8, 32, struct.pack("<3i", 0, 2**30, -(2**31))), [0.0, 0.5, -1.0]),
        "float": (_header(3, 1, 8, 32, struct.pack("<3f", 0, 0.5, -1)), [0.0, 0.5, -1.0]),
        "double": (_header(3, 1, 8, 64, struct.pack("<3d", 0, 0.5, -1)), [0.0, 0.5, -1.0]),
        "wide": (_header(0xFFFE, 1, 8, 16, struct.pack("<h", 16384), guid), [0.5]),
        "stream": (_header(1, 1, 8, 16, struct.pack("<h", 16384), stated=2**32 - 1), [0.5]),
    }
    for name, (content, expected) in cases.items():
        path = tmp_path / f"{name}.wav"
        path.write_bytes(content)
        values, rate = read_wav(path)
        assert rate == 8 and values.dtype == np.float32
        assert values[:, 0].tolist() == expected, name
        assert wav_length(path) == (len(expected), 8)
    stereo = tmp_path / "stereo.wav"
    stereo.write_bytes(_header(1, 2, 8, 16, struct.pack("<4h", 0, 16384, -16384, 0)))
    assert read_wav(stereo)[0].tolist() == [[0.0, 0.5], [-0.5, 0.0]]
    batch = audio_inputs(8, normalised=False)([stereo])
    assert batch["input_values"].tolist() == [[0.25, -0.25]]


def test_damaged_files(tmp_path):
    path = tmp_path / "x.wav"
    whole = _header(1, 1, 8, 16, struct.pack("<h", 1))
    for content, message in (
        (b"ID3 and so on", "begins with b'ID3 and so o'; a WAV file"),
        (whole[:40], "40 bytes has no samples"),
        (_header(7, 1, 8, 8, b"ab"), "has format 7 of 8 bits, 1 channels, 8 Hz; read are PCM"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_wav(path)
    with pytest.raises(ValueError, match="nowhere.wav' cannot be read .*correct the path"):
        read_wav(tmp_path / "nowhere.wav")


def test_another_rate_keeps_the_tone():
    wanted = _tone(0.5, 16000)
    for rate in (8000, 44100):
        made = resampled(_tone(0.5, rate), rate, 16000)
        assert len(made) == len(wanted)
        np.testing.assert_allclose(made[400:-400], wanted[400:-400], atol=2e-3)


def test_a_row_does_not_depend_on_its_neighbours():
    inputs = audio_inputs(16000, mask=True)
    short, long = _tone(0.05), _tone(0.1, pitch=300.0)
    alone, both = inputs([short], rate=16000), inputs([short, long], rate=16000)
    np.testing.assert_array_equal(both["input_values"][0, :800], alone["input_values"][0])
    assert not both["input_values"][0, 800:].any()
    assert both["attention_mask"].sum(axis=1).tolist() == [800, 1600]
    np.testing.assert_allclose(alone["input_values"].std(), 1.0, atol=1e-3)
    cut = inputs([long, (_tone(0.1, 8000), 8000)], rate=16000, length=1000)
    assert cut["input_values"].shape == (2, 1000) and cut["attention_mask"].all()
    assert inputs.lengths([short, (long, 8000)], rate=16000).tolist() == [800, 3200]
    assert "attention_mask" not in audio_inputs(16000)([short], rate=16000)


def test_they_travel_with_the_weights(tmp_path):
    inputs = audio_inputs(8000, normalised=False, mask=True, max_seconds=0.05)
    inputs.save(tmp_path)
    again = load_inputs(tmp_path, "audio", {})
    assert isinstance(again, AudioInputs)
    assert (again.sampling_rate, again.max_seconds, again.limit) == (8000, 0.05, 400)
    batch = again([_tone(0.1, 8000)], rate=8000)
    np.testing.assert_array_equal(batch["input_values"][0], _tone(0.1, 8000)[:400])
    assert batch["attention_mask"].shape == (1, 400)
    assert isinstance(load_inputs(tmp_path / "none", "audio", {}), MissingInputs)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded .*state it by data.audio_inputs"):
        load_audio_inputs(tmp_path, {})


def test_spectrograms_of_whisper(tmp_path):
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    extractor.save_pretrained(tmp_path)
    inputs = load_audio_inputs(tmp_path, {"num_mel_bins": 8})
    assert inputs.fixed and inputs.max_seconds == 1
    file = _write(tmp_path / "a.wav", _tone(2.0))
    batch = inputs([file, (_tone(0.5, 8000), 8000)])
    assert list(batch) == ["input_features"] and batch["input_features"].shape == (2, 8, 100)
    samples = read_wav(file)[0][:16000, 0]
    theirs = extractor(samples, sampling_rate=16000, return_tensors="np")["input_features"]
    np.testing.assert_allclose(batch["input_features"][0], theirs[0], atol=1e-6)
    with pytest.raises(ValueError, match="of 8 numbers a frame; the config has num_mel_bins=80"):
        load_audio_inputs(tmp_path, {"num_mel_bins": 80})


def test_refused():
    inputs, tone = audio_inputs(16000), _tone()
    for given, message in (
        ([tone], "recording 0 has no sampling rate .*give rate="),
        ([(tone, 0)], "no sampling rate"),
        ([(np.round(tone * 32767).astype(np.int16), 16000)], "is int16.*divide 16-bit integers"),
        ([(tone * 32767, 16000)], "has values up to 16.*divide 16-bit integers"),
        ([(np.zeros((2, 16000), np.float32), 16000)], "transpose others"),
        ([(tone[:0], 16000)], "has no samples"),
        ([(np.where(tone > 0.4, np.nan, tone), 16000)], "values up to nan"),
        (tone, "recordings are ndarray; wanted is a list"),
        ([], "wanted is a list of at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            inputs(given)


def test_a_folder_becomes_a_dataset_in_buckets(tmp_path):
    for name, seconds in (("high/1", 0.1), ("high/2", 0.35), ("low/1", 0.15), ("low/2", 0.31)):
        pitch = {"high": 800.0, "low": 200.0}[name[:-2]]
        _write(tmp_path / f"{name}.wav", _tone(seconds, pitch=pitch))
    source = data.from_folder(tmp_path)
    assert source.modality == "audio" and source.classes == ("high", "low")
    made = data.encode(source, audio_inputs(16000, mask=True), buckets=2)
    assert made.buckets == (3200, 6400) and made.bucket.tolist() == [0, 1, 0, 1]
    assert made.read is None  # little enough for memory
    long = made.columns(np.array([1, 3]))
    assert long["input_values"].shape == (2, 6400)
    assert long["attention_mask"].sum(axis=1).tolist() == [5600, 4960]
    lazy = data.encode(source, audio_inputs(16000, mask=True), buckets=(3200, 6400), memory_bytes=1)
    np.testing.assert_array_equal(
        lazy.columns(np.array([1, 3]))["input_values"], long["input_values"]
    )
    assert len(lazy.contents) == 32
    parts = data.split(source, {"train": 3, "test": 1}, seed=0)
    assert parts["train"].size == 3
    with pytest.raises(ValueError, match="holds recordings; the backbone's inputs are ImageInputs"):
        data.encode(source, data.image_inputs(4))
    (tmp_path / "high/x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 images and 4 recordings; a source holds one kind"):
        data.from_folder(tmp_path)
