"""Compile a step ahead, once for each shape of batch, and keep what was compiled on disk.

with in_background() as pool:
    coming = pool.submit(compiled.prepare, shapes_of(state), batches)   # while another step runs
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.extend import core

from jtl.train.state import Batch, Step, TrainState


class Compiled(NamedTuple):
    """A compiled step.

    Attributes:
        call: `(state, batch, start) -> (state, metrics)`; takes the state's buffers.
        seconds: that tracing and compiling took.
        flops: of one call by XLA's count (the body of a loop counts once); NaN where it has none.
        temp_bytes: memory that a call needs beside its arguments and results.
    """

    call: Callable[..., Any]
    seconds: float
    flops: float
    temp_bytes: int


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """A step that compiles itself once for each shape of batch, and then runs.

    Or another function of state and batch, such as what looks at a step's gradients.

    Attributes:
        step: the step, as `make_step` returned it.
        how: `(step, state, batch, start) -> Compiled`.
        compiled: what was compiled so far, by the shapes of the batch; filled by use.
        waits: seconds that each call waited for a program which nobody had compiled ahead.
    """

    step: Callable[..., Any]
    how: Callable[..., Compiled]
    compiled: dict[Any, Compiled] = dataclasses.field(default_factory=dict)
    waits: list[float] = dataclasses.field(default_factory=list)

    def __call__(self, state: TrainState, batch: Batch, start: Any) -> Any:
        """Run a step; the state's buffers are taken, the batch's are not."""
        start = jnp.asarray(start, jnp.int32)
        if _shapes(batch) not in self.compiled:
            began = time.perf_counter()
            self.compile(state, batch, start)
            self.waits.append(time.perf_counter() - began)
        return self.compiled[_shapes(batch)].call(state, dict(batch), start)

    def prepare(self, state: Any, batches: Iterable[Batch]) -> "CompiledSteps":
        """Compile for every shape of batch that is coming, and return the step.

        Args:
            state: shapes, as `shapes_of` gives them.
            batches: shapes of batches.
        """
        for batch in batches:
            self.compile(state, batch, jax.ShapeDtypeStruct((), jnp.int32))
        return self

    def compile(self, state: Any, batch: Batch, start: Any) -> Compiled:
        """Return the step compiled for these shapes; arguments as for `compile_step`."""
        key = _shapes(batch)
        if key not in self.compiled:
            self.compiled[key] = self.how(self.step, state, dict(batch), start)
        return self.compiled[key]

    @property
    def waited(self) -> float:
        """Seconds that calls waited for a compilation."""
        return sum(self.waits, 0.0)

    @property
    def seconds(self) -> float:
        """Seconds spent compiling so far, here and in the background."""
        return sum((one.seconds for one in self.compiled.values()), 0.0)

    @property
    def flops(self) -> float:
        """FLOPs of a step of the largest shape so far, 0 before the first."""
        return max((one.flops for one in self.compiled.values()), default=0.0)


def make_compiled(step: Step) -> CompiledSteps:
    """Return the step, compiled once for each shape of batch that it meets.

    step = make_compiled(make_step(...))
    state, metrics = step(state, batch, start)
    """
    return CompiledSteps(step, compile_step)


def compile_step(step: Step, state: Any, batch: Any, start: Any) -> Compiled:
    """Compile a step for these shapes, run nothing, and count.

    The state's buffers are donated to each call, and the new state lies on the devices as the old.

    Args:
        step: as `make_step` returns it.
        state: arrays, or their `jax.ShapeDtypeStruct` with the sharding of the real arrays.
        batch: the same.
        start: int32 scalar array, or its shape.
    """
    began = time.perf_counter()
    where = jax.tree.map(_placed, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    compiled = jitted.lower(state, batch, start).compile(compiler_options())
    seconds = time.perf_counter() - began
    return measured(compiled, seconds)


class Lifted(NamedTuple):
    """A function compiled with the arrays that it holds as arguments.

    Attributes:
        run: `(held, *leaves of the argument) -> leaves of the result`, jitted.
        held: the arrays, in the order in which the function meets them.
        structure: of the result.
    """

    run: Callable[..., Any]
    held: list[Any]
    structure: Any

    def __call__(self, argument: Any) -> Any:
        """Return what the function gives for an argument of the shapes that it was made for."""
        leaves = self.run(self.held, *jax.tree.leaves(argument))
        return jax.tree.unflatten(self.structure, leaves)


def lift(function: Callable[[Any], Any], argument: Any) -> Lifted:
    """Return a function jitted for these shapes, what it holds given to the program, not in it.

    `jax.jit` writes the arrays of a closure into the program as constants: a second copy of a
    model's weights, which XLA then folds, and a program that no other weights can use.

    >>> weights = jnp.arange(3.0)
    >>> double = lift(lambda x: {"y": x * weights}, jnp.ones(3))
    >>> double(jnp.full(3, 2.0))["y"].tolist()
    [0.0, 2.0, 4.0]

    Args:
        function: of one tree of arrays. What only a `jax.jit` within it holds stays a constant.
        argument: arrays, or their `jax.ShapeDtypeStruct`.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(argument)

    def run(held: Any, *leaves: Any) -> Any:
        return core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, held))(*leaves)

    return Lifted(jax.jit(run), closed.consts, jax.tree.structure(shapes))


def lifted(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the function as `lift` compiles it, for every shape of batch that it meets."""
    made: dict[Any, Lifted] = {}

    def call(batch: Batch) -> Any:
        if _shapes(batch) not in made:
            made[_shapes(batch)] = lift(function, dict(batch))
        return made[_shapes(batch)](dict(batch))

    return call


def compiler_options() -> dict[str, Any]:
    """Return the options of XLA that steps are compiled with, {} for its own.

    On a CPU the time of a step is that of products and of loops that LLVM's first level makes as
    fast as its last, which takes longer (`python -m benchmarks.compiling`). A level in `XLA_FLAGS`
    is kept.
    """
    given = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    return {} if given or jax.default_backend() != "cpu" else {"xla_backend_optimization_level": 1}


def shapes_of(tree: Any) -> Any:
    """Return the shapes of arrays, placed as these are where they are committed to a device.

    >>> shapes_of({"w": jnp.ones((2, 3))})["w"].shape
    (2, 3)
    """

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        placed = leaf.sharding if getattr(leaf, "committed", False) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    return jax.tree.map(shape, tree)


@contextlib.contextmanager
def in_background() -> Iterator[concurrent.futures.Executor]:
    """Give a thread that works beside the loop; what has not begun when the block ends never does.

    Tracing needs Python's lock and XLA's compiler does not: on an accelerator, steps go on.
    """
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="jtl-compile")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def measured(compiled: Any, seconds: float) -> Compiled:
    """Return a compiled step with XLA's count of what it costs."""
    memory = compiled.memory_analysis()
    temporary = int(getattr(memory, "temp_size_in_bytes", 0))
    return Compiled(compiled, seconds, flops(compiled), temporary)


def flops(compiled: Any) -> float:
    """Return XLA's count of floating-point operations of a compiled function, NaN for none."""
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) and cost else cost
    return float(cost.get("flops", float("nan"))) if isinstance(cost, dict) else float("nan")


def enable_cache(folder: str | pathlib.Path | None = None) -> pathlib.Path:
    """Keep compiled programs on disk, so that a second run starts without compiling; return where.

    Args:
        folder: None takes the folder that jax was told already (`JAX_COMPILATION_CACHE_DIR`), else
            `jtl/xla` in the user's cache folder.
    """
    named = folder or getattr(jax.config, "jax_compilation_cache_dir", None)
    place = pathlib.Path(named).expanduser() if named else _user_cache() / "jtl" / "xla"
    place.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # A cache that has been used stays in its old folder, whatever the config says.
    compilation_cache.reset_cache()
    return place


def _user_cache() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")


def _shapes(batch: Batch) -> tuple[Any, ...]:
    leaves = ((name, np.shape(x), _dtype(x), _placed(x)) for name, x in batch.items())
    return tuple(sorted(leaves, key=lambda row: row[0]))


def _dtype(leaf: Any) -> Any:
    """Return the dtype in JAX: numpy's int64 is int32 there."""
    return jax.dtypes.canonicalize_dtype(getattr(leaf, "dtype", None) or np.result_type(leaf))


def _placed(leaf: Any) -> Any:
    """Return the sharding of an array over several devices; XLA may choose it for others."""
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None
