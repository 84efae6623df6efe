"""Carriers become folders of Hugging Face: photographs' classes, zips, recordings, tensors."""

import json
import struct
import wave
import zipfile

import numpy as np
import pytest

from benchmarks.assets import efficientnet, mpnet, speech, table, tensors
from jtl.data.images import load_image_inputs
from jtl.weights.files import Tensor, read_safetensors


@pytest.fixture
def folders(tmp_path):
    """The folder of what was fetched, and that of the asset."""
    fetched, made = tmp_path / "fetched", tmp_path / "made"
    fetched.mkdir()
    made.mkdir()
    return fetched, made


def _write_classes(fetched):
    (fetched / "imagenet_synsets.txt").write_text("n2\nn1\n")
    (fetched / "imagenet_synset_to_lemma.txt").write_text("n1\tdaisy\nn2\tpalace, hall\nn3\tno\n")
    (fetched / efficientnet.WEIGHTS).write_bytes(b"weights")


def test_an_efficientnet_gets_its_config_and_class_names(folders):
    _write_classes(folders[0])
    efficientnet.convert(*folders, variant="lite2")
    config = json.loads((folders[1] / "config.json").read_text())
    assert config["id2label"] == {"0": "palace, hall", "1": "daisy"}
    sizes = ("image_size", "width_coefficient", "depth_coefficient", "variant")
    assert [config[name] for name in sizes] == [260, 1.1, 1.2, "lite2"]
    assert (folders[1] / efficientnet.WEIGHTS).read_bytes() == b"weights"
    assert sorted(file.name for file in folders[1].iterdir()) == sorted(efficientnet.FILES)


def test_an_efficientnet_sees_byte_minus_127_over_128_of_the_middle(folders):
    _write_classes(folders[0])
    efficientnet.convert(*folders, variant="lite0")
    inputs = load_image_inputs(folders[1], {})
    picture = np.full((256, 400, 3), 255, np.uint8)
    picture[:, 72:328] = 127
    picture[:16] = picture[-16:] = 255  # the crop takes 224 of 256 rows
    picture[:, 72:88] = picture[:, 312:328] = 255
    picture[100, 200, 1] = 0
    seen = inputs([picture])["pixel_values"][0]
    assert seen.shape == (224, 224, 3)
    assert seen[84, 112, 1] == pytest.approx(-127 / 128, abs=1e-6)
    seen[84, 112, 1] = 0
    np.testing.assert_allclose(seen, 0, atol=1e-6)
    white = inputs([np.full((300, 300, 3), 255, np.uint8)])["pixel_values"]
    np.testing.assert_allclose(white, 1, atol=1e-6)


def test_the_zip_of_mpnet_is_unpacked(folders):
    with zipfile.ZipFile(folders[0] / mpnet.ARCHIVE, "w") as archive:
        for file in (*mpnet.FILES, "desktop.ini"):
            archive.writestr(f"all-mpnet-base-v2/{file}", file)
    mpnet.convert(*folders)
    assert (folders[1] / "1_Pooling" / "config.json").read_text() == "1_Pooling/config.json"
    assert not (folders[1] / "desktop.ini").exists()


def test_bare_samples_get_a_header(folders):
    for name in speech.SOURCES.values():
        (folders[0] / name).write_bytes(struct.pack("<3h", 1, -2, 3))
    speech.convert(*folders)
    with wave.open(str(folders[1] / "digits.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (16_000, 1, 3)
        assert struct.unpack("<3h", file.readframes(3)) == (1, -2, 3)
    assert sorted(file.name for file in folders[1].iterdir()) == sorted(speech.FILES)
    words = json.loads((folders[1] / "words.json").read_text())
    assert words["digits.wav"] == "two nine three four zero"


def test_files_that_need_no_conversion_are_moved(folders):
    (folders[0] / "one.csv").write_text("1")
    table.move(*folders)
    assert (folders[1] / "one.csv").read_text() == "1"


def test_tensors_are_written_one_by_one(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float16).reshape(2, 3).T, "b": np.float32([7]), "c": None}
    arrays["c"] = np.zeros((0, 2), np.float32)
    names = {name: Tensor(array.shape, array.dtype) for name, array in arrays.items()}
    tensors.write(tmp_path / "model.safetensors", names, arrays.__getitem__)
    found, get = read_safetensors(tmp_path / "model.safetensors")
    assert found == names
    assert (tmp_path / "model.safetensors").read_bytes()[0] % 8 == 0  # so that data are aligned
    for name, array in arrays.items():
        np.testing.assert_array_equal(get(name), array)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    names = {"a": Tensor((2,), np.dtype(np.float32))}
    with pytest.raises(ValueError, match=r"'a' is float32\(3,\); announced was float32\(2,\)"):
        tensors.write(tmp_path / "model.safetensors", names, lambda _: np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="written are"):
        tensors.write(tmp_path / "x", {"a": Tensor((2,), np.dtype(np.int8))}, lambda _: None)
