"""Fill a tree with the weights of a checkpoint and say what happened to each of them."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jtl.weights.checkpoint import Checkpoint
from jtl.weights.rename import Rule, normalise, shape_to_ours, to_ours, torch_name
from jtl.weights.report import LoadReport

_BUFFERS = re.compile(r"(.*\.)?(position_ids|num_batches_tracked|relative_position_index)")
_WRAPPERS = ("params/", "batch_stats/")
Place = Callable[[str, np.ndarray], jax.Array]


def fill(
    template: Mapping[str, Any],
    checkpoint: Checkpoint,
    *,
    rules: Iterable[Rule] = (),
    aliases: Iterable[tuple[str, str]] = (),
    place: Place | None = None,
) -> tuple[dict[str, Any], LoadReport]:
    """Return the template with its leaves read from the checkpoint, and the four lists.

    Leaves are read, converted and placed one after another, so that no more than one of them is
    in the memory of the host beside what is placed there.

    Args:
        template: `{"params": tree, "stats": tree}`, or any such dict of trees, whose leaves have
            shape and dtype. The outer names are no part of the leaves' names.
        checkpoint: of `weights.read`.
        rules: see `rename.torch_name`.
        aliases: see `rename.normalise`; applied to the names of the checkpoint.
        place: from the path of a leaf (`a/b/kernel`, without the outer name) and its array, in
            our layout and the template's dtype, to the array on its devices: for instance
            `lambda path, array: jax.device_put(array, shardings[path])`. None takes the default
            device.

    Returns:
        The trees as jax arrays of the template's dtypes; a leaf that is not in the checkpoint, or
        has another shape there, comes back as it was in the template. Check the report before use.

    Raises:
        ValueError: two tensors of the checkpoint, or two leaves of ours, have the same name.

    >>> from pathlib import Path
    >>> from jtl.weights.checkpoint import Tensor
    >>> stored = {"a.weight": np.array([[1.0, 2.0]]), "b": np.zeros(3)}
    >>> names = {name: Tensor(value.shape, value.dtype) for name, value in stored.items()}
    >>> checkpoint = Checkpoint("torch", names, stored.__getitem__, {}, Path("x"))
    >>> template = {"params": {"a": {"kernel": jnp.zeros((2, 1))}}}
    >>> trees, report = fill(template, checkpoint)
    >>> trees["params"]["a"]["kernel"].tolist(), report.unexpected
    ([[1.0], [2.0]], ('b',))
    """
    rules = tuple(rules)
    stored = _stored(checkpoint, rules, tuple(aliases))
    flat: dict[str, dict[str, Any]] = {
        collection: dict(flatten_dict(tree, sep="/")) for collection, tree in template.items()
    }
    wanted = _wanted([path for leaves in flat.values() for path in leaves], rules)
    loaded, fresh, wrong = [], [], []
    for leaves in flat.values():
        for path, leaf in leaves.items():
            name, layout = wanted[path]
            if name not in stored:
                fresh.append(path)
                continue
            fault = _fault(checkpoint, stored[name], leaf, layout)
            if not fault:
                leaves[path] = _placed(checkpoint, stored[name], path, leaf, layout, place)
            (wrong if fault else loaded).append(f"{path}: {fault}" if fault else path)
    read = {name for name, _ in wanted.values()}
    left = (name for name in stored if name not in read and not _BUFFERS.fullmatch(name))
    trees = {collection: unflatten_dict(leaves, sep="/") for collection, leaves in flat.items()}
    return trees, LoadReport(tuple(loaded), tuple(fresh), tuple(left), tuple(wrong))


def _wanted(paths: Iterable[str], rules: tuple[Rule, ...]) -> dict[str, tuple[str, str]]:
    """Map each leaf to its torch name and layout; no two leaves read one tensor."""
    wanted = {path: torch_name(path, rules) for path in paths}
    readers: dict[str, str] = {}
    for path, (name, _) in wanted.items():
        if name in readers:
            raise ValueError(
                f"the leaves {readers[name]!r} and {path!r} would both read {name!r}; "
                "give them rules with different names"
            )
        readers[name] = path
    return wanted


def _stored(
    checkpoint: Checkpoint, rules: tuple[Rule, ...], aliases: tuple[tuple[str, str], ...]
) -> dict[str, str]:
    """Map each name in torch's spelling to the name under which the checkpoint has it."""
    stored: dict[str, str] = {}
    for original in checkpoint.names:
        name = original
        if checkpoint.layout != "torch":
            wrapper = next((w for w in _WRAPPERS if name.startswith(w)), "")
            name = normalise(name.removeprefix(wrapper).replace("/", "."), aliases)
            name = torch_name(name.replace(".", "/"), rules)[0]
        else:
            name = normalise(name, aliases)
        if name in stored:
            raise ValueError(
                f"the checkpoint has both {stored[name]!r} and {original!r}, which are one weight "
                f"({name!r}) after the aliases; drop one of them from the file"
            )
        stored[name] = original
    return stored


def _fault(checkpoint: Checkpoint, name: str, leaf: Any, layout: str) -> str:
    """Return what keeps a stored tensor from being this leaf, "" where it fits."""
    shape, dtype = checkpoint.names[name]
    layout = layout if checkpoint.layout == "torch" else "same"
    same_kind = _is_float(dtype) == _is_float(leaf.dtype)
    if shape_to_ours(shape, layout) == tuple(leaf.shape) and same_kind:
        return ""
    there = f"checkpoint {jnp.dtype(dtype).name} {shape}"
    return f"{there} model {jnp.dtype(leaf.dtype).name} {tuple(leaf.shape)}"


def _placed(
    checkpoint: Checkpoint, name: str, path: str, leaf: Any, layout: str, place: Place | None
) -> jax.Array:
    array = checkpoint.get(name)
    if checkpoint.layout == "torch":
        array = to_ours(array, layout)
    if place is None:
        placed = jnp.asarray(array, dtype=leaf.dtype)
    else:
        placed = place(path, np.asarray(array, dtype=leaf.dtype))
    # Copies to a device run behind: without a wait, arrays of the host would pile up.
    return jax.block_until_ready(placed)


def _is_float(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))
