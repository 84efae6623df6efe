"""WAV files to numbers: PCM of 8 to 32 bits and floats, of any number of channels."""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


class _Format(NamedTuple):
    """What the header says: kind of numbers, channels, samples a second, bytes of a number."""

    tag: int
    channels: int
    rate: int
    width: int


def read_wav(path: str | Path) -> tuple[np.ndarray, int]:
    """Return the samples (samples, channels) float32 in -1 to 1, and their number in a second.

    Raises:
        ValueError: there is no such file, it is damaged or no WAV, or it is compressed.
    """
    data = _bytes(path)
    form, start, stop = _layout(data, path)
    stop -= (stop - start) % (form.width * form.channels)
    return _numbers(data[start:stop], form).reshape(-1, form.channels), form.rate


def wav_length(path: str | Path) -> tuple[int, int]:
    """Return the number of samples of each channel and their number in a second.

    Raises:
        ValueError: as `read_wav`.
    """
    form, start, stop = _layout(_bytes(path), path)
    return (stop - start) // (form.width * form.channels), form.rate


def _bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"the recording {str(path)!r} cannot be read ({type(error).__name__}: "
            f"{error.strerror}); correct the path"
        ) from error


def _layout(data: bytes, path: str | Path) -> tuple[_Format, int, int]:
    """Return the format, and where the samples begin and end."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError(
            f"the recording {str(path)!r} begins with {data[:12]!r}; a WAV file begins with "
            "'RIFF....WAVE'; convert it to WAV, or give arrays"
        )
    form, place = None, 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], struct.unpack_from("<I", data, place + 4)[0]
        body = place + 8
        if name == b"fmt ":
            form = _format(data[body : body + size], path)
        if name == b"data" and form is not None:
            return form, body, min(body + size, len(data))  # streams state a size beyond the end
        place = body + size + size % 2
    raise ValueError(
        f"the WAV file {str(path)!r} of {len(data)} bytes has no samples: a part 'fmt ' and a part "
        "'data' after it are wanted; it is cut off or damaged, so fetch it again"
    )


def _format(body: bytes, path: str | Path) -> _Format:
    if len(body) >= 16:
        tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", body)
        if tag == _EXTENSIBLE and len(body) >= 26:
            tag = struct.unpack_from("<H", body, 24)[0]
        widths = {_PCM: (8, 16, 24, 32), _FLOAT: (32, 64)}
        if bits in widths.get(tag, ()) and channels and rate:
            return _Format(tag, channels, rate, bits // 8)
        stated = f"format {tag} of {bits} bits, {channels} channels, {rate} Hz"
    else:
        stated = f"a header of {len(body)} bytes"
    raise ValueError(
        f"the WAV file {str(path)!r} has {stated}; read are PCM of 8, 16, 24 and 32 bits and "
        "floats of 32 and 64; convert it to one of these"
    )


def _numbers(data: bytes, form: _Format) -> np.ndarray:
    if form.tag == _FLOAT:
        return np.frombuffer(data, f"<f{form.width}").astype(np.float32)
    if form.width == 1:  # the only width without a sign
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    if form.width == 3:
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return (padded.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
    integers = np.frombuffer(data, f"<i{form.width}")
    return (integers / 2.0 ** (8 * form.width - 1)).astype(np.float32)
