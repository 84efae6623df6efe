"""Columns in files: the same bits, reused, shared, repaired, bounded; never half of one."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from test_batches import make_images, make_texts

from jtl.data import sheet, store
from jtl.data.batches import batches
from jtl.data.derive import derive
from jtl.data.store import Store

NAMES = ["hidden_1", "pooled"]
KEYS = {"hidden_1": "a" * 32, "pooled": "b" * 32}


def _compute(batch):
    ids = (batch["input_ids"] * batch["attention_mask"]).astype(np.float32)
    hidden = np.stack([ids, np.sqrt(ids)], axis=-1)
    return {"hidden_1": hidden.astype(ml_dtypes.bfloat16), "pooled": hidden.sum(1)}


def _never(batch):
    raise AssertionError("nothing is to be computed")


def _on_disk(folder, **options):
    return Store(**{"memory_bytes": 0, "disk_bytes": 10**6, "folder": folder, **options})


def _derive(place, compute=_compute, keys=KEYS):
    whole = derive(make_texts(), 8, compute, names=NAMES, store=place, keys=keys)
    assert whole is not None
    return whole


def _write(place, key, rows=100):
    """Put a column of 4 * rows bytes into the folder."""
    with sheet.writing(place, [(rows,)], np.float32) as page:
        sheet.append(place, page, 0, np.arange(rows))
        return sheet.finish(place, page, key)


def _keys(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_give_the_bits_of_memory_and_a_later_run_reads_them(tmp_path, caplog):
    memory = _derive(None)
    first, again = _on_disk(tmp_path), _on_disk(tmp_path)
    written = _derive(first)
    with caplog.at_level(logging.INFO, logger="jtl.data"):
        read = _derive(again, _never)
    assert "reused from" in caplog.text
    for dataset in (written, read):
        for one, other in zip(
            batches(memory, 8, stop=14), batches(dataset, 8, stop=14), strict=True
        ):
            assert one.keys() == other.keys()
            for name in one:
                assert one[name].dtype == other[name].dtype
                np.testing.assert_array_equal(one[name], other[name])
    assert first.account()["column_mib"] == 0 and first.account()["reused"] == 0
    assert again.account()["reused"] == 2 and again.account()["derive_seconds"] == 0
    size = sum(part[name].nbytes for part in memory.parts for name in NAMES)
    assert first.account()["disk_mib"] == again.account()["disk_mib"] == size / 2**20
    plain = np.load(tmp_path / KEYS["pooled"] / "1.npy")  # anyone can open the files
    np.testing.assert_array_equal(plain, memory.parts[1]["pooled"])


def test_memory_first_then_disk_then_neither(tmp_path, caplog):
    sizes = {name: sum(part[name].nbytes for part in _derive(None).parts) for name in NAMES}
    assert sizes["pooled"] < sizes["hidden_1"]
    place = _on_disk(tmp_path, memory_bytes=sizes["pooled"])
    whole = _derive(place)
    assert isinstance(whole.parts[0]["hidden_1"], np.memmap)
    assert not isinstance(whole.parts[0]["pooled"], np.memmap)
    tight = _on_disk(tmp_path / "other", disk_bytes=sum(sizes.values()) - 1)
    assert derive(make_texts(), 8, _compute, names=NAMES, store=tight) is None
    assert "would take" in caplog.text and "disk left of budgets" in caplog.text
    full = _on_disk(tmp_path / "other", margin_bytes=2**60)  # the disk must keep this free
    assert derive(make_texts(), 8, _compute, names=NAMES, store=full) is None


def test_columns_in_memory_are_kept_where_they_took_long(tmp_path):
    quick = _on_disk(tmp_path, memory_bytes=10**6)
    _derive(quick)
    assert not list(tmp_path.iterdir())
    slow = _on_disk(tmp_path, memory_bytes=10**6, keep_seconds=0.0)
    assert not isinstance(_derive(slow).parts[0]["pooled"], np.memmap)
    assert _keys(tmp_path) == sorted(KEYS.values())
    _derive(_on_disk(tmp_path), _never)


def test_nothing_is_written_without_a_budget_of_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _derive(Store(keep_seconds=0.0))
    assert not list(tmp_path.iterdir())
    assert Store().place == tmp_path / "jtl" / "columns"


@pytest.mark.parametrize("damage", ["flip", "cut", "no index", "half an index", "no file"])
def test_a_damaged_column_is_computed_again_with_a_warning(damage, tmp_path, caplog):
    good = np.array(_derive(_on_disk(tmp_path)).parts[0]["pooled"])
    file, index = (tmp_path / KEYS["pooled"] / name for name in ("0.npy", "column.json"))
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    {
        "flip": lambda: file.write_bytes(raw),
        "cut": lambda: os.truncate(file, len(raw) - 8),
        "no index": index.unlink,
        "half an index": lambda: index.write_text(index.read_text()[:20]),
        "no file": file.unlink,
    }[damage]()
    place = _on_disk(tmp_path)
    again = _derive(place)
    assert "is damaged" in caplog.text and "computed again" in caplog.text
    assert place.account()["reused"] == 1  # the other column
    np.testing.assert_array_equal(again.parts[0]["pooled"], good)
    _derive(_on_disk(tmp_path), _never)  # and it is whole again


def test_what_was_unused_longest_is_removed_but_never_what_is_in_use(tmp_path):
    place = _on_disk(tmp_path, disk_bytes=3000)  # each file is 128 + 400 bytes
    used = _write(place, "1" * 32)
    for number, key in enumerate(("2" * 32, "3" * 32, "4" * 32)):
        _write(place, key)
        os.utime(tmp_path / key / "column.json", (1000 + number,) * 2)
    os.utime(tmp_path / ("1" * 32) / "column.json", (1, 1))
    assert store.find(place, "2" * 32) is not None  # now it is the last that was used
    _write(place, "5" * 32, rows=300)
    assert _keys(tmp_path) == ["1" * 32, "2" * 32, "4" * 32, "5" * 32]
    np.testing.assert_array_equal(used[0], np.arange(100))
    assert store.room(place) == 3000 - 528
    with pytest.raises(store.Unwritable, match="0.0 MiB, 0.0 of them in use"):
        _write(place, "6" * 32, rows=700)
    del used
    assert store.room(place) == 3000


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "0.npy").write_bytes(bytes(5000))
    place = _on_disk(tmp_path, disk_bytes=900)
    _write(place, "1" * 32)
    _write(place, "2" * 32)
    assert _keys(tmp_path) == ["2" * 32, "thesis"]


def test_the_first_of_two_runs_wins_and_both_read_the_same(tmp_path):
    place = _on_disk(tmp_path)
    with (
        sheet.writing(place, [(3,)], np.float32) as one,
        sheet.writing(place, [(3,)], np.float32) as other,
    ):
        sheet.append(place, one, 0, np.zeros(3))
        sheet.append(place, other, 0, np.ones(3))
        assert store.find(place, "k" * 32) is None  # nobody sees a column before it is whole
        first = sheet.finish(place, other, "k" * 32)
        second = sheet.finish(place, one, "k" * 32)
    np.testing.assert_array_equal(first[0], np.ones(3))
    np.testing.assert_array_equal(second[0], np.ones(3))
    assert _keys(tmp_path) == ["k" * 32]


def test_an_error_while_computing_leaves_nothing(tmp_path):
    calls = []

    def compute(batch):
        calls.append(batch)
        if len(calls) == 4:
            raise OSError("an image cannot be read")
        return _compute(batch)

    with pytest.raises(OSError, match="an image"):
        derive(make_texts(), 8, compute, names=NAMES, store=_on_disk(tmp_path), keys=KEYS)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_takes_the_plain_path(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sheet.json, "dumps", full)
    done = derive(make_texts(), 8, _compute, names=NAMES, store=_on_disk(tmp_path), keys=KEYS)
    assert done is None and "No space left" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_takes_the_plain_path(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    place = _on_disk(tmp_path / "file" / "columns")
    assert derive(make_texts(), 8, _compute, names=NAMES, store=place, keys=KEYS) is None
    assert "cannot be written" in caplog.text


def test_columns_without_a_key_are_this_runs_alone(tmp_path):
    place = _on_disk(tmp_path)
    whole = _derive(place, keys=None)
    assert all(name.startswith(store.NEW) for name in _keys(tmp_path))
    _derive(_on_disk(tmp_path), keys=None)  # computed again
    np.testing.assert_array_equal(whole.parts[0]["pooled"], _derive(None).parts[0]["pooled"])
    assert place.account()["disk_mib"] > 0


WRITER = """
import sys, time, numpy as np
from jtl.data import sheet, store
place = store.Store(disk_bytes=10**6, folder=sys.argv[1])
with sheet.writing(place, [(9,)], np.float32) as page:
    sheet.append(place, page, 0, np.zeros(4))
    print("writing", flush=True)
    time.sleep(60)
"""


def test_after_kill_9_only_a_hidden_folder_is_left_and_goes_when_it_is_old(tmp_path):
    place = _on_disk(tmp_path)
    run = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE)
    with contextlib.closing(run.stdout), run:
        run.stdout.readline()
        (left,) = tmp_path.iterdir()
        os.utime(left, (1, 1))
        _write(place, "1" * 32)
        assert left.exists()  # old, but its writer lives
        run.send_signal(signal.SIGKILL)
    os.utime(left)
    _write(place, "2" * 32)
    assert left.exists()  # young: its writer may be about to lock it
    os.utime(left, (time.time() - 4000,) * 2)
    _write(place, "3" * 32)
    assert not left.exists()


def test_contents_are_the_data_not_their_name():
    texts, images = make_texts(), make_images()
    assert texts.contents == make_texts().contents != make_texts(seed=1).contents
    with_column = derive(texts, 8, _compute, names=NAMES)
    assert with_column is not None and with_column.contents == texts.contents
    assert images.read is not None and images.contents == make_images().contents
    assert images.contents != make_images(rows=12).contents
    json.dumps([texts.contents, images.contents])
