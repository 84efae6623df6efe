"""From a folder, a hub id or a bare config to a `Backbone`; pretrained heads likewise."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jtl.models.backbone import UNUSED, Backbone, Family, Rules
from jtl.models.families import FAMILIES, OWN
from jtl.models.heads import Linear, MaskedLM
from jtl.models.model import attach
from jtl.weights.files import Checkpoint, read, read_json
from jtl.weights.hub import locate
from jtl.weights.load import fill
from jtl.weights.report import LoadReport, check

EXTRA_CONFIG = "jtl.json"
_POOLING_CONFIG = "1_Pooling/config.json"
_INPUT_FILES = {
    "text": ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model"),
    "image": ("preprocessor_config.json", "processor_config.json"),
}


@dataclasses.dataclass(frozen=True)
class MissingInputs:
    """Stands for the preprocessing of a checkpoint that has none: its use is an error."""

    modality: str
    folder: str

    def __call__(self, raw: Any) -> Any:
        """Refuse: nobody knows what these weights were fed with."""
        files = _INPUT_FILES[self.modality]
        raise ValueError(
            f"{self.folder!r} has no preprocessing for {self.modality} inputs: none of {files}; "
            "put the files of the original checkpoint there, or make the batches by hand"
        )

    def save(self, folder: str | Path) -> None:
        """Write nothing: there is nothing."""


def load_backbone(
    name: str | Path,
    *,
    pooling: str | None = None,
    dtype: Any = jnp.float32,
    key: jax.Array | None = None,
    allow_fresh: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> Backbone:
    """Load a pretrained backbone with the inputs that it was trained on.

    Args:
        name: a folder, `package:IMPORTNAME/path`, or a hub id.
        pooling: how `out["pooled"]` is made; None takes what the checkpoint states (jtl's and
            sentence-transformers' do), else the family's own.
        dtype: of the computation; the weights are float32.
        key: for weights that the checkpoint does not have; None is `jax.random.key(0)`.
        allow_fresh: regexes of leaves that the checkpoint may lack; they get initial values.
        allow_unexpected: regexes of checkpoint names that no leaf reads.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, of a family that is not built here,
            or does not fit; `weights.check` says how the last can be excused.
    """
    checkpoint = read(locate(str(name)))
    family = _family(checkpoint.config.get("model_type"), f"{str(checkpoint.folder)!r}")
    config = full_config(family.model_type, checkpoint.config)
    pooling = _pooling(family, pooling or _stated_pooling(checkpoint.folder, family))
    module, template = _skeleton(family, config, pooling, jnp.dtype(dtype))
    trees, report = fill(template, checkpoint, rules=family.rules, aliases=family.aliases)
    check(
        report,
        allow_fresh=(*family.optional, *allow_fresh),
        allow_unexpected=(*family.ignored, *allow_unexpected),
        source=f"the checkpoint {str(name)!r}",
    )
    trees["params"], report = _without_unused(
        trees["params"], report, family.groups(config, pooling)
    )
    trees = _complete(trees, module, family.example(config), key)
    inputs = _load_inputs(family, checkpoint)
    return _backbone(family, config, pooling, module, trees, inputs, str(name), report)


def new_backbone(
    family: str,
    config: Mapping[str, Any],
    *,
    key: jax.Array,
    inputs: Any = None,
    pooling: str | None = None,
    dtype: Any = jnp.float32,
) -> Backbone:
    """Make a backbone with random weights, to train from scratch or to test with.

    Args:
        family: a `model_type` of `FAMILIES` or `OWN`.
        config: fields of the family's `config.json`; transformers' defaults stand for the others.
        key: for the weights.
        inputs: the preprocessing; None where batches are made by hand.
        pooling: how `out["pooled"]` is made; None is the family's own.
        dtype: of the computation; the weights are float32.

    Raises:
        ValueError: the family or the pooling is not known.
    """
    row = _family(family, "the call of new_backbone")
    config = full_config(family, config)
    pooling = _pooling(row, pooling)
    module, template = _skeleton(row, config, pooling, jnp.dtype(dtype))
    trees = _complete(template, module, row.example(config), key)
    return _backbone(row, config, pooling, module, trees, inputs, "scratch", None)


def load_head(name: str | Path, backbone: Backbone, kind: str) -> tuple[Any, dict[str, Any]]:
    """Return a pretrained head as `(module, params)`, to be attached to its backbone.

    Args:
        name: the checkpoint, as for `load_backbone`.
        backbone: what the head stands on.
        kind: "masked_lm" or "classification": a key of the family's `heads`.

    Raises:
        ValueError: the checkpoint has no such head, or it reads another pooling.
    """
    family = backbone.family
    if kind not in family.heads:
        raise ValueError(
            f"{family.model_type} has no pretrained head {kind!r}; it has {sorted(family.heads)}"
        )
    checkpoint = read(locate(str(name)))
    module = _head(kind, full_config(family.model_type, checkpoint.config), backbone)
    template = attach(backbone, {"head": module}, key=jax.random.key(0)).params["heads"]["head"]
    trees, report = fill(
        {"params": template}, checkpoint, rules=family.heads[kind], aliases=family.aliases
    )
    source = f"the {kind} head of the checkpoint {str(name)!r}"
    check(report, allow_unexpected=(".*",), source=source)
    return module, trees["params"]


def full_config(model_type: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with transformers' defaults for the fields that it does not state.

    A family that transformers does not have keeps the defaults in its own file.

    >>> full_config("bert", {"hidden_size": 48})["layer_norm_eps"]
    1e-12

    Raises:
        ValueError: transformers refuses a field.
    """
    if model_type in OWN:
        return {"model_type": model_type, **config}
    from transformers import AutoConfig

    own = {name: value for name, value in config.items() if name != "model_type"}
    try:
        # All fields go in: some defaults follow from others (stage names from depths, labels).
        whole = AutoConfig.for_model(model_type, **own)
    except Exception as error:  # each field has its own check there, with its own kind of error
        raise ValueError(
            f"transformers refuses this {model_type} config: {' '.join(str(error).split())}; the "
            f"config has {sorted(config)}; correct that field of config.json"
        ) from error
    return {**json.loads(whole.to_json_string(use_diff=False)), **config}


def _family(model_type: Any, source: str) -> Family:
    known = {**FAMILIES, **OWN}
    if model_type not in known:
        raise ValueError(
            f"{source} asks for model_type {model_type!r}; jtl has {sorted(known)}; "
            "give a checkpoint of one of these"
        )
    return known[model_type]


def _pooling(family: Family, pooling: str | None) -> str:
    pooling = pooling or family.poolings[0]
    if pooling not in family.poolings:
        raise ValueError(
            f"pooling {pooling!r} is not known to {family.model_type}; "
            f"it has {family.poolings}; give one of them as pooling="
        )
    return pooling


def _stated_pooling(folder: Path, family: Family) -> str | None:
    """Return the pooling that the folder of the checkpoint states, None where it states none."""
    if (folder / EXTRA_CONFIG).is_file():
        return read_json(folder / EXTRA_CONFIG).get("pooling")
    if not (folder / _POOLING_CONFIG).is_file():
        return None
    stated = read_json(folder / _POOLING_CONFIG)
    modes = {mode: stated.get(f"pooling_mode_{mode}_tokens") for mode in ("mean", "max")}
    modes["cls"] = stated.get("pooling_mode_cls_token")
    chosen = [mode for mode, on in modes.items() if on]
    if len(chosen) == 1 and chosen[0] in family.poolings:
        return chosen[0]
    raise ValueError(
        f"{_POOLING_CONFIG} of {str(folder)!r} asks for {chosen or stated}; {family.model_type} "
        f"has {family.poolings}; choose one of them by pooling="
    )


def _skeleton(
    family: Family, config: Mapping[str, Any], pooling: str, dtype: Any
) -> tuple[Any, dict[str, Any]]:
    """Return the module and the shapes of its params and stats; nothing is computed."""
    module = family.make(config, pooling, dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), family.example(config))
    return module, {"params": shapes["params"], "stats": shapes.get("batch_stats", {})}


def _without_unused(
    params: dict[str, Any], report: LoadReport, groups: Rules
) -> tuple[dict[str, Any], LoadReport]:
    """Drop what is neither in the checkpoint nor read by an output, rather than invent it."""
    unused = [rule for rule, label in groups if label == UNUSED]
    dropped = {path for path in report.fresh if any(re.fullmatch(rule, path) for rule in unused)}
    flat = flatten_dict(params, sep="/")
    kept = {path: leaf for path, leaf in flat.items() if path not in dropped}
    fresh = tuple(path for path in report.fresh if path not in dropped)
    return unflatten_dict(kept, sep="/"), report._replace(fresh=fresh)


def _complete(
    trees: dict[str, Any], module: Any, example: Mapping[str, Any], key: jax.Array | None
) -> dict[str, Any]:
    """Give the leaves that are shapes only their initial values."""
    flat = {name: flatten_dict(tree) for name, tree in trees.items()}
    holes = [
        (collection, path)
        for collection, leaves in flat.items()
        for path, leaf in leaves.items()
        if isinstance(leaf, jax.ShapeDtypeStruct)
    ]
    linen = {"params": "params", "stats": "batch_stats"}

    @jax.jit  # only what is returned is computed: one fresh leaf does not cost a whole init
    def initial(key: jax.Array) -> list[Any]:
        made = {name: flatten_dict(tree) for name, tree in module.init(key, example).items()}
        return [made[linen[collection]][path] for collection, path in holes]

    if holes:
        values = initial(jax.random.key(0) if key is None else key)
        for (collection, path), value in zip(holes, values, strict=True):
            flat[collection][path] = value
    return {name: unflatten_dict(leaves) for name, leaves in flat.items()}


def _backbone(
    family: Family,
    config: dict[str, Any],
    pooling: str,
    module: Any,
    trees: dict[str, Any],
    inputs: Any,
    source: str,
    report: LoadReport | None,
) -> Backbone:
    return Backbone(
        module=module,
        params=trees["params"],
        stats=trees["stats"],
        groups=family.groups(config, pooling),
        inputs=inputs,
        dim=family.dim(config),
        config=config,
        family=family,
        pooling=pooling,
        source=source,
        report=report,
    )


def _load_inputs(family: Family, checkpoint: Checkpoint) -> Any:
    folder = checkpoint.folder
    if not any((folder / name).is_file() for name in _INPUT_FILES[family.modality]):
        return MissingInputs(family.modality, str(folder))
    if family.modality == "text":
        from jtl.data.text import load_text_inputs

        return load_text_inputs(folder, checkpoint.config)
    from jtl.data.images import load_image_inputs

    return load_image_inputs(folder, checkpoint.config)


def _head(kind: str, config: Mapping[str, Any], backbone: Backbone) -> Any:
    if kind == "masked_lm":
        return MaskedLM(
            dim=backbone.dim,
            vocabulary=config["vocab_size"],
            activation=config["hidden_act"],
            epsilon=config["layer_norm_eps"],
        )
    read_by_class = backbone.family.poolings[0]
    if backbone.pooling != read_by_class:
        raise ValueError(
            f"{backbone.family.classes[kind]} reads pooling {read_by_class!r}; the backbone has "
            f"{backbone.pooling!r}; load it with pooling={read_by_class!r}"
        )
    return Linear(outputs=len(config["id2label"]))
