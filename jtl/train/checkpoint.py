"""Save and restore trees with a JSON record beside them, each save whole or absent; by Orbax.

checkpoints = open_checkpoints("run/checkpoints", fingerprint={"config": config})
save(checkpoints, 100, {"state": state}, {"phase": 1})
latest(checkpoints)                           # {"phase": 1}, or None in a new folder
restore(checkpoints, {"state": state})        # trees as they were, names and shapes checked
"""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import PyTree

from jtl.near import listed
from jtl.train import named
from jtl.train.differences import differences

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
        OSError: the folder cannot be made, or nothing can be written in it.
    """
    import orbax.checkpoint as ocp

    folder = pathlib.Path(folder).absolute()
    _check_writable(folder)
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

    With several processes all call it, each writes the parts of arrays that it has, and the record
    is that of the first.

    Args:
        checkpoints: the open folder.
        step: names the checkpoint; where a later name exists, the next free one is taken.
        items: name -> tree of arrays, which may be donated as soon as this returns.
        record: plain data for JSON.
        wait: return only when it is on disk.

    Raises:
        OSError: this checkpoint cannot be written, or with `wait=False` the one before it; those
            that stand are whole.
    """
    import orbax.checkpoint as ocp

    last = checkpoints.manager.latest_step()
    flat = {name: named.flat(tree) for name, tree in items.items()}
    entry = {
        "fingerprint": checkpoints.fingerprint,
        "arrays": {name: named.table(tree) for name, tree in items.items()},
        "record": _plain(record),
    }
    args: dict[str, Any] = {name: ocp.args.PyTreeSave(tree) for name, tree in flat.items() if tree}
    args[_RECORD] = ocp.args.JsonSave(entry)
    name = step if last is None else max(step, last + 1)
    with _writing(checkpoints):
        checkpoints.manager.save(name, args=ocp.args.Composite(**args), force=True)
        if wait:
            checkpoints.manager.wait_until_finished()


def latest(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """Return the record of the newest checkpoint, None where there is none."""
    entry = _entry(checkpoints)
    return None if entry is None else entry["record"]


def restore(
    checkpoints: Checkpoints,
    like: Mapping[str, PyTree],
    *,
    include: str | Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the trees of the newest checkpoint, placed on devices as those of `like` are.

    A split array is read by parts, each by the device that keeps it, however many devices or
    processes wrote it.

    Args:
        checkpoints: the open folder.
        like: name -> tree of arrays with the structure, shapes and dtypes that are expected. What
            it does not name is not read.
        include: patterns of leaves, "state/params/backbone/*", in which * stands for any text. Only
            these are read and compared; all others stay as they are in `like`. None is all.

    Raises:
        ValueError: no checkpoint; a name, shape or dtype differs from `like` (nothing is cast,
            padded or cut); a pattern that no leaf matches; a file is damaged.
    """
    import orbax.checkpoint as ocp

    entry, step = _entry(checkpoints), checkpoints.manager.latest_step()
    if entry is None:
        raise ValueError(f"{checkpoints.folder} holds no checkpoint; save one before you restore")
    saved = {name: entry["arrays"].get(name, {}) for name in like}
    expected = {name: named.table(tree) for name, tree in like.items()}
    flat = {name: named.flat(tree) for name, tree in like.items()}
    if include is not None:
        patterns = [include] if isinstance(include, str) else list(include)
        named.check_patterns(patterns, saved, expected)
        saved, expected, flat = (named.choose(t, patterns) for t in (saved, expected, flat))
    found = differences(saved, expected)
    if found:
        raise ValueError(
            f"checkpoint {step} in {checkpoints.folder} is of another model: "
            f"{listed(found)}; build the model and optimizer that it was made with, or take an "
            "empty folder"
        )
    args = {name: _read(named.targets(tree)) for name, tree in flat.items() if tree}
    try:
        arrays = checkpoints.manager.restore(step, args=ocp.args.Composite(**args)) if args else {}
    except Exception as error:
        raise ValueError(
            f"checkpoint {step} in {checkpoints.folder} cannot be read: {error}; remove the folder "
            f"{step} to go on from an older one, if there is one"
        ) from error
    return {name: named.unflat(arrays[name] if flat[name] else {}, like[name]) for name in like}


def close(checkpoints: Checkpoints) -> None:
    """Wait until what was saved is on disk, and close the folder.

    Raises:
        OSError: the last checkpoint could not be written; those that stand are whole.
    """
    try:
        with _writing(checkpoints):
            checkpoints.manager.wait_until_finished()
    finally:
        checkpoints.manager.close()


def _check_writable(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"checkpoints cannot be written in {folder}: {error}; give a folder that can be written"
        ) from error


def _read(targets: Mapping[str, Any]) -> Any:
    """Return Orbax's arguments to read these alone; its StandardRestore knows no part."""
    import orbax.checkpoint as ocp

    how = ocp.checkpoint_utils.construct_restore_args(targets)
    return ocp.args.PyTreeRestore(item=targets, restore_args=how, partial_restore=True)


@contextlib.contextmanager
def _writing(checkpoints: Checkpoints) -> Iterator[None]:
    """Say of an error where the last whole checkpoint stands."""
    try:
        yield
    except Exception as error:
        checkpoints.manager.reload()  # it counts the one that failed
        steps = _whole(checkpoints.folder)
        last = f"the last whole one is {steps[-1]}" if steps else "there is none yet"
        raise OSError(
            f"a checkpoint could not be written in {checkpoints.folder}: {error}; {last}; make "
            "room on the disk, or give a folder that can be written, and start again"
        ) from error


def _whole(folder: pathlib.Path) -> list[int]:
    return sorted(int(entry.name) for entry in folder.glob("*") if entry.name.isdigit())


def _plain(data: Any) -> Any:
    return json.loads(json.dumps(data, default=str))


def _entry(checkpoints: Checkpoints) -> dict[str, Any] | None:
    import orbax.checkpoint as ocp

    manager = checkpoints.manager
    with _writing(checkpoints):
        manager.wait_until_finished()
    step = manager.latest_step()
    if step is None:
        return None
    args = ocp.args.Composite(**{_RECORD: ocp.args.JsonRestore()})
    return manager.restore(step, args=args)[_RECORD]
