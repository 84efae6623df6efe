"""The same step through `jax.pmap`, a thin door for those who ask for it."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jtl.train.compile import Compiled, CompiledSteps, measured
from jtl.train.mesh import check_rows, make_mesh
from jtl.train.state import Batch, Step, TrainState
from jtl.trees import changes


def pmap_step(step: Step, *, axis_name: str, devices: Sequence[Any] | None = None) -> CompiledSteps:
    """Return the step under `pmap`: state, whole batch and start go in as for the plain step.

    The rows are dealt to the devices in order; the state is the same on all, and is returned
    without a leading axis.

    Args:
        step: made with this `axis_name`, and so must be the model's BatchNorm.
        axis_name: of the devices.
        devices: None takes all of this process.

    Raises:
        ValueError: when called: rows that do not divide by the devices; statistics that differ from
            device to device after the first step, which a BatchNorm without the axis leaves.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    mesh = make_mesh(devices, axis_name=axis_name)
    everywhere = NamedSharding(mesh, PartitionSpec())
    mapped = jax.pmap(
        step,
        axis_name=axis_name,
        in_axes=(None, 0, None),  # pyright: ignore[reportArgumentType]
        out_axes=(None, None),  # pyright: ignore[reportArgumentType]
        devices=devices,
        donate_argnums=0,
    )

    def placed(state: TrainState) -> TrainState:
        return jax.tree.map(
            lambda x: x if x.sharding == everywhere else jax.device_put(x, everywhere), state
        )

    def compile_mapped(step: Step, state: Any, batch: Batch, start: Any) -> Compiled:
        del step
        began = time.perf_counter()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        compiled = mapped.lower(shapes, _dealt_shapes(batch, len(devices)), start).compile()
        result = measured(compiled, time.perf_counter() - began)
        unchecked = [True]

        def call(state: TrainState, batch: Batch, start: Any) -> Any:
            state, metrics = compiled(placed(state), _dealt(batch, len(devices)), start)
            if unchecked:
                _check_agreement(state.stats, axis_name)
                unchecked.clear()
            return state, metrics

        return result._replace(call=call)

    return CompiledSteps(step, compile_mapped)


def _dealt(batch: Batch, devices: int) -> dict[str, Any]:
    check_rows(batch, devices)
    return {
        name: jnp.reshape(value, (devices, -1, *np.shape(value)[1:]))
        for name, value in batch.items()
    }


def _dealt_shapes(batch: Batch, devices: int) -> dict[str, jax.ShapeDtypeStruct]:
    check_rows(batch, devices)
    return {
        name: jax.ShapeDtypeStruct(
            (devices, jnp.shape(value)[0] // devices, *jnp.shape(value)[1:]), jnp.result_type(value)
        )
        for name, value in batch.items()
    }


def _check_agreement(stats: Any, axis_name: str) -> None:
    def shard(device: int) -> Any:
        return jax.tree.map(lambda x: np.asarray(x.addressable_shards[device].data), stats)

    leaves = jax.tree.leaves(stats)
    for device in range(1, len(leaves[0].addressable_shards) if leaves else 0):
        differing = changes(shard(0), shard(device))
        if differing:
            name, how = next(iter(differing.items()))
            raise ValueError(
                f"{len(differing)} statistics differ between the first device and device {device} "
                f"({name!r}: {how}); BatchNorm must take its moments over the axis {axis_name!r}: "
                f"give the model's normalisation axis_name={axis_name!r}"
            )
