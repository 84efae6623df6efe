"""What is fetched from an index is the very file that is pinned, and nothing is left half done."""

import functools
import hashlib
import http.server
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from benchmarks import assets
from benchmarks.assets import __main__ as program


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index on this machine with two archives, and the asset that is in them."""
    page = tmp_path / "index" / "numbers"
    page.mkdir(parents=True)
    with zipfile.ZipFile(page / "numbers-1.whl", "w") as archive:
        archive.writestr("inner/one.txt", "1")
        archive.writestr("inner/two.txt", "2")
    (tmp_path / "more.txt").write_text("3")
    with tarfile.open(page / "numbers-1.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "more.txt", "inner/more.txt")
    names = ("numbers-1.whl", "numbers-1.tar.gz", "cut-1.whl")
    (page / "index.html").write_text("".join(f'<a href="{name}#sha256=0">' for name in names))
    members = ({"inner/two.txt": "whole.txt"}, {"inner/more.txt": "whole.txt"})
    archives = tuple(
        assets.Archive("numbers", name, _sha256(page / name), inside)
        for name, inside in zip(names, members, strict=False)
    )
    handler = functools.partial(_Quiet, directory=str(tmp_path / "index"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setitem(assets.ASSETS, "numbers", assets.Asset(archives, ("whole.txt",)))
        yield assets.ASSETS["numbers"]
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):  # noqa: N802
        if not self.path.endswith("cut-1.whl"):
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"x" * 10)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_empty(name: str) -> bool:
    """Whether neither the asset nor a remnant of it is in the cache."""
    place = assets.folder(name)
    return not place.parent.exists() or list(place.parent.iterdir()) == []


def _with(monkeypatch, asset, **changes):
    archive = asset.archives[0]._replace(**changes)
    monkeypatch.setitem(assets.ASSETS, "numbers", asset._replace(archives=(archive,)))


def test_an_asset_is_fetched_once_and_its_parts_are_joined(index, monkeypatch):
    assert not assets.there("numbers")
    place = assets.fetch("numbers")
    assert [path.name for path in place.iterdir()] == ["whole.txt"]
    assert (place / "whole.txt").read_text() == "23"
    assert [path.name for path in place.parent.iterdir()] == ["numbers"]
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1")  # nobody answers there
    assert assets.fetch("numbers") == place


def test_an_asset_that_lacks_a_file_is_made_anew(index):
    place = assets.fetch("numbers")
    (place / "whole.txt").rename(place / "other.txt")
    assert not assets.there("numbers")
    assets.fetch("numbers")
    assert [path.name for path in place.iterdir()] == ["whole.txt"]


def test_another_file_of_that_name_is_refused(index, monkeypatch):
    _with(monkeypatch, index, sha256="0" * 64)
    with pytest.raises(ValueError, match="gives another numbers-1.whl"):
        assets.fetch("numbers")
    assert _is_empty("numbers")


def test_a_connection_that_closes_early_says_what_to_do(index, monkeypatch):
    _with(monkeypatch, index, file="cut-1.whl")
    with pytest.raises(ValueError, match="closed 90 bytes too early; .* set PIP_INDEX_URL"):
        assets.fetch("numbers")
    assert _is_empty("numbers")


def test_a_file_that_the_index_does_not_have(index, monkeypatch):
    _with(monkeypatch, index, file="numbers-2.whl")
    with pytest.raises(ValueError, match="has no numbers-2.whl; it has 3 files of numbers; set"):
        assets.fetch("numbers")


def test_an_index_that_does_not_answer_says_what_to_do(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match="cannot be fetched .* set PIP_INDEX_URL"):
        assets.fetch("numbers")


def test_no_index_is_known_without_pip(index, monkeypatch):
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setitem(sys.modules, "pip._internal.models.index", None)
    with pytest.raises(ValueError, match="no package index is known: .* set PIP_INDEX_URL to"):
        assets.fetch("numbers")


def test_a_conversion_that_fails_leaves_nothing(index, monkeypatch):
    def convert(fetched, made):
        (made / "whole.txt").write_text((fetched / "whole.txt").read_text())
        raise ValueError("of another layout")

    monkeypatch.setitem(assets.ASSETS, "numbers", index._replace(convert=convert))
    with pytest.raises(ValueError, match="of another layout"):
        assets.fetch("numbers")
    assert _is_empty("numbers")


def test_a_missing_package_is_said_before_anything_is_fetched(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1")
    monkeypatch.setitem(assets.ASSETS, "numbers", index._replace(needs=("no_such_package",)))
    with pytest.raises(ValueError, match=r"\['no_such_package'\].* pip install 'jtl\[assets\]'"):
        assets.fetch("numbers")


def test_an_unknown_asset_names_those_there_are():
    with pytest.raises(ValueError, match="there are .*'mnist'"):
        assets.folder("minst")


def test_the_program_prints_where_an_asset_lies(index, capsys):
    program.main(["numbers"])
    assert capsys.readouterr().out == f"numbers: {assets.folder('numbers')}\n"


def test_the_program_ends_with_the_reason(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1")
    with pytest.raises(SystemExit, match="^assets: numbers-1.whl cannot be fetched"):
        program.main(["numbers"])


@pytest.mark.parametrize("name", sorted(assets.ASSETS))
def test_every_archive_is_pinned_and_every_member_has_a_plain_name(name):
    for archive in assets.ASSETS[name].archives:
        assert len(archive.sha256) == 64
        assert archive.members
        assert all(Path(member).name == member for member in archive.members.values())
