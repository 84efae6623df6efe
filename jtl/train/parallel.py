"""How one run lies on its devices, as plain data: one device, data-parallel, FSDP or `pmap`.

    spread = make_spread("fsdp")
    check_batch_size(spread, 64)                          # once, before anything is loaded
    state = place(spread, state)
    steps = compiled(spread, make_step(..., axis_name=spread.axis_name))
    for batch in batches:                                 # each process gives `rows(spread, 64)`
        state, metrics = steps(state, put(spread, batch), start)

The numbers are those of one device, to the rounding of sums in another order.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jtl.near import nearest
from jtl.train import mesh as meshes
from jtl.train.compile import Compiled, CompiledSteps, compile_step
from jtl.train.held import digest
from jtl.train.pmap import pmap_step
from jtl.train.state import Batch, Step

AXIS = "data"
KINDS = {
    "jit": "one device where there is one, else as 'data'",
    "data": "the batch split over the devices, the state whole on each",
    "fsdp": "the batch split, and every large array of the state too",
    "pmap": "as 'data', through jax.pmap; one process",
}


class Spread(NamedTuple):
    """How a run lies on its devices.

    Attributes:
        kind: one of `KINDS`.
        mesh: the devices; None is the default device, and nothing is committed to it.
        axis_name: that the step and the model's BatchNorm are made with; None for one program.
        threshold: numbers in an array from which FSDP splits it.
    """

    kind: str
    mesh: Mesh | None
    axis_name: str | None
    threshold: int


def make_spread(
    kind: str = "jit", devices: Sequence[Any] | None = None, *, threshold: int = 2**16
) -> Spread:
    """Return how a run lies on the devices.

    Args:
        kind: "jit" (one device where there is one, else as "data"), "data" (the batch is split),
            "fsdp" (the batch, and every large array of the state), "pmap".
        devices: None takes all, of all processes.
        threshold: numbers in an array from which FSDP splits it.

    Raises:
        ValueError: an unknown kind; `pmap` with several processes.
    """
    if kind not in KINDS:
        raise ValueError(
            f"parallel is {kind!r}{nearest(kind, KINDS)}; give one of "
            + "; ".join(f"{name!r} ({what})" for name, what in KINDS.items())
        )
    if kind == "pmap" and jax.process_count() > 1:
        raise ValueError(
            f"parallel='pmap' runs in one process, and there are {jax.process_count()}; "
            "take 'data' or 'fsdp'"
        )
    if kind == "jit" and devices is None and jax.device_count() == 1:
        return Spread(kind, None, None, threshold)
    mesh = meshes.make_mesh(devices, axis_name=AXIS)
    return Spread(kind, mesh, AXIS if kind == "pmap" else None, threshold)


def check_batch_size(spread: Spread, batch_size: int, *, accumulate: int = 1) -> None:
    """Raise unless batches of this size can be split over the devices.

    Args:
        spread: how the run lies.
        batch_size: rows of the whole batch, over all processes.
        accumulate: microbatches; under `pmap` each device takes them from its own rows.

    Raises:
        ValueError: the rows do not divide; names the nearest sizes that do.
    """
    devices = size(spread)
    parts = devices * accumulate if spread.kind == "pmap" else devices
    if batch_size % parts or batch_size < 1:
        below = batch_size // parts * parts
        near = f"{below} or {below + parts}" if below else f"{parts}"
        each = f" in {accumulate} microbatches each" if parts != devices else ""
        raise ValueError(
            f"a batch of {batch_size} rows does not divide over {devices} devices{each}; take "
            f"batch_size {near}, or give the run fewer devices"
        )


def size(spread: Spread) -> int:
    """Return the number of devices, of all processes."""
    return 1 if spread.mesh is None else spread.mesh.size


def rows(spread: Spread, batch_size: int) -> slice:
    """Return which rows of the whole batch this process gives."""
    if spread.mesh is None:
        return slice(0, batch_size)
    each, own = batch_size // spread.mesh.size, jax.process_index()
    mine = [i for i, d in enumerate(spread.mesh.devices.flat) if d.process_index == own]
    return slice(mine[0] * each, (mine[-1] + 1) * each) if mine else slice(0, 0)


def shardings(spread: Spread, tree: PyTree) -> PyTree:
    """Return where each leaf of a state lies; None for all on the default device.

    A state too large for one device is made where it lies:
    `jax.jit(init, out_shardings=shardings(spread, jax.eval_shape(init)))()`.
    """
    if spread.mesh is None:
        return jax.tree.map(lambda _: None, tree)
    if spread.kind == "fsdp":
        return meshes.split(tree, spread.mesh, threshold=spread.threshold)
    whole = NamedSharding(spread.mesh, PartitionSpec())
    return jax.tree.map(lambda _: whole, tree)


def place(spread: Spread, tree: PyTree) -> PyTree:
    """Return the state where it lies in this run: copies, but as it is on the default device.

    Args:
        spread: how the run lies.
        tree: arrays of this process, any tree. Under FSDP it is split leaf by leaf: parameters,
            optimizer slots, averages and refs of one shape are split alike.

    Raises:
        ValueError: several processes, and the values are not the same on each.
    """
    if spread.mesh is None:
        return tree
    _check_same(tree)
    return meshes.put(tree, shardings(spread, tree))


def put(spread: Spread, batch: Batch) -> dict[str, Any]:
    """Return a batch on the devices; each process gives its own rows (`rows`).

    It does not wait: do not write into the batch's own arrays afterwards.

    Raises:
        ValueError: the rows do not divide by the devices.
    """
    if spread.mesh is None:
        return jax.device_put(dict(batch))
    return meshes.shard_batch(batch, spread.mesh)


def fetch(tree: PyTree) -> PyTree:
    """Return the arrays whole, as numpy, to write or export them; keys become their data.

    With several processes all call it: what is split over them is gathered, leaf by leaf.
    """

    def fetched(leaf: Any) -> np.ndarray:
        key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return meshes.on_host(jax.random.key_data(leaf) if key else leaf)

    return jax.tree.map(fetched, tree)


def shapes(spread: Spread, batch: Batch) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of what `put` makes of a batch, to compile ahead; nothing is moved.

    Args:
        spread: how the run lies.
        batch: arrays or their shapes, the rows of this process.
    """
    mesh, whole, where = spread.mesh, 1, None
    if mesh is not None:
        local = meshes.local_devices(mesh)
        meshes.check_rows({n: np.empty(jnp.shape(x)[:1]) for n, x in batch.items()}, local)
        whole, where = mesh.size // local, meshes.batch_sharding(mesh)

    def shape(value: Any) -> jax.ShapeDtypeStruct:
        first, *others = jnp.shape(value)
        dtype = jax.dtypes.canonicalize_dtype(jnp.result_type(value))
        return jax.ShapeDtypeStruct((first * whole, *others), dtype, sharding=where)

    return {name: shape(value) for name, value in batch.items()}


def compiled(spread: Spread, step: Step) -> CompiledSteps:
    """Return the step as this run calls it, compiled once for each shape of batch.

    Args:
        spread: how the run lies.
        step: of `make_step(..., axis_name=spread.axis_name)`.
    """
    if spread.kind == "pmap" and spread.mesh is not None:
        return pmap_step(step, axis_name=AXIS, devices=list(spread.mesh.devices.flat))
    return CompiledSteps(step, _compile_step)


def split_forward(spread: Spread, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a jitted forward pass whose rows are split over the devices, for evaluation.

    Without it each device computes all of a batch that the host gives. The results are whole on
    every device and in every process, so the host may read them.

    Args:
        spread: how the run lies.
        forward: `(params, stats, batch) -> tree`; the batch is whole, the same on each process.
            Columns whose rows do not divide are not split.
    """
    if spread.mesh is None:
        return jax.jit(forward)
    where, devices = meshes.batch_sharding(spread.mesh), spread.mesh.size

    def split(column: Any) -> Any:
        whole = not jnp.ndim(column) or jnp.shape(column)[0] % devices
        return column if whole else jax.lax.with_sharding_constraint(column, where)

    def over_devices(params: Any, stats: Any, batch: Batch) -> Any:
        return forward(params, stats, {name: split(x) for name, x in batch.items()})

    return jax.jit(over_devices, out_shardings=NamedSharding(spread.mesh, PartitionSpec()))


def _compile_step(step: Step, state: Any, batch: Any, start: Any) -> Compiled:
    """Compile for a `start` of numpy: an array of one process is no argument of several."""
    del start
    result = compile_step(step, state, batch, np.int32(0))

    def call(state: Any, batch: Any, start: Any) -> Any:
        return result.call(state, batch, np.asarray(start, np.int32))

    return result._replace(call=call)


def _check_same(tree: PyTree) -> None:
    """Raise unless all processes have the same values."""
    if jax.process_count() == 1:
        return
    text = "".join(digest(leaf) for leaf in jax.tree.leaves(tree))
    own = np.frombuffer(bytes.fromhex(digest(np.frombuffer(text.encode(), np.uint8))), np.uint32)
    every = multihost_utils.process_allgather(own)
    if not np.all(every == every[:1]):
        raise ValueError(
            f"the {len(every)} processes begin with different arrays; load the same weights and "
            "take the same seed on each"
        )
