import jax
import jax.numpy as jnp
import network
import normed
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jtl.train.compile import compile_step, make_compiled
from jtl.train.mesh import make_mesh, replicate, shard_batch
from jtl.train.optimizer import phase_optimizer
from jtl.train.pmap import pmap_step
from jtl.train.state import create
from jtl.train.step import make_step

START = normed.START


def test_pmap_on_eight_devices_is_one_device():
    state, step = normed.ready()
    alone, one = normed.trained(state, make_compiled(step), normed.batches())
    state, step = normed.ready("data")
    together, eight = normed.trained(state, pmap_step(step, axis_name="data"), normed.batches())
    network.close(one, eight, 1e-5)
    network.close(alone.params, together.params, 1e-5)
    network.close(alone.stats, together.stats, 1e-5)
    assert [row["examples"] for row in eight] == [18.0, 18.0, 18.0]
    start, _ = normed.ready()
    assert np.all(np.asarray(start.stats["norm"]["mean"] != together.stats["norm"]["mean"]))
    np.testing.assert_array_equal(start.stats["held"]["var"], together.stats["held"]["var"])


def test_jit_over_a_mesh_is_one_device():
    state, step = normed.ready()
    alone, one = normed.trained(state, make_compiled(step), normed.batches())
    mesh = make_mesh()
    state, step = normed.ready()
    rows = [shard_batch(batch, mesh) for batch in normed.batches()]
    together, eight = normed.trained(replicate(state, mesh), make_compiled(step), rows)
    network.close(one, eight, 1e-5)
    network.close(alone.params, together.params, 1e-5)
    network.close(alone.stats, together.stats, 1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_parameters_split_over_the_mesh_are_one_device(accumulate):
    params, labels = network.parameters(), network.labelled(network.parameters())
    tx = phase_optimizer(
        dict.fromkeys(network.ALL, optax.sgd(1.0, momentum=0.9)), labels, network.ALL, network.ALL
    )
    rates, terms = dict.fromkeys(network.ALL, 0.1), {"task": network.cross_entropy}
    step = make_step(network.make_apply(), terms, tx, labels, rates, clip=1.0)
    state = create(params, {}, tx, key=jax.random.key(0))
    rows = [network.batch(32, real=normed.unequal_mask(), seed=seed) for seed in range(2)]
    alone, one = normed.trained(jax.tree.map(jnp.copy, state), make_compiled(step), rows)
    mesh = make_mesh()

    def split(leaf):
        rows = leaf.ndim and leaf.shape[0] % 8 == 0
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("data" if rows else None)))

    state = jax.tree.map(lambda x: split(x) if x.ndim else replicate(x, mesh), state)
    where = jax.tree.map(lambda x: x.sharding, state)
    step = make_step(
        network.make_apply(), terms, tx, labels, rates, clip=1.0, accumulate=accumulate
    )
    rows = [shard_batch(batch, mesh) for batch in rows]
    together, eight = normed.trained(state, make_compiled(step), rows)
    network.close(one, eight, 1e-5)
    network.close(alone.params["body"], together.params["body"], 1e-5)
    assert jax.tree.map(lambda x: x.sharding, together) == where


def test_pmap_with_microbatches_is_one_device():
    # Without BatchNorm live, whose microbatches are other rows on eight devices than on one.
    params, labels = network.parameters(), network.labelled(network.parameters())
    live = frozenset({"head", "block_5"})
    tx = phase_optimizer(dict.fromkeys(live, optax.sgd(1.0)), labels, live, live)
    results = []
    for axis_name, accumulate in ((None, 1), ("data", 1), ("data", 2)):
        terms = {"task": network.cross_entropy, "pull": pull_head}
        rates = dict.fromkeys(live, 0.1)
        step = make_step(
            network.make_apply(),
            terms,
            tx,
            labels,
            rates,
            accumulate=accumulate,
            axis_name=axis_name,
        )
        call = pmap_step(step, axis_name="data") if axis_name else make_compiled(step)
        state = create(params, {}, tx, key=jax.random.key(0))
        batch = network.batch(32, real=normed.unequal_mask())
        results.append(normed.trained(state, call, [batch]))
    for state, metrics in results[1:]:
        network.close(metrics, results[0][1], 1e-5)
        network.close(state.params["head"], results[0][0].params["head"], 1e-5)
        network.close(state.params["body"], results[0][0].params["body"], 1e-5)


def pull_head(c):
    return 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(c.params["head"])), jnp.float32(1.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_head_only_step_sends_the_head_alone(accumulate):
    labels = network.labelled(network.parameters())
    tx = phase_optimizer({"head": optax.sgd(1.0)}, labels, {"head"}, {"head"})
    step = make_step(
        network.make_apply(),
        {"task": network.cross_entropy},
        tx,
        labels,
        {"head": 0.1},
        clip=1.0,
        accumulate=accumulate,
        axis_name="data",
    )
    state = create(network.parameters(), {}, tx, key=jax.random.key(0))
    run = pmap_step(step, axis_name="data")
    compiled = run.compile(state, network.batch(4096), START)
    params = network.parameters()
    apply = network.make_apply()
    forward = jax.jit(lambda p, b: apply(p, {}, b, key=None, live=frozenset())[0])
    rows = 4096 // 8 // accumulate
    cost = forward.lower(params, network.batch(rows)).compile().cost_analysis()
    assert compiled.flops < 1.05 * cost["flops"]


def test_each_device_has_noise_of_its_own():
    def noise(c):
        return jax.random.normal(c.key), jnp.float32(1.0)

    state, step = normed.ready("data", terms={"task": network.cross_entropy, "noise": noise})
    _, metrics = pmap_step(step, axis_name="data")(state, normed.batches()[0], START)
    key = jax.random.fold_in(jax.random.key(0), 0)
    keys = [jax.random.split(jax.random.fold_in(key, device), 3)[2] for device in range(8)]
    expected = np.mean([float(jax.random.normal(own)) for own in keys])
    assert float(metrics["loss/noise"]) == pytest.approx(expected, abs=1e-6)


def test_pmap_compiles_once_and_keeps_no_leading_axis():
    state, step = normed.ready("data")
    shapes = jax.tree.map(jnp.shape, state)
    run = pmap_step(step, axis_name="data")
    new, metrics = run(state, normed.batches()[0], 0)
    new, metrics = run(new, normed.batches()[1], 0)
    assert len(run.compiled) == 1
    assert jax.tree.map(jnp.shape, new) == shapes
    assert jnp.shape(metrics["loss"]) == ()
    assert run.flops > 0


def test_a_loss_that_is_not_finite_on_one_device_is_refused_on_all():
    state, step = normed.ready("data")
    before = jax.tree.map(np.asarray, state.params)
    bad = normed.batches()[0]
    bad["x"][0, 0] = np.nan
    new, metrics = pmap_step(step, axis_name="data")(state, bad, START)
    assert not bool(metrics["finite"])
    for leaf, old in zip(jax.tree.leaves(new.params), jax.tree.leaves(before), strict=True):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), old)


def test_statistics_that_differ_by_device_are_an_error():
    tx = phase_optimizer(
        dict.fromkeys(normed.LIVE, optax.sgd(1.0)), normed.LABELS, normed.LIVE, normed.LIVE
    )
    step = make_step(
        normed.make_apply(),
        {"task": network.cross_entropy},
        tx,
        normed.LABELS,
        dict.fromkeys(normed.LIVE, 0.1),
        axis_name="data",
    )
    state, _ = normed.ready()
    with pytest.raises(ValueError, match=r"statistics differ .*norm/mean.*axis_name='data'"):
        pmap_step(step, axis_name="data")(state, network.batch(32, dim=normed.DIM), START)


def test_rows_that_do_not_divide_are_an_error():
    state, step = normed.ready("data")
    with pytest.raises(ValueError, match="for 8 devices.*a multiple of 8"):
        pmap_step(step, axis_name="data")(state, network.batch(12, dim=normed.DIM), START)
    with pytest.raises(ValueError, match="for 8 devices.*a multiple of 8"):
        shard_batch(network.batch(12, dim=normed.DIM), make_mesh())


def test_fewer_devices():
    state, step = normed.ready("data")
    devices = jax.devices()[:2]
    new, _ = pmap_step(step, axis_name="data", devices=devices)(state, normed.batches()[0], START)
    assert new.step.sharding.device_set == set(devices)
    mesh = make_mesh(devices)
    assert shard_batch(normed.batches()[0], mesh)["x"].sharding.device_set == set(devices)


def test_replicas_share_no_buffer_with_the_caller():
    state, step = normed.ready()
    mesh = make_mesh()
    copy = replicate(state, mesh)
    run = compile_step(step, copy, shard_batch(normed.batches()[0], mesh), START)
    run.call(copy, shard_batch(normed.batches()[0], mesh), START)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_an_embedding_runs_under_the_mesh():
    # Under jax's default axis type, Explicit, this very lookup is a ShardingTypeError.
    import flax.linen as nn

    mesh = make_mesh()
    table = nn.Embed(10, 4)
    ids = jnp.zeros((8, 2), jnp.int32)
    variables = table.init(jax.random.key(0), ids)
    with jax.set_mesh(mesh):
        rows = shard_batch({"ids": np.zeros((8, 2), np.int32)}, mesh)["ids"]
        found = jax.jit(table.apply)(replicate(variables, mesh), rows)
    assert found.shape == (8, 2, 4)
