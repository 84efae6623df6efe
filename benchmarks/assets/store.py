"""Where assets lie, and how one gets there: whole, or not at all."""

import importlib.util
import os
import tempfile
from pathlib import Path

from benchmarks.assets.archive import unpack
from benchmarks.assets.table import ASSETS


def folder(name: str) -> Path:
    """Return where an asset lies, or will lie.

    Raises:
        ValueError: no asset of that name.
    """
    if name not in ASSETS:
        raise ValueError(f"there is no asset {name!r}; there are {sorted(ASSETS)}; name one")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "jtl" / "assets" / name


def there(name: str) -> bool:
    """Return whether an asset was fetched."""
    return all((folder(name) / file).is_file() for file in ASSETS[name].files)


def fetch(name: str) -> Path:
    """Return the folder of an asset, fetched if it is not there.

    Raises:
        ValueError: no such asset; a package that opens it is missing; the index does not answer,
            or gives another file.
    """
    place, asset = folder(name), ASSETS[name]
    if there(name):
        return place
    missing = [package for package in asset.needs if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(
            f"the asset {name!r} is opened by {missing}, not installed here; install the extra: "
            "pip install 'jtl[assets]'"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{name}-") as scratch:
        fetched, made = Path(scratch) / "fetched", Path(scratch) / "made"
        fetched.mkdir()
        made.mkdir()
        for archive in asset.archives:
            unpack(archive, fetched)
        asset.convert(fetched, made)
        lacking = [file for file in asset.files if not (made / file).is_file()]
        assert not lacking, f"{name} was made without {lacking}"
        if place.exists():  # of an older kind, or one of its files was taken away
            os.replace(place, Path(scratch) / "old")
        os.replace(made, place)
    return place
