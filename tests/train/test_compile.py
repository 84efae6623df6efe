import contextlib
import math
import threading

import jax
import jax.numpy as jnp
import network
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jtl.train.compile import (
    compile_step,
    compiler_options,
    enable_cache,
    in_background,
    lift,
    lifted,
    make_compiled,
    shapes_of,
)
from jtl.train.mesh import make_mesh, replicate, shard_batch
from jtl.train.optimizer import phase_optimizer
from jtl.train.state import create
from jtl.train.step import make_step

START = jnp.int32(0)


def ready(traces=None):
    labels = network.labelled(network.parameters())
    tx = phase_optimizer({"head": optax.adamw(1.0)}, labels, {"head"}, {"head"})
    step = make_step(
        network.make_apply(), {"task": network.cross_entropy}, tx, labels, {"head": 1e-2}, clip=1.0
    )

    def counted(state, batch, start):
        if traces is not None:
            traces.append(batch["x"].shape)
        return step(state, batch, start)

    return create(network.parameters(), {}, tx, key=jax.random.key(0)), counted


@contextlib.contextmanager
def compilations():
    """Count what XLA compiles, and what the persistent cache gives back."""
    names = []

    def heard(name, *args, **kwargs):
        names.append(name)

    jax.monitoring.register_event_listener(heard)
    jax.monitoring.register_event_duration_secs_listener(heard)
    counts = {}
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_listener(heard)
        jax.monitoring.unregister_event_duration_listener(heard)
        counts["compiled"] = names.count("/jax/core/compile/backend_compile_duration")
        counts["hits"] = names.count("/jax/compilation_cache/cache_hits")


def test_one_compilation_for_each_shape_of_batch():
    traces = []
    state, step = ready(traces)
    run = make_compiled(step)
    short, long = network.batch(8), network.batch(16)
    arrays = jax.tree.map(jnp.asarray, short)
    state, _ = run(state, short, 0)
    with compilations() as counts:
        for seed in range(4):
            state, _ = run(state, network.batch(8, seed=seed), 0)
            state, _ = run(state, arrays, 0)
    assert counts["compiled"] == 0
    state, _ = run(state, long, 0)
    with compilations() as counts:
        state, metrics = run(state, long, 5)
        state, metrics = run(state, short, START)
    assert counts["compiled"] == 0
    assert traces == [(8, network.DIM), (16, network.DIM)]
    assert len(run.compiled) == 2
    assert int(state.step) == 12
    assert math.isfinite(float(metrics["loss"]))


def test_what_is_counted():
    state, step = ready()
    run = make_compiled(step)
    assert (run.seconds, run.waited, run.flops) == (0, 0, 0.0)
    one = run.compile(state, network.batch(64), START)
    two = run.compile(state, network.batch(128), START)
    assert run.compile(state, network.batch(128), START) is two
    assert run.flops == two.flops > 1.9 * one.flops
    assert run.seconds == one.seconds + two.seconds > 0
    assert one.temp_bytes > 0


def test_shapes_alone_compile_ahead_what_the_arrays_run():
    traces = []
    state, step = ready(traces)
    run = make_compiled(step)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    run.compile(shapes, network.batch(8), jax.ShapeDtypeStruct((), jnp.int32))
    for _ in range(2):
        state, _ = run(state, network.batch(8), 0)
    assert len(traces) == 1


def test_what_is_prepared_in_the_background_is_not_waited_for():
    traces = []
    state, step = ready(traces)
    run = make_compiled(step)
    with in_background() as pool:
        coming = pool.submit(run.prepare, shapes_of(state), [network.batch(8), network.batch(16)])
        assert coming.result() is run
    with compilations() as counts:
        for rows in (8, 16, 8):
            state, _ = run(state, network.batch(rows), 0)
    assert counts["compiled"] == 0 and len(traces) == 2
    assert run.waited == 0 < run.seconds
    run(state, network.batch(24), 0)
    assert 0 < run.waited < run.seconds


def test_what_has_not_begun_is_dropped_with_the_block():
    begun, go = threading.Event(), threading.Event()
    with in_background() as pool:
        first = pool.submit(lambda: (begun.set(), go.wait(10)))
        second = pool.submit(pytest.fail)
        begun.wait(10)
    assert second.cancelled() and not first.done()
    go.set()
    assert first.result()[1]


def test_the_state_is_given_to_the_step():
    state, step = ready()
    compiled = compile_step(step, state, network.batch(8), START)
    new, _ = compiled.call(state, network.batch(8), START)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_a_state_over_a_mesh_stays_where_it_is():
    traces = []
    state, step = ready(traces)
    mesh = make_mesh()
    state, run = replicate(state, mesh), make_compiled(step)
    where = jax.tree.map(lambda x: x.sharding, state)
    for seed in range(3):
        state, _ = run(state, shard_batch(network.batch(16, seed=seed), mesh), 0)
    assert jax.tree.map(lambda x: x.sharding, state) == where
    assert len(traces) == 1


@pytest.fixture
def settings():
    names = [
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_second_run_starts_from_the_cache(tmp_path, settings):
    jax.jit(lambda x: x + 1)(1.0)  # what was compiled before must not settle that there is none
    place = enable_cache(tmp_path / "xla")
    assert place == tmp_path / "xla"
    state, step = ready()
    with compilations() as first:
        compile_step(step, state, network.batch(8), START)
    assert first == {"compiled": 1, "hits": 0}
    assert any(place.iterdir())
    jax.clear_caches()
    with compilations() as second:
        compile_step(step, state, network.batch(8), START)
    assert second["hits"] == 1


def test_another_folder_takes_over(tmp_path, settings):
    state, step = ready()
    for name in ("one", "two"):
        place = enable_cache(tmp_path / name)
        jax.clear_caches()
        compile_step(step, state, network.batch(8), START)
        assert any(place.iterdir())


def test_where_the_cache_is(tmp_path, settings, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert enable_cache() == tmp_path / "jtl" / "xla"
    assert (tmp_path / "jtl" / "xla").is_dir()
    told = enable_cache(tmp_path / "told")
    assert enable_cache() == told
    assert jax.config.jax_compilation_cache_dir == str(told)


def test_steps_on_a_cpu_are_compiled_at_the_level_that_is_enough(monkeypatch):
    name = "xla_backend_optimization_level"
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    assert compiler_options() == {name: 1}
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=3")  # the user's own
    assert compiler_options() == {}
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler_options() == {}


def test_what_a_function_holds_is_no_constant_of_its_program():
    held = jnp.arange(10_000.0)

    def function(batch):  # programs within it are given what they read
        return {"y": jax.jit(jnp.dot)(batch["x"], held) + jnp.sum(held)}

    batch = {"x": jnp.ones(10_000)}
    made = lift(function, jax.eval_shape(lambda: batch))
    text = made.run.lower(made.held, *jax.tree.leaves(batch)).as_text()
    assert 'dense<"0x' not in text and sum(x.size for x in made.held) >= held.size
    assert made(batch)["y"] == function(batch)["y"]
    as_closure = jax.jit(function).lower(batch).as_text()
    assert 'dense<"0x' in as_closure  # what it would be otherwise


def test_a_lifted_function_is_compiled_once_for_each_shape():
    held, traces = jnp.arange(3.0), []

    def function(batch):
        traces.append(batch["x"].shape)
        return {"y": batch["x"] @ held}

    call = lifted(function)
    for rows in (2, 4, 2, 4):
        assert call({"x": jnp.ones((rows, 3))})["y"].tolist() == [3.0] * rows
    assert traces == [(2, 3), (4, 3)]
