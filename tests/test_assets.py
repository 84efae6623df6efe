"""What is fetched from an index is the very file that is pinned, and nothing is left half done."""

import functools
import hashlib
import http.server
import threading
import zipfile

import pytest

from benchmarks import assets


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index on this machine with one archive, and the asset that is in it."""
    page = tmp_path / "index" / "numbers"
    page.mkdir(parents=True)
    with zipfile.ZipFile(page / "numbers-1.whl", "w") as archive:
        archive.writestr("inner/one.txt", "1")
        archive.writestr("inner/two.txt", "2")
    (page / "index.html").write_text('<a href="numbers-1.whl#sha256=0">numbers-1.whl</a>')
    digest = hashlib.sha256((page / "numbers-1.whl").read_bytes()).hexdigest()
    asset = assets.Asset("numbers", "numbers-1.whl", digest, {"inner/two.txt": "two.txt"})
    handler = functools.partial(_Quiet, directory=str(tmp_path / "index"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setitem(assets.ASSETS, "numbers", asset)
        yield asset
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_an_asset_is_fetched_once(index, monkeypatch):
    assert not assets.there("numbers")
    place = assets.fetch("numbers")
    assert [path.name for path in place.iterdir()] == ["two.txt"]
    assert (place / "two.txt").read_text() == "2"
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1")  # nobody answers there
    assert assets.fetch("numbers") == place


def test_another_file_of_that_name_is_refused(index, monkeypatch):
    monkeypatch.setitem(assets.ASSETS, "numbers", index._replace(sha256="0" * 64))
    with pytest.raises(ValueError, match="gives another numbers-1.whl"):
        assets.fetch("numbers")
    assert not assets.folder("numbers").exists()


def test_an_index_that_does_not_answer_says_what_to_do(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match="cannot be fetched .* set PIP_INDEX_URL"):
        assets.fetch("numbers")


def test_an_unknown_asset_names_those_there_are():
    with pytest.raises(ValueError, match="there are .*'mnist'"):
        assets.folder("minst")
