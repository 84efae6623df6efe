"""Folders of images."""

import numpy as np
import pytest
from PIL import Image

from jtl.data.folders import from_folder


def _image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(path)
    return path


def test_subfolders_are_classes_and_names_give_the_order(tmp_path):
    files = [tmp_path / name for name in ("cat/10.PNG", "cat/2.png", "dog/deep/1.jpg")]
    for file in reversed(files):
        _image(file)
    (tmp_path / "cat/notes.txt").write_text("no image")
    (tmp_path / "readme.md").write_text("no class")
    _image(tmp_path / ".cache/1.png")
    source = from_folder(tmp_path)
    assert source.columns["image"] == files and source.columns["label"].tolist() == [0, 0, 1]
    assert source.classes == ("cat", "dog")
    wider = from_folder(tmp_path, classes=("ant", "cat", "dog"))
    assert wider.columns["label"].tolist() == [1, 1, 2]
    with pytest.raises(ValueError, match="labels 'dog' of .* are none of the classes"):
        from_folder(tmp_path, classes=("cat",))


def test_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder .*nowhere.*correct the path"):
        from_folder(tmp_path / "nowhere")
    _image(tmp_path / "1.png")
    with pytest.raises(ValueError, match="has no subfolders; it has '1.png'; put the images"):
        from_folder(tmp_path)
    _image(tmp_path / "cat/1.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match="no image in the subfolders 'dog'"):
        from_folder(tmp_path)
