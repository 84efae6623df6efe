"""Recordings to what a speech model reads, by the extractor that its weights were trained with."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jtl.data.wav import read_wav, wav_length

_LOUDEST = 4.0  # a float recording stays near 1; one of 16-bit integers goes to 32768


@dataclasses.dataclass(frozen=True, eq=False)
class AudioInputs:
    """A feature extractor and the longest recording that is read.

    Attributes:
        extractor: of transformers; it normalises, or makes a spectrogram.
        sampling_rate: samples a second that the model reads; others are resampled.
        max_seconds: longer recordings are cut; None reads them whole. Whisper has its own, 30.
    """

    extractor: Any
    sampling_rate: int
    max_seconds: float | None = None

    @property
    def column(self) -> str:
        """The column of the batch: "input_values" (samples) or "input_features" (spectrograms)."""
        return self.extractor.model_input_names[0]

    @property
    def fixed(self) -> bool:
        """Whether every recording becomes an array of one size, as for Whisper."""
        return self.column == "input_features"

    def __call__(
        self,
        recordings: Sequence[Any] | np.ndarray,
        *,
        rate: int | None = None,
        length: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Return {"input_values": (n, samples)} or {"input_features": (n, mels, frames)}, float32.

        Each recording is normalised by itself and padded with zeros afterwards, so that a row does
        not depend on its neighbours. With `input_values` comes an int32 `attention_mask` of their
        shape where the checkpoint was trained with one.

        Args:
            recordings: float arrays (samples,) or (samples, channels) in -1 to 1, pairs (array,
                samples a second), or paths of WAV files. Channels are averaged.
            rate: samples a second of arrays that come without.
            length: samples to pad and cut to, of the model's rate; None pads to the longest.

        Raises:
            ValueError: there is no recording, its rate is not stated, or it is empty, of integers
                or not finite, or a file cannot be read.
        """
        _check_list(recordings)
        waves = [self._wave(one, rate, row) for row, one in enumerate(recordings)]
        options = {"sampling_rate": self.sampling_rate, "return_tensors": "np"}
        if self.fixed:
            made = self.extractor(waves, **options)
            return {name: _narrow(made[name]) for name in self.extractor.model_input_names}
        longest = max(len(wave) for wave in waves)
        values = [self.extractor(wave[:length], **options)[self.column][0] for wave in waves]
        padded = np.zeros((len(waves), length or longest), np.float32)
        mask = np.zeros(padded.shape, np.int32)
        for row, value in enumerate(values):
            padded[row, : len(value)] = value
            mask[row, : len(value)] = 1
        batch = {self.column: padded}
        return {**batch, "attention_mask": mask} if self.extractor.return_attention_mask else batch

    def lengths(
        self, recordings: Sequence[Any] | np.ndarray, *, rate: int | None = None
    ) -> np.ndarray:
        """Return the number of samples (n,) that each recording has at the model's rate."""
        _check_list(recordings)
        return np.asarray(
            [self._length(one, rate, i) for i, one in enumerate(recordings)], np.int64
        )

    def save(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json`, `max_seconds` in it."""
        self.extractor.max_seconds = self.max_seconds
        self.extractor.save_pretrained(str(folder))

    @property
    def limit(self) -> int | None:
        """The longest recording in samples of the model's rate, None where there is no limit."""
        return None if self.max_seconds is None else round(self.max_seconds * self.sampling_rate)

    def _wave(self, recording: Any, rate: int | None, row: int) -> np.ndarray:
        wave, rate = _opened(recording, rate, row)
        return resampled(wave, rate, self.sampling_rate)[: self.limit]

    def _length(self, recording: Any, rate: int | None, row: int) -> int:
        if isinstance(recording, str | Path):
            samples, rate = wav_length(recording)
        else:
            array, rate = _rated(recording, rate, row)
            samples = len(array)
        made = -(-samples * self.sampling_rate // rate)
        return made if self.limit is None else min(made, self.limit)


def load_audio_inputs(folder: str | Path, config: Mapping[str, Any]) -> AudioInputs:
    """Return the feature extractor of a checkpoint folder.

    Args:
        folder: a local folder with `preprocessor_config.json`.
        config: the dict of `config.json`; its `num_mel_bins` must be the extractor's.

    Raises:
        ValueError: the file is damaged, or is for other inputs than the model's.
    """
    from transformers import AutoFeatureExtractor

    try:
        extractor = AutoFeatureExtractor.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"the feature extractor of {str(folder)!r} cannot be loaded "
            f"({type(error).__name__}: {reason}); put preprocessor_config.json of the original "
            "checkpoint there, or state it by data.audio_inputs(sampling_rate)"
        ) from error
    name, bins = extractor.model_input_names[0], config.get("num_mel_bins")
    if name not in ("input_values", "input_features") or (
        bins is not None and bins != extractor.feature_size
    ):
        raise ValueError(
            f"the extractor of {str(folder)!r}, {type(extractor).__name__}, makes {name!r} of "
            f"{extractor.feature_size} numbers a frame; the config has num_mel_bins={bins}; put "
            "preprocessor_config.json of this checkpoint there"
        )
    return _made(extractor, getattr(extractor, "max_seconds", None))


def audio_inputs(
    sampling_rate: int = 16_000,
    *,
    normalised: bool = True,
    mask: bool = False,
    max_seconds: float | None = None,
) -> AudioInputs:
    """Return a stated preprocessing to `input_values`: for weights without a file that says it.

    Args:
        sampling_rate: samples a second that the model reads.
        normalised: whether each recording gets mean 0 and variance 1.
        mask: whether there is an `attention_mask`; wav2vec 2.0 with `feat_extract_norm="layer"`
            was trained with one, that with "group" was not.
        max_seconds: longer recordings are cut; None reads them whole.

    >>> inputs = audio_inputs(8, normalised=False, mask=True)
    >>> batch = inputs([np.array([0.5, 0.25]), np.array([1.0])], rate=8)
    >>> batch["input_values"].tolist(), batch["attention_mask"].tolist()
    ([[0.5, 0.25], [1.0, 0.0]], [[1, 1], [1, 0]])
    """
    from transformers import Wav2Vec2FeatureExtractor

    extractor = Wav2Vec2FeatureExtractor(
        sampling_rate=sampling_rate, do_normalize=normalised, return_attention_mask=mask
    )
    return _made(extractor, max_seconds)


def resampled(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Return a wave (samples,) at another rate, by polyphase filtering.

    >>> resampled(np.ones(4, np.float32), 8, 8).tolist()
    [1.0, 1.0, 1.0, 1.0]
    >>> len(resampled(np.ones(441, np.float32), 44100, 16000))
    160
    """
    if rate == wanted:
        return wave
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return resample_poly(wave, wanted // common, rate // common).astype(np.float32)


def _made(extractor: Any, max_seconds: float | None) -> AudioInputs:
    own = getattr(extractor, "chunk_length", None)
    if own is not None:
        max_seconds = min(own, max_seconds or own)
    seconds = None if max_seconds is None else float(max_seconds)
    return AudioInputs(extractor, int(extractor.sampling_rate), seconds)


def _narrow(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.int32 if array.dtype.kind in "iu" else np.float32)


def _check_list(recordings: Any) -> None:
    if isinstance(recordings, str | Path | np.ndarray) or not len(recordings):
        raise ValueError(
            f"recordings are {type(recordings).__name__}; wanted is a list of at least one: of "
            "paths, of arrays with rate=, or of pairs (array, rate)"
        )


def _rated(recording: Any, rate: int | None, row: int) -> tuple[np.ndarray, int]:
    """Return an array and its rate."""
    if isinstance(recording, tuple) and len(recording) == 2:
        recording, rate = recording
    if rate is None or rate <= 0:
        raise ValueError(
            f"recording {row} has no sampling rate (rate={rate}); a model hears another pitch and "
            "speed where it is wrong; give rate=, pairs (array, rate), or paths of WAV files"
        )
    return np.asarray(recording), int(rate)


def _opened(recording: Any, rate: int | None, row: int) -> tuple[np.ndarray, int]:
    """Return a float32 wave (samples,) of one channel and its rate, checked."""
    if isinstance(recording, str | Path):
        array, rate = read_wav(recording)
    else:
        array, rate = _rated(recording, rate, row)
    name = repr(str(recording)) if isinstance(recording, str | Path) else str(row)
    if array.dtype.kind != "f" or array.ndim not in (1, 2) or array.shape[1:] > (32,):
        raise ValueError(
            f"recording {name} is {array.dtype}{array.shape}; wanted are floats in -1 to 1 of "
            "(samples,) or (samples, channels); divide 16-bit integers by 32768, transpose others"
        )
    loudest = float(np.abs(array).max()) if array.size else 0.0
    if not array.size or not math.isfinite(loudest) or loudest > _LOUDEST:
        what = f"values up to {loudest:g}" if array.size else "no samples"
        raise ValueError(
            f"recording {name} of shape {array.shape} has {what}; wanted are finite floats in -1 "
            "to 1; divide 16-bit integers by 32768, and drop what is empty or damaged"
        )
    mono = array if array.ndim == 1 else array.mean(axis=1)
    return np.asarray(mono, np.float32), rate
