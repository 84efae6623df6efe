"""Write a trained model as a folder that transformers opens, and read such a folder back.

The folder has `config.json`, `model.safetensors` in PyTorch's names and layouts, and the files of
the tokenizer or image processor. A head that is one of transformers' own (a linear layer on the
pooling that the family's classification class reads, the masked-LM head) lies in
`model.safetensors` and `architectures` names the class. Other heads lie in `head.safetensors`, and
`architectures` names the bare backbone. `jtl.json` says what transformers' files have no place for.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jtl.models import heads as head_kinds
from jtl.models.backbone import Backbone
from jtl.models.load import load_backbone
from jtl.models.load_head import read_head, with_heads
from jtl.models.model import Model, attach_weights, outline
from jtl.models.stated import EXTRA_CONFIG
from jtl.weights.files import Checkpoint, read_config, read_json, read_safetensors
from jtl.weights.load import fill
from jtl.weights.rename import Rule, to_torch, torch_name
from jtl.weights.report import check
from jtl.weights.save import write

_WEIGHTS, _HEADS = "model.safetensors", "head.safetensors"
_FORMAT = 1
_KINDS = {
    "CTC": head_kinds.CTC,
    "CausalLM": head_kinds.CausalLM,
    "CellDecoder": head_kinds.CellDecoder,
    "Contrastive": head_kinds.Contrastive,
    "Decoupled": head_kinds.Decoupled,
    "DenseMap": head_kinds.DenseMap,
    "Distilled": head_kinds.Distilled,
    "Linear": head_kinds.Linear,
    "MaskedImage": head_kinds.MaskedImage,
    "MaskedLM": head_kinds.MaskedLM,
    "Projected": head_kinds.Projected,
    "ReplacedToken": head_kinds.ReplacedToken,
    "Span": head_kinds.Span,
    "TokenLinear": head_kinds.TokenLinear,
    "TokenProjection": head_kinds.TokenProjection,
    "TwoLayer": head_kinds.TwoLayer,
}

# Their classes take the number of outputs from the labels of the config.
_LABELLED = (
    head_kinds.Distilled,
    head_kinds.Linear,
    head_kinds.Projected,
    head_kinds.Span,
    head_kinds.TokenLinear,
    head_kinds.TwoLayer,
)


def export(
    folder: str | Path, model: Model, *, labels: Mapping[str, Sequence[str]] | None = None
) -> Path:
    """Write the model to a folder, which appears whole or not at all.

    Args:
        folder: where to; an earlier export there is replaced.
        model: backbone and heads; its `params` and `stats` are written.
        labels: {head: names of its classes}, () for a regression; None, or a head that is not
            named, gets "0", "1", ... where it has more than one output.

    Raises:
        ValueError: the folder holds something else than an export, or the labels do not fit.
    """
    folder = Path(folder)
    names = _labels(model, labels or {})
    chosen = _transformers_head(model)
    if folder.exists() and any(folder.iterdir()) and not (folder / EXTRA_CONFIG).exists():
        there = sorted(entry.name for entry in folder.iterdir())[:10]
        raise ValueError(
            f"{str(folder)!r} is no earlier export and is not empty; it holds {there}; "
            "give a new folder"
        )
    with _replaced(folder) as place:
        _write_json(place / "config.json", _config(model, chosen, names))
        write(place / _WEIGHTS, _tensors(model, chosen))
        # A norm's statistics have other names than its parameters, so both lie side by side.
        rest = [_but(tree.get("heads", {}), chosen) for tree in (model.params, model.stats)]
        flat = {**flatten_dict(rest[0], sep="/"), **flatten_dict(rest[1], sep="/")}
        others = {path: np.asarray(leaf) for path, leaf in flat.items()}
        if others:
            write(place / _HEADS, others)
        _write_json(place / EXTRA_CONFIG, _extra(model, chosen, names))
        if model.backbone.inputs is not None:
            model.backbone.inputs.save(place)
    return folder


def import_model(folder: str | Path) -> Model:
    """Read an exported folder back, or a transformers folder whose class has a head known here.

    Raises:
        ValueError: the folder is damaged, or a head in it is of a kind that jtl does not have.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not (folder / EXTRA_CONFIG).is_file():
        return _from_transformers(folder, config)
    rows = _head_rows(folder)
    backbone = load_backbone(folder)
    modules = {name: _module(name, row) for name, row in rows.items()}
    params, stats = outline(backbone, modules)
    inside = {name: row["class"] for name, row in rows.items() if row["class"]}
    rest = {"params": _but(params, *inside), "stats": _but(stats, *inside)}
    if jax.tree.leaves(rest["params"]):
        names, get = read_safetensors(folder / _HEADS)
        checkpoint = Checkpoint("flax", names, get, {}, folder)
        rest, report = fill(rest, checkpoint)
        check(report, source=f"{str(folder / _HEADS)!r}")
    for name, kind in inside.items():
        own = read_head(folder, backbone, kind)
        rest["params"][name] = own.params
        rest["stats"] |= {name: own.stats} if own.stats else {}
    own = {name: rest["params"].get(name, {}) for name in modules}
    return attach_weights(backbone, modules, own, rest["stats"])


def read_labels(folder: str | Path) -> dict[str, tuple[str, ...]]:
    """Return {head: names of its classes} of an exported folder, () for a regression."""
    folder = Path(folder)
    if (folder / EXTRA_CONFIG).is_file():
        return {name: tuple(row["labels"]) for name, row in _head_rows(folder).items()}
    names = read_config(folder).get("id2label", {})
    return {"head": tuple(names[str(i)] for i in range(len(names)))}


def _from_transformers(folder: Path, config: Mapping[str, Any]) -> Model:
    backbone = load_backbone(folder)
    stated = config.get("architectures") or [None]
    classes = {row.class_name: kind for kind, row in backbone.family.heads.items()}
    if stated[0] not in classes:
        raise ValueError(
            f"{str(folder)!r} has no {EXTRA_CONFIG} and states the class {stated[0]!r}; heads are "
            f"read from {sorted(map(str, classes))}; load_backbone reads its backbone alone"
        )
    return with_heads(folder, backbone, {"head": classes[str(stated[0])]})


def _head_rows(folder: Path) -> dict[str, Any]:
    extra = read_json(folder / EXTRA_CONFIG)
    if extra.get("format") != _FORMAT:
        raise ValueError(
            f"{str(folder / EXTRA_CONFIG)!r} is of format {extra.get('format')!r}; this jtl reads "
            f"{_FORMAT}; export the model again, or install the jtl that wrote it"
        )
    return extra["heads"]


def _module(name: str, row: Mapping[str, Any]) -> Any:
    if row["kind"] not in _KINDS:
        raise ValueError(
            f"head {name!r} is of kind {row['kind']!r}; jtl reads back {sorted(_KINDS)}; attach "
            f"it to load_backbone(folder) by hand, with its weights of {_HEADS}"
        )
    # JSON has no tuples, and a module's fields are hashed.
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in row["fields"].items()}
    return _KINDS[row["kind"]](**fields)


def _class_kind(backbone: Backbone, head: Any) -> str | None:
    """Return under which key of the family's `heads` transformers has this head, or None."""
    for kind, row in backbone.family.heads.items():
        # A head's own pooling is over tokens, the class reads what the family calls pooled.
        own = getattr(head, "pooling", None)
        fits = row.pooling is None or (own is None and backbone.pooling == row.pooling)
        if type(head) is not row.module or not fits:
            continue
        if all(getattr(head, name) == value for name, value in row.fields.items()):
            return kind
    return None


def _transformers_head(model: Model) -> str | None:
    """Return the head that goes into `model.safetensors`: the first that a class has."""
    return next((n for n, head in model.heads.items() if _class_kind(model.backbone, head)), None)


def _labels(model: Model, labels: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    unknown = sorted(set(labels) - set(model.heads))
    if unknown:
        raise ValueError(
            f"labels are given for {unknown}; the model has the heads {sorted(model.heads)}; "
            "name one of them"
        )
    names = {}
    for name, head in model.heads.items():
        outputs = getattr(head, "outputs", 0)
        default = [str(i) for i in range(outputs)] if outputs > 1 else []
        names[name] = tuple(str(label) for label in labels.get(name, default))
        if names[name] and (len(names[name]) != outputs or len(set(names[name])) != outputs):
            raise ValueError(
                f"head {name!r} has {outputs} outputs and {len(names[name])} labels "
                f"({list(names[name])[:10]}); give each output one label of its own"
            )
    return names


def _config(
    model: Model, chosen: str | None, names: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Return the config with the class, the dtype in which the weights lie, and the labels."""
    stale = ("architectures", "torch_dtype", "dtype", "problem_type", "num_labels")
    config = {key: value for key, value in model.backbone.config.items() if key not in stale}
    family = model.backbone.family
    head = model.heads[chosen] if chosen else None
    kind = _class_kind(model.backbone, head)
    class_name = family.heads[kind].class_name if kind else family.class_name
    leaf = jax.tree.leaves(model.params["backbone"])[0]
    config.update(architectures=[class_name], dtype=str(leaf.dtype))
    if config.get("pad_token_id") is None:
        config.update(_padding(model))
    if isinstance(head, head_kinds.MaskedLM | head_kinds.CausalLM) and kind:
        config["tie_word_embeddings"] = head.tied
    if kind:
        config.update(family.heads[kind].stated(head))
    if isinstance(head, _LABELLED) and kind:
        outputs = head.outputs
        words = names[chosen or ""] or tuple(f"LABEL_{i}" for i in range(outputs))
        config["id2label"] = {str(i): word for i, word in enumerate(words)}
        config["label2id"] = {word: i for i, word in enumerate(words)}
        regression = not names[chosen or ""]
        config["problem_type"] = "regression" if regression else "single_label_classification"
    return config


def _padding(model: Model) -> dict[str, Any]:
    """Return the padding token, which decoders' configs do not state and their classes ask for."""
    tokenizer = getattr(model.backbone.inputs, "tokenizer", None)
    if tokenizer is None or "pad_token_id" not in model.backbone.config:
        return {}
    return {"pad_token_id": tokenizer.pad_token_id}


def _extra(
    model: Model, chosen: str | None, names: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    rows = {
        name: {
            "kind": type(head).__name__,
            "fields": _fields(head),
            "class": _class_kind(model.backbone, head) if name == chosen else None,
            "labels": list(names[name]),
        }
        for name, head in model.heads.items()
    }
    return {"format": _FORMAT, "pooling": model.backbone.pooling, "heads": rows}


def _fields(head: Any) -> dict[str, Any]:
    own = (field.name for field in dataclasses.fields(head))
    return {name: getattr(head, name) for name in own if name not in ("parent", "name")}


def _tensors(model: Model, chosen: str | None) -> dict[str, np.ndarray]:
    """Return the backbone's tensors, and the chosen head's, under the names of their class."""
    family = model.backbone.family
    prefix = _prefix(model, chosen)
    tensors = _renamed(model.params["backbone"], family.rules, prefix)
    statistics = _renamed(model.stats.get("backbone", {}), family.rules, prefix)
    head = {}
    if chosen:
        kind = _class_kind(model.backbone, model.heads[chosen])
        rules = family.heads[str(kind)].rules
        own = _renamed(model.stats.get("heads", {}).get(chosen, {}), rules, "")
        head = {**_renamed(model.params["heads"].get(chosen, {}), rules, ""), **own}
        statistics |= own
    return {**tensors, **statistics, **_counters(statistics), **head}


def _counters(statistics: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the number of batches that PyTorch has beside each running mean; nobody counts it."""
    return {
        name.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64)
        for name in statistics
        if name.endswith(".running_mean")
    }


def _but(heads: Mapping[str, Any], *names: str | None) -> dict[str, Any]:
    return {name: tree for name, tree in heads.items() if name not in names}


def _prefix(model: Model, chosen: str | None) -> str:
    """Return what stands before the backbone's names in the class of the chosen head."""
    if chosen is None:
        return ""
    family = model.backbone.family
    own = family.heads[str(_class_kind(model.backbone, model.heads[chosen]))].prefix
    shared = family.model_type if family.prefix is None else family.prefix
    prefix = shared if own is None else own
    return f"{prefix}." if prefix else ""


def _renamed(tree: Mapping[str, Any], rules: Sequence[Rule], prefix: str) -> dict[str, np.ndarray]:
    tensors = {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        name, layout = torch_name(path, rules)
        tensors[prefix + name] = to_torch(np.asarray(leaf), layout)
    return tensors


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """Give a folder beside `folder` to write to; it takes its place when all went well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder.parent / f".{folder.name}.unfinished-{os.getpid()}"
    old = folder.parent / f".{folder.name}.replaced-{os.getpid()}"
    place.mkdir()
    try:
        yield place
        if folder.exists():
            folder.rename(old)
        place.rename(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
