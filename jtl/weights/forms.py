"""The files in which weights lie: their names, which one of a folder is read, and how.

`files.read` and `hub.wanted_files` ask here, so that what is fetched is what is read.
"""

import re
from collections.abc import Iterable

INDEX = ".index.json"
CONFIGS = ("config.json", "open_clip_config.json")
# The first that is there is read: safetensors, then Flax msgpack, then pickles.
NAMES = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "flax_model.msgpack",
    f"flax_model.msgpack{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
    "open_clip_pytorch_model.bin",
)
# Where none is there, the only file with one of these endings.
_ENDINGS = (".safetensors", ".msgpack", ".npz", ".pt", ".pth", ".ckpt", ".bin")
_NO_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state.*|heads?|.*-\d+-of-\d+)\.\w+"
)


def weights_file(files: Iterable[str]) -> str | None:
    """Return which of a folder's files holds the weights, None where that is not clear.

    >>> weights_file(["config.json", "pytorch_model.bin", "model.safetensors"])
    'model.safetensors'
    >>> weights_file(["Prithvi_EO_V1_100M.pt", "optimizer.pt", "README.md"])
    'Prithvi_EO_V1_100M.pt'
    >>> weights_file(["a.pt", "b.pt"])
    """
    files = [file for file in files if "/" not in file]
    known = next((name for name in NAMES if name in files), None)
    if known:
        return known
    for ending in _ENDINGS:
        loose = [f for f in files if f.endswith(ending) and not _NO_WEIGHTS.fullmatch(f)]
        if loose:
            return loose[0] if len(loose) == 1 else None
    return None


def config_file(files: Iterable[str], weights: str | None) -> str | None:
    """Return which of a folder's files is the config of its weights, None where there is none.

    >>> config_file(["config.json", "open_clip_config.json"], "open_clip_model.safetensors")
    'open_clip_config.json'
    """
    own, open_clip = CONFIGS
    order = (open_clip, own) if (weights or "").startswith("open_clip") else (own, open_clip)
    files = list(files)
    return next((name for name in order if name in files), None)


def shards(files: Iterable[str], index: str) -> list[str]:
    """Return the files that belong to an index of shards.

    >>> shards(["model-00001-of-00001.safetensors", "other.bin"], "model.safetensors.index.json")
    ['model-00001-of-00001.safetensors']
    """
    ending = "." + index.removesuffix(INDEX).rpartition(".")[2]
    return [file for file in files if "/" not in file and file.endswith(ending)]
