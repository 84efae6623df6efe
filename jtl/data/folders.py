"""Examples from a folder of images or of recordings: one subfolder for each class."""

from collections.abc import Sequence
from pathlib import Path

from jtl.data.sources import Source, from_arrays
from jtl.near import listed

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
RECORDINGS = (".wav",)


def from_folder(path: str | Path, *, classes: Sequence[str] | None = None) -> Source:
    """Return the images, or the recordings, below `path/CLASS/`, in the order of their names.

    Args:
        path: the folder; hidden entries and files that are neither by their ending are passed by.
        classes: names of the classes in order; None is the sorted subfolders. Give those of the
            training data for a validation folder that lacks a class.

    Raises:
        ValueError: there is no such folder, it has no subfolders, one of them has no image or is
            none of the classes, or there are both images and recordings.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(
            f"there is no folder {str(root)!r}; examples lie in one subfolder for each class; "
            "correct the path"
        )
    folders = sorted(
        entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    kind, files = _examples(root, folders)
    empty = [name for name, found in files.items() if not found]
    if empty or not files:
        there = listed(sorted(entry.name for entry in root.iterdir()))
        what = f"no {kind} in the subfolders {listed(empty)}" if empty else "no subfolders"
        raise ValueError(
            f"the folder {str(root)!r} has {what}; it has {there}; "
            f"put the images, ending in {list(ENDINGS)}, or the recordings, in {list(RECORDINGS)}, "
            "into one subfolder for each class"
        )
    examples = [file for found in files.values() for file in found]
    labels = [name for name in files for _ in files[name]]
    return from_arrays({kind: examples, "label": labels}, classes=classes, name=str(root))


def _examples(root: Path, folders: list[Path]) -> tuple[str, dict[str, list[Path]]]:
    """Return the column, "image" or "audio", and the files of each class."""
    images = {folder.name: _files(folder, ENDINGS) for folder in folders}
    recordings = {folder.name: _files(folder, RECORDINGS) for folder in folders}
    counts = [sum(map(len, found.values())) for found in (images, recordings)]
    if all(counts):
        raise ValueError(
            f"the folder {str(root)!r} has {counts[0]} images and {counts[1]} recordings; a source "
            "holds one kind; put them into two folders"
        )
    return ("audio", recordings) if counts[1] else ("image", images)


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in endings and not file.name.startswith(".")
    )
