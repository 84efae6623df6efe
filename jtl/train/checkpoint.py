"""Save and restore trees with a JSON record beside them, each save whole or absent; by Orbax.

checkpoints = open_checkpoints("run/checkpoints", fingerprint={"config": config})
save(checkpoints, 100, {"state": state}, {"phase": 1})
latest(checkpoints)                           # {"phase": 1}, or None in a new folder
restore(checkpoints, {"state": state})        # trees as they were, names and shapes checked
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jtl import trees
from jtl.near import listed

_RECORD = "record"


class Checkpoints(NamedTuple):
    """An open folder of checkpoints and what its owner says that they are of."""

    manager: Any
    folder: pathlib.Path
    fingerprint: dict[str, Any]


def open_checkpoints(
    folder: str | pathlib.Path, *, fingerprint: Mapping[str, Any], keep: int = 2
) -> Checkpoints:
    """Open a folder of checkpoints, a new one or that of the same run.

    Args:
        folder: made where it is missing; what a killed save left behind is removed.
        fingerprint: plain data that must be the same whenever the folder is opened: the config.
        keep: how many checkpoints stay.

    Raises:
        ValueError: the folder holds checkpoints with another fingerprint; the message names the
            entries that differ.
    """
    import orbax.checkpoint as ocp

    folder = pathlib.Path(folder).absolute()
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )
    manager = ocp.CheckpointManager(folder, options=options)
    checkpoints = Checkpoints(manager, folder, _plain(fingerprint))
    entry = _entry(checkpoints)
    if entry is not None:
        found = differences(entry["fingerprint"], checkpoints.fingerprint)
        if found:
            close(checkpoints)
            raise ValueError(
                f"the checkpoints in {folder} are of another run: {listed(found)}; go on with "
                "the config that they were made with, or take an empty folder"
            )
    return checkpoints


def save(
    checkpoints: Checkpoints,
    step: int,
    items: Mapping[str, PyTree],
    record: Mapping[str, Any],
    *,
    wait: bool = False,
) -> None:
    """Save trees and a record as one checkpoint; it is written while training goes on.

    Args:
        checkpoints: the open folder.
        step: names the checkpoint; where a later name exists, the next free one is taken.
        items: name -> tree of arrays, which may be donated as soon as this returns.
        record: plain data for JSON.
        wait: return only when it is on disk.
    """
    import orbax.checkpoint as ocp

    last = checkpoints.manager.latest_step()
    flat = {name: _flat(tree) for name, tree in items.items()}
    entry = {
        "fingerprint": checkpoints.fingerprint,
        "arrays": {name: _table(tree) for name, tree in items.items()},
        "record": _plain(record),
    }
    args: dict[str, Any] = {
        name: ocp.args.StandardSave(tree) for name, tree in flat.items() if tree
    }
    args[_RECORD] = ocp.args.JsonSave(entry)
    name = step if last is None else max(step, last + 1)
    checkpoints.manager.save(name, args=ocp.args.Composite(**args), force=True)
    if wait:
        checkpoints.manager.wait_until_finished()


def latest(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """Return the record of the newest checkpoint, None where there is none."""
    entry = _entry(checkpoints)
    return None if entry is None else entry["record"]


def restore(checkpoints: Checkpoints, like: Mapping[str, PyTree]) -> dict[str, Any]:
    """Return the trees of the newest checkpoint, placed on devices as those of `like` are.

    Args:
        checkpoints: the open folder.
        like: name -> tree of arrays with the structure, shapes and dtypes that are expected. What
            it does not name is not read.

    Raises:
        ValueError: no checkpoint; a name, shape or dtype differs from `like` (nothing is cast,
            padded or cut); a file is damaged.
    """
    import orbax.checkpoint as ocp

    entry, step = _entry(checkpoints), checkpoints.manager.latest_step()
    if entry is None:
        raise ValueError(f"{checkpoints.folder} holds no checkpoint; save one before you restore")
    expected = {name: _table(tree) for name, tree in like.items()}
    found = differences({name: entry["arrays"].get(name, {}) for name in like}, expected)
    if found:
        raise ValueError(
            f"checkpoint {step} in {checkpoints.folder} is of another model: "
            f"{listed(found)}; build the model and optimizer that it was made with, or take an "
            "empty folder"
        )
    flat = {name: _flat(tree) for name, tree in like.items()}
    args = {name: ocp.args.StandardRestore(_targets(tree)) for name, tree in flat.items() if tree}
    try:
        arrays = checkpoints.manager.restore(step, args=ocp.args.Composite(**args)) if args else {}
    except Exception as error:
        raise ValueError(
            f"checkpoint {step} in {checkpoints.folder} cannot be read: {error}; remove the folder "
            f"{step} to go on from an older one, if there is one"
        ) from error
    return {name: _unflat(arrays[name] if flat[name] else {}, like[name]) for name in like}


def close(checkpoints: Checkpoints) -> None:
    """Wait until what was saved is on disk, and close the folder."""
    checkpoints.manager.wait_until_finished()
    checkpoints.manager.close()


def differences(saved: Any, now: Any) -> list[str]:
    """Return the entries in which two plain data differ, one line for each.

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 4})
    ['b/c: saved 2, now 3', 'd: saved nothing, now 4']
    """
    old, new = _entries(saved), _entries(now)
    lines = []
    for name in [*old, *(name for name in new if name not in old)]:
        if old.get(name, _NOTHING) != new.get(name, _NOTHING):
            lines.append(f"{name}: saved {_show(old, name)}, now {_show(new, name)}")
    return lines


_NOTHING = object()


def _show(entries: Mapping[str, Any], name: str) -> str:
    return repr(entries[name]) if name in entries else "nothing"


def _entries(data: Any, path: str = "") -> dict[str, Any]:
    if isinstance(data, Mapping) and data:
        items = ((str(key), value) for key, value in data.items())
    elif isinstance(data, list | tuple) and data:
        items = ((str(i), value) for i, value in enumerate(data))
    else:
        return {path: data}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= _entries(value, f"{path}/{key}" if path else key)
    return found


def _plain(data: Any) -> Any:
    return json.loads(json.dumps(data, default=str))


def _entry(checkpoints: Checkpoints) -> dict[str, Any] | None:
    import orbax.checkpoint as ocp

    manager = checkpoints.manager
    manager.wait_until_finished()
    step = manager.latest_step()
    if step is None:
        return None
    args = ocp.args.Composite(**{_RECORD: ocp.args.JsonRestore()})
    return manager.restore(step, args=args)[_RECORD]


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _bare(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _flat(tree: PyTree) -> dict[str, Any]:
    """Return {name: array} without empty arrays, which Orbax refuses."""
    leaves = map(_bare, jax.tree.leaves(tree))
    return {n: x for n, x in zip(trees.names(tree), leaves, strict=True) if np.size(x)}


def _table(tree: PyTree) -> dict[str, str]:
    leaves = map(_bare, jax.tree.leaves(tree))
    return {
        name: f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"
        for name, leaf in zip(trees.names(tree), leaves, strict=True)
    }


def _targets(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Ask for numpy: Orbax commits to a device what was not, which costs another compilation."""
    return {
        n: np.broadcast_to(np.zeros((), jnp.result_type(x)), np.shape(x)) for n, x in flat.items()
    }


def _unflat(arrays: Mapping[str, Any], like: PyTree) -> PyTree:
    leaves = [
        _placed(arrays[name], leaf) if name in arrays else leaf
        for name, leaf in zip(trees.names(like), jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _placed(array: Any, like: Any) -> Any:
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.array(array), impl=jax.random.key_impl(like))
    if isinstance(like, jax.Array):
        return jax.device_put(array, like.sharding) if like.committed else jnp.array(array)
    return np.array(array)
