"""Where arrays lie on several devices: a mesh of one axis, and what is spread over it.

mesh = make_mesh()
state = put(state, split(state, mesh))    # FSDP; replicate(state, mesh) for a whole copy on each
batch = shard_batch(batch, mesh)
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jtl.train.state import Batch


def make_mesh(devices: Sequence[Any] | None = None, *, axis_name: str = "data") -> Mesh:
    """Return a mesh of one axis over the devices; None takes all, those of a process together.

    Its axis is Auto: under jax's default, Explicit, the lookup of a Linen Embed is an error.
    """
    devices = jax.devices() if devices is None else list(devices)
    devices = sorted(devices, key=lambda device: device.process_index)
    return Mesh(np.asarray(devices), (axis_name,), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch's columns: rows over the mesh."""
    return NamedSharding(mesh, PartitionSpec(*mesh.axis_names))


def shard_batch(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Return the batch with its rows spread over the mesh.

    With several processes each gives its own rows.

    Raises:
        ValueError: the rows do not divide by the devices.
    """
    check_rows(batch, local_devices(mesh))
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for name, value in batch.items()
    }


def check_rows(batch: Batch, devices: int) -> None:
    """Raise unless the rows of each column divide by the devices.

    Raises:
        ValueError: names the columns with their rows.
    """
    rows = {name: np.shape(value)[0] for name, value in batch.items()}
    if any(count % devices for count in rows.values()):
        raise ValueError(
            f"the batch has {rows} rows for {devices} devices; take a batch size that is a "
            f"multiple of {devices} (padding rows with mask False count nothing)"
        )


def local_devices(mesh: Mesh) -> int:
    """Return how many devices of the mesh belong to this process."""
    own = jax.process_index()
    return sum(device.process_index == own for device in mesh.devices.flat)


def split(tree: PyTree, mesh: Mesh, *, threshold: int = 2**16) -> PyTree:
    """Return the sharding of each leaf: large ones split over the mesh, all others whole on each.

    Args:
        tree: arrays, or anything with a shape.
        mesh: of one axis.
        threshold: numbers in an array from which it is split, along its longest axis that the
            devices divide. An array without such an axis is whole on each device.
    """
    (name,) = mesh.axis_names
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, split_spec(jnp.shape(leaf), mesh.size, name, threshold)),
        tree,
    )


def split_spec(
    shape: tuple[int, ...], devices: int, axis_name: str, threshold: int
) -> PartitionSpec:
    """Return along which axis an array is split over the devices.

    >>> split_spec((30, 64), 8, "data", threshold=1024)
    P(None, 'data')
    >>> split_spec((30, 64), 8, "data", threshold=2048), split_spec((30, 7), 8, "data", threshold=1)
    (P(), P())
    """
    axes = [axis for axis, size in enumerate(shape) if size and size % devices == 0]
    if not axes or math.prod(shape) < threshold:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * longest, axis_name)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return a copy of the tree on every device of the mesh; it shares no buffer with `tree`."""
    return put(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree))


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """Return a copy of the tree under these shardings; it shares no buffer with `tree`.

    A step that takes its state would delete the caller's: under a sharding,
    `device_put(..., may_alias=False)` shares it all the same. No device holds more of a leaf than
    it is to keep.

    Args:
        tree: arrays; those of one process have the same values on each of several.
        shardings: tree of `NamedSharding`.
    """
    return jax.tree.map(_put, tree, shardings)


def on_host(leaf: Any) -> np.ndarray:
    """Return a whole array on the host, without a copy where it lies there already.

    What is split over processes is gathered, and all of them must call this; see `is_apart`.
    """
    whole = multihost_utils.process_allgather(leaf, tiled=True) if is_apart(leaf) else leaf
    return np.asarray(whole)


def is_apart(leaf: Any) -> bool:
    """Return whether this process lacks a part of an array."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return False
    return not leaf.is_fully_replicated


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raw = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(leaf))
    host = np.asarray(on_host(leaf), jnp.result_type(leaf))
    return jax.make_array_from_callback(host.shape, sharding, lambda part: np.array(host[part]))
