"""Recordings of spoken words as 16 kHz wav files, and what is said in them."""

import json
import os
import wave
from pathlib import Path

SOURCES = {
    "tidigits/dhd.2934z.raw": "digits.raw",
    "goforward.raw": "forward.raw",
    "cards/005.wav": "cards.wav",
    "librivox/sense_and_sensibility_01_austen_64kb-0930.wav": "reading.wav",
}
WORDS = {
    "digits.wav": "two nine three four zero",
    "forward.wav": "go forward ten meters",
    "cards.wav": "eight of spades four of clubs seven of hearts",
    "reading.wav": "he might even have been made amiable himself",
}
FILES = (*WORDS, "words.json")
_RATE = 16_000


def convert(fetched: Path, made: Path) -> None:
    """Give headerless 16-bit samples a header; write `words.json`: {file: what is said}."""
    for file in fetched.iterdir():
        if file.suffix == ".raw":
            _with_header(file, made / f"{file.stem}.wav")
        else:
            os.replace(file, made / file.name)
    (made / "words.json").write_text(json.dumps(WORDS, indent=2) + "\n")


def _with_header(raw: Path, path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes(raw.read_bytes())
