"""Traps of jax, optax, Orbax and TFDS that were met and measured: each shown, and that we pass it.

Others stand beside their kin: moments that join an old count (test_optimizer), what brings the dead
backward pass back (test_step), statistics that move in a held group (test_norms, test_run), arrays
whose placing costs a second compilation (test_fsdp, test_compile), a cache that is set too late
(test_compile), a state that the caller's arrays go with (test_step, test_parallel), a checkpoint of
fewer layers (test_checkpoint), saves that are cut off (test_resume), pictures and texts without
TensorFlow (test_tfds), several processes (test_processes).
"""

import ast
import pathlib
import tomllib

import flax.linen as nn
import jax
import jax.numpy as jnp
import network
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jtl import masks, trees
from jtl.train import checkpoint
from jtl.train.compile import compile_step, make_compiled
from jtl.train.mesh import make_mesh, replicate
from jtl.train.optimizer import phase_optimizer
from jtl.train.state import create
from jtl.train.step import make_step

ROOT = pathlib.Path(__file__).parents[2]
START = jnp.int32(0)


# Freezing with optax alone: the held leaf starts at 1, its gradient is 0.5, the rate 0.1

LABELS = {"body": "body", "head": "head"}
CHOSEN = {"body": False, "head": True}
ADAMW = optax.adamw(0.1, weight_decay=0.01)
FREEZE = optax.freeze({"body": True, "head": False})
FREEZING = {
    "masked alone adds the raw gradient": (optax.masked(ADAMW, CHOSEN), 1.5),
    "decay after the mask": (optax.chain(FREEZE, ADAMW), 1 - 0.1 * 0.01),
    "decay after everything": (
        optax.chain(masks.optimizer({"head": ADAMW}, LABELS), optax.add_decayed_weights(1e-4)),
        1.0001,
    ),
    "ours": (masks.optimizer({"head": ADAMW}, LABELS), 1.0),
}


@pytest.mark.parametrize("name", FREEZING)
def test_what_a_held_leaf_becomes(name):
    tx, becomes = FREEZING[name]
    params = {"body": jnp.float32(1.0), "head": jnp.float32(1.0)}
    grads = jax.tree.map(lambda p: 0.5 * p, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert float(optax.apply_updates(params, updates)["body"]) == pytest.approx(becomes, abs=1e-7)


def test_zero_after_adam_keeps_all_moments_and_ours_none():
    params = {"body": jnp.zeros((100, 100)), "head": jnp.zeros(2)}
    zeroed = optax.chain(optax.adam(0.1), FREEZE)
    assert trees.size_bytes(zeroed.init(params)) > 2 * 4 * 100 * 100
    ours = masks.optimizer({"head": optax.adam(0.1)}, LABELS)
    assert trees.size_bytes(ours.init(params)) == 2 * 4 * 2 + 4


# What brings the dead backward pass back


def head_step(*, tx=None, **options):
    params = network.parameters()
    labels = network.labelled(params)
    if tx is None:
        tx = phase_optimizer({"head": optax.adamw(1.0)}, labels, {"head"}, {"head"})
    terms = {"task": network.cross_entropy}
    step = make_step(network.make_apply(), terms, tx, labels, {"head": 1e-2}, **options)
    averaged = masks.mask(labels, {"head"}) if options.get("ema") is not None else None
    return create(params, {}, tx, averaged=averaged, key=jax.random.key(0)), step


def forward_flops(rows):
    apply, params = network.make_apply(), network.parameters()
    forward = jax.jit(lambda p, b: apply(p, {}, b, key=None, live=frozenset())[0])
    return forward.lower(params, network.batch(rows)).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_head_only_step_with_everything_on_costs_a_forward_pass(accumulate):
    labels = network.labelled(network.parameters())
    head = phase_optimizer({"head": optax.adamw(1.0)}, labels, {"head"}, {"head"})
    tx = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), head), 3)
    state, step = head_step(tx=tx, clip=1.0, ema=0.99, accumulate=accumulate)
    compiled = compile_step(step, state, network.batch(512), START)
    # XLA counts the body of the loop over microbatches once.
    assert compiled.flops < 1.05 * forward_flops(512 // accumulate)


def test_plain_gradients_of_all_leaves_under_a_clip_cost_three():
    # The same head-only training as everyone writes it first: this is what the split is for.
    params = network.parameters()
    labels = network.labelled(params)
    head = masks.optimizer({"head": optax.adamw(1e-2)}, labels)
    tx = optax.chain(optax.clip_by_global_norm(1.0), head)
    apply = network.make_apply()

    def step(params, state, batch):
        def loss(params):
            out, _ = apply(params, {}, batch, key=None, live=network.LIVE)
            return -jnp.mean(jax.nn.log_softmax(out["head"])[:, 0])

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step).lower(params, tx.init(params), network.batch(512))
    assert lowered.compile().cost_analysis()["flops"] > 2.5 * forward_flops(512)


def test_a_step_returns_no_gradient_and_no_array():
    state, step = head_step(clip=1.0)
    _, metrics = jax.eval_shape(step, state, network.batch(8), START)
    assert {value.shape for value in metrics.values()} == {()}


def test_accumulation_keeps_room_for_the_live_gradients_alone():
    # optax.MultiSteps would keep a sum for every leaf.
    state, step = head_step(accumulate=2)
    whole = trees.size_bytes(state.params)
    assert compile_step(step, state, network.batch(8), START).temp_bytes < whole / 2


def test_held_leaves_are_neither_copied_nor_moved():
    state, step = head_step(clip=1.0, accumulate=2)
    compiled = compile_step(step, state, network.batch(8), START)
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.params["body"])]
    state, _ = compiled.call(state, network.batch(8), START)
    after = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.params["body"])]
    assert before == after


# Compilation


def test_weak_types_cost_no_second_compilation():
    # `jnp.full(2, 0.5)` is weakly typed, what comes out of a step is not.
    params, stats = {"w": jnp.full(2, 0.5)}, {"mean": jnp.full(2, 0.1)}
    assert params["w"].weak_type

    def apply(params, stats, batch, *, key, live):
        return params["w"] * batch["x"], {"mean": 0.9 * stats["mean"]}

    tx = optax.adam(1.0)
    terms = {"fit": lambda c: (jnp.sum(c.out**2), 1.0)}
    step = make_step(apply, terms, tx, {"w": "w"}, {"w": 0.1}, ema=0.9)
    mask, key = {"w": True}, jax.random.key(0)
    state = create(params, stats, tx, refs={"a": params}, averaged=mask, key=key)
    jitted = jax.jit(step)
    for _ in range(3):
        state, _ = jitted(state, {"x": np.ones(2, np.float32)}, START)
    assert jitted._cache_size() == 1
    compiled = make_compiled(step)
    for start in (0, np.int32(0), np.int64(0), START):  # a bare 0 is weakly typed too
        state, _ = compiled(state, {"x": np.ones(2, np.float32)}, start)
    assert len(compiled.compiled) == 1


# Devices


def test_the_mesh_of_jax_stops_an_embedding_and_ours_does_not():
    embed = nn.Embed(8, 4)
    ids = np.arange(8)
    params = embed.init(jax.random.key(0), ids)

    def under(mesh):
        spread = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data")))
        with jax.set_mesh(mesh):
            return jax.jit(embed.apply)(replicate(params, mesh), spread)

    theirs = jax.make_mesh((8,), ("data",))
    assert theirs.axis_types == (AxisType.Explicit,)
    with pytest.raises(Exception, match="out_sharding"):
        under(theirs)
    np.testing.assert_array_equal(under(make_mesh()), embed.apply(params, ids))


def test_device_put_shares_a_buffer_that_a_donating_step_deletes_and_ours_does_not():
    mesh = make_mesh()
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    theirs, ours = jnp.arange(4.0), jnp.arange(4.0)
    step(jax.device_put(theirs, everywhere))
    step(replicate(ours, mesh))
    assert theirs.is_deleted() and not ours.is_deleted()


# Checkpoints


def test_another_dtype_is_refused_where_orbax_casts(tmp_path):
    kept = checkpoint.open_checkpoints(tmp_path, fingerprint={})
    checkpoint.save(kept, 1, {"state": {"w": jnp.full(2, 1.001)}}, {}, wait=True)
    with pytest.raises(ValueError, match="bfloat16"):
        checkpoint.restore(kept, {"state": {"w": jnp.zeros(2, jnp.bfloat16)}})
    checkpoint.close(kept)


def calls():
    for path in sorted((ROOT / "jtl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path, node


def test_orbax_is_never_told_not_to_be_strict():
    # strict=False truncates and pads arrays without a word.
    for path, call in calls():
        loose = [k for k in call.keywords if k.arg == "strict" and not ast.literal_eval(k.value)]
        assert not loose or ast.unparse(call.func) == "zip", f"{path}:{call.lineno}"


def test_what_jax_dropped_is_not_called():
    dropped = {"device_put_replicated", "device_put_sharded"}
    for path, call in calls():
        assert ast.unparse(call.func).rpartition(".")[2] not in dropped, f"{path}:{call.lineno}"


# Data


def test_what_tfds_forgets_to_declare_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {entry.split(">=")[0].split("==")[0] for entry in project["dependencies"]}
    assert {"importlib_resources", "pillow"} <= names
    assert not {name for name in names if name.startswith(("tensorflow", "torch", "clu"))} - {
        "tensorflow-datasets"
    }
