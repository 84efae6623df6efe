"""From a folder, a hub id or a bare config to a `Backbone`."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jtl.models import families, resize
from jtl.models.backbone import UNUSED, Backbone, Family, Rules
from jtl.models.inputs import adapted_inputs, load_inputs
from jtl.models.stated import full_config, opened, pooling_of, stated_pooling
from jtl.weights.checkpoint import Checkpoint
from jtl.weights.load import fill
from jtl.weights.report import LoadReport, check
from jtl.weights.tree import from_tree

Place = Callable[[str, Any], jax.Array]


def load_backbone(
    name: str | Path | Checkpoint,
    *,
    family: str | None = None,
    config: Mapping[str, Any] | None = None,
    pooling: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    place: Place | None = None,
    key: jax.Array | None = None,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    new_channels: str = "repeat",
    allow_fresh: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> Backbone:
    """Load a pretrained backbone with the inputs that it was trained on.

    Args:
        name: a folder, a file of weights, `package:IMPORTNAME/path`, a hub id, or a checkpoint that
            has been opened (`weights.united` of several).
        family: a `model_type`; None takes what the config states. It chooses a part of a larger
            checkpoint ("clip_vision_model"), or says what a file without a config is.
        config: the config in place of `config.json`, for a checkpoint that has none.
        pooling: how `out["pooled"]` is made; None takes what the checkpoint states (jtl's and
            sentence-transformers' do), else the family's own.
        dtype: of the computation.
        param_dtype: in which the weights are kept; training wants float32, "bfloat16" halves the
            memory of what is held or only read.
        place: `(path, array) -> jax array`, to put each leaf onto its devices as it is read; None
            puts it on the default device.
        key: for weights that the checkpoint does not have; None is `jax.random.key(0)`.
        image_size: (height, width) of the images, or one number for both, where it is not the
            checkpoint's: the positions are interpolated and the inputs are made at that size.
        channels: of the images, where their number is not the checkpoint's.
        new_channels: how the first convolution reads them; see `layers.adapt_channels`.
        allow_fresh: regexes of leaves that the checkpoint may lack; they get initial values.
        allow_unexpected: regexes of checkpoint names that no leaf reads.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, of a family that is not built here,
            or does not fit; `weights.check` says how the last can be excused.
    """
    dtype, param_dtype = _floats("dtype", dtype), _floats("param_dtype", param_dtype)
    checkpoint, row, config = opened(name, family=family, config=config)
    name = str(checkpoint.folder) if isinstance(name, Checkpoint) else str(name)
    pooling = pooling_of(row, pooling or stated_pooling(checkpoint, row))
    trees, module, report = _filled(
        checkpoint,
        *(row, config, pooling, dtype, param_dtype, place),
        fresh=allow_fresh,
        unexpected=allow_unexpected,
        source=name,
    )
    trees = _complete(trees, module, row.example(config), key)
    stated = {} if row.longest is None else {"max_position_embeddings": row.longest(config)}
    inputs = load_inputs(
        checkpoint.folder, row.modality, {**config, **stated}, published=row.inputs
    )
    if image_size is not None or channels is not None:
        sizes: Any = dict(image_size=image_size, channels=channels, new_channels=new_channels)
        trees["params"], config = resize.adapted(row, trees["params"], config, **sizes, place=place)
        module = row.make(config, pooling, jnp.dtype(dtype))
        inputs = adapted_inputs(inputs, image_size, channels)
    return _backbone(row, config, pooling, module, trees, inputs, name, report)


def from_flax(
    model: Any, *, inputs: Any = None, pooling: str | None = None, dtype: Any = jnp.float32
) -> Backbone:
    """Return a `FlaxPreTrainedModel` of transformers 4 as a backbone: its own arrays, not copied.

    Any object will do that has `config` (with `to_dict`, or a dict) and `params` under the names of
    the Flax checkpoints. A head in it is left out; heads are attached.

    Args:
        model: of a class with a backbone of the table's.
        inputs: the preprocessing, such as `data.load_text_inputs(folder, config)`; None where
            batches are made by hand.
        pooling: as for `load_backbone`.
        dtype: of the computation.

    Raises:
        ValueError: no family reads it, or its weights do not fit.
    """
    stated = model.config if isinstance(model.config, Mapping) else model.config.to_dict()
    row = families.family(stated.get("model_type"), f"the {type(model).__name__}")
    config = full_config(row, stated)
    checkpoint = from_tree(model.params, config)
    checkpoint = checkpoint if row.layout is None else row.layout(checkpoint, config)
    pooling, source = pooling_of(row, pooling), type(model).__name__
    trees, module, report = _filled(
        checkpoint, row, config, pooling, dtype, jnp.float32, None, source=source
    )
    trees = _complete(trees, module, row.example(config), None)
    return _backbone(row, config, pooling, module, trees, inputs, source, report)


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
        family: a `model_type` of `families.TABLE`.
        config: fields of the family's `config.json`; transformers' defaults stand for the others.
        key: for the weights.
        inputs: the preprocessing; None where batches are made by hand.
        pooling: how `out["pooled"]` is made; None is the family's own.
        dtype: of the computation; the weights are float32.

    Raises:
        ValueError: the family or the pooling is not known.
    """
    row = families.family(family, "the call of new_backbone")
    config = full_config(row, config)
    pooling = pooling_of(row, pooling)
    module, template = _skeleton(row, config, pooling, jnp.dtype(dtype), jnp.dtype(jnp.float32))
    trees = _complete(template, module, row.example(config), key)
    return _backbone(row, config, pooling, module, trees, inputs, "scratch", None)


def _skeleton(
    family: Family, config: Mapping[str, Any], pooling: str, dtype: Any, param_dtype: Any
) -> tuple[Any, dict[str, Any]]:
    """Return the module and the shapes of its params and stats; nothing is computed."""
    module = family.make(config, pooling, dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), family.example(config))

    def kept(leaf: Any) -> Any:
        floats = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, param_dtype if floats else leaf.dtype)

    params = jax.tree.map(kept, shapes["params"])
    return module, {"params": params, "stats": shapes.get("batch_stats", {})}


def _floats(name: str, dtype: Any) -> Any:
    """Return a float dtype by its name, or as it is."""
    try:
        made = jnp.dtype(dtype)
    except TypeError:
        made = None
    if made is None or not jnp.issubdtype(made, jnp.floating):
        raise ValueError(f"{name} is {dtype!r}, no float type; give 'float32' or 'bfloat16'")
    return made


def _filled(
    checkpoint: Checkpoint,
    row: Family,
    config: Mapping[str, Any],
    pooling: str,
    dtype: Any,
    param_dtype: Any,
    place: Place | None,
    *,
    fresh: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    source: str,
) -> tuple[dict[str, Any], Any, LoadReport]:
    """Return the trees with what the checkpoint has, checked, the module and the report."""
    module, template = _skeleton(row, config, pooling, jnp.dtype(dtype), jnp.dtype(param_dtype))
    trees, report = fill(template, checkpoint, rules=row.rules, aliases=row.aliases, place=place)
    check(
        report,
        allow_fresh=(*row.optional, *fresh),
        allow_unexpected=(*row.ignored, *unexpected),
        source=f"the checkpoint {source!r}",
    )
    trees["params"], report = _without_unused(trees["params"], report, row.groups(config, pooling))
    return trees, module, report


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
    flat: Any = {name: flatten_dict(tree) for name, tree in trees.items()}
    holes = [
        (collection, path)
        for collection, leaves in flat.items()
        for path, leaf in leaves.items()
        if isinstance(leaf, jax.ShapeDtypeStruct)
    ]
    linen = {"params": "params", "stats": "batch_stats"}

    @jax.jit  # only what is returned is computed: one fresh leaf does not cost a whole init
    def initial(key: jax.Array) -> list[Any]:
        made: Any = {name: flatten_dict(tree) for name, tree in module.init(key, example).items()}
        return [
            made[linen[collection]][path].astype(flat[collection][path].dtype)
            for collection, path in holes
        ]

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
        dim=family.dims(config, pooling) if family.dims else family.dim(config),
        config=config,
        family=family,
        pooling=pooling,
        source=source,
        report=report,
    )
