"""Examples from a folder of images: one subfolder for each class."""

from collections.abc import Sequence
from pathlib import Path

from jtl.data.sources import Source, from_arrays
from jtl.near import listed

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def from_folder(path: str | Path, *, classes: Sequence[str] | None = None) -> Source:
    """Return the images below `path/CLASS/`, in the order of their names.

    Args:
        path: the folder; hidden entries and files that are no images by their ending are passed by.
        classes: names of the classes in order; None is the sorted subfolders. Give those of the
            training data for a validation folder that lacks a class.

    Raises:
        ValueError: there is no such folder, it has no subfolders, one of them has no image or is
            none of the classes.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(
            f"there is no folder {str(root)!r}; images lie in one subfolder for each class; "
            "correct the path"
        )
    folders = sorted(
        entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    files = {folder.name: _images(folder) for folder in folders}
    empty = [name for name, images in files.items() if not images]
    if empty or not files:
        there = listed(sorted(entry.name for entry in root.iterdir()))
        what = f"no image in the subfolders {listed(empty)}" if empty else "no subfolders"
        raise ValueError(
            f"the folder {str(root)!r} has {what}; it has {there}; "
            f"put the images, ending in {list(ENDINGS)}, into one subfolder for each class"
        )
    images = [image for name in files for image in files[name]]
    labels = [name for name in files for _ in files[name]]
    return from_arrays({"image": images, "label": labels}, classes=classes, name=str(root))


def _images(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in ENDINGS and not file.name.startswith(".")
    )
