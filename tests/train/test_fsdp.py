import jax
import jax.numpy as jnp
import network
import normed
import numpy as np
import optax
import pytest

from jtl import trees
from jtl.train import checkpoint, parallel
from jtl.train.compile import shapes_of
from jtl.train.held import check_held, digests

DIM = 16


def trained(kind, devices=None, **options):
    """Return spread, digests at the start, state, metrics and steps after three steps."""
    spread = parallel.make_spread(kind, devices, threshold=8)
    momentum = optax.sgd(1.0, momentum=0.9)
    state, step = normed.ready(spread.axis_name, dim=DIM, tx=momentum, **options)
    state = parallel.place(spread, state)
    before = digests(state, normed.LABELS, normed.LIVE)
    steps = parallel.compiled(spread, step)
    rows = [parallel.put(spread, batch) for batch in normed.batches(dim=DIM)]
    return spread, before, *normed.trained(state, steps, rows), steps


@pytest.fixture(scope="module")
def alone():
    return trained("data", jax.devices()[:1], accumulate=2)


@pytest.mark.parametrize("kind", ["data", "fsdp", "pmap"])
def test_eight_devices_are_one_device(kind, alone):
    # With SGD: Adam makes 1e-3 of the rounding where a gradient is nearly 0.
    spread, before, state, metrics, steps = trained(kind, accumulate=2)
    network.close(metrics, alone[3], 1e-5)
    for part in ("params", "stats", "opt_state"):
        network.close(getattr(state, part), getattr(alone[2], part), 1e-5)
    check_held(before, digests(state, normed.LABELS, normed.LIVE), kind)
    assert before == alone[1] and len(before) == 4, "two held parameters and two statistics"
    assert jax.tree.map(lambda x: x.sharding, state) == parallel.shardings(spread, state)
    assert len(steps.compiled) == 1 and parallel.size(spread) == 8
    split = not state.params["held"]["scale"].sharding.is_fully_replicated
    assert split == (kind == "fsdp")


def test_fsdp_keeps_an_eighth_on_each_device():
    params = {"body": jnp.ones((256, 512)), "odd": jnp.ones((257, 255)), "bias": jnp.ones(512)}
    tree = {"params": params, "slots": optax.adam(0.1).init(params), "key": jax.random.key(0)}
    placed = parallel.place(parallel.make_spread("fsdp"), tree)
    kept = {
        name: leaf.addressable_shards[0].data.nbytes / leaf.nbytes
        for name, leaf in zip(trees.names(placed), jax.tree.leaves(placed), strict=True)
    }
    split = {name for name, share in kept.items() if share == 1 / 8}
    assert split == {"params/body", "slots/0/mu/body", "slots/0/nu/body"}
    assert {share for name, share in kept.items() if name not in split} == {1.0}
    body = {"body": jnp.ones((512, 512))}
    whole = {"params": body, "slots": optax.adam(0.1).init(body)}
    placed = parallel.place(parallel.make_spread("fsdp"), whole)
    shards = sum(leaf.addressable_shards[5].data.nbytes for leaf in jax.tree.leaves(placed))
    assert shards == pytest.approx(trees.size_bytes(whole) / 8, rel=1e-4)
    jax.tree.map(np.testing.assert_array_equal, placed, whole)


def test_a_state_is_made_where_it_lies():
    spread = parallel.make_spread("fsdp")

    def init():
        params = {"w": jnp.ones((256, 512))}
        return params, optax.adam(0.1).init(params)

    where = parallel.shardings(spread, jax.eval_shape(init))
    made = jax.jit(init, out_shardings=where)()
    assert jax.tree.map(lambda x: x.sharding, made) == where
    assert made[0]["w"].addressable_shards[3].data.shape == (256, 64)


@pytest.mark.parametrize("kind", ["jit", "fsdp", "pmap"])
def test_what_was_compiled_ahead_serves_the_steps(kind):
    spread = parallel.make_spread(kind, threshold=8)
    state, step = normed.ready(spread.axis_name, dim=DIM)
    state, batch = parallel.place(spread, state), normed.batches(1, DIM)[0]
    steps = parallel.compiled(spread, step)
    steps.prepare(shapes_of(state), [parallel.shapes(spread, batch)])
    assert len(steps.compiled) == 1
    rows = parallel.put(spread, batch)
    for _ in range(2):
        state, _ = steps(state, rows, 0)
    assert len(steps.compiled) == 1 and steps.waits == []
    assert {n: (x.shape, x.dtype, x.sharding) for n, x in rows.items()} == {
        n: (x.shape, x.dtype, x.sharding) for n, x in parallel.shapes(spread, batch).items()
    }


@pytest.mark.parametrize(
    ("wrote", "reads"), [(("fsdp", 8), ("jit", 1)), (("jit", 1), ("fsdp", 8)), (("fsdp", 8),) * 2]
)
def test_a_checkpoint_does_not_depend_on_the_devices(tmp_path, wrote, reads):
    def placed(seed, kind, devices):
        key = jax.random.key(seed)
        params = {"w": jax.random.normal(key, (16, 64)), "b": jnp.full(3, float(seed))}
        tree = {"params": params, "slots": optax.adam(0.1).init(params), "key": key}
        if devices == 1:
            return tree
        return parallel.place(parallel.make_spread(kind, threshold=64), tree)

    saved = checkpoint.open_checkpoints(tmp_path, fingerprint={})
    checkpoint.save(saved, 1, {"state": placed(3, *wrote)}, {})
    like = placed(0, *reads)
    found = checkpoint.restore(saved, {"state": like})["state"]
    part = checkpoint.restore(saved, {"state": like}, include="state/params/*")["state"]
    checkpoint.close(saved)
    expected = placed(3, *reads)
    jax.tree.map(np.testing.assert_array_equal, *map(_bare, (found, expected)))
    jax.tree.map(np.testing.assert_array_equal, *map(_bare, (part["params"], expected["params"])))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
        assert a.sharding == b.sharding and a.committed == b.committed


def _bare(tree):
    key = jax.dtypes.prng_key
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, key) else x, tree
    )


def test_arrays_are_fetched_whole():
    tree = {"w": jnp.arange(64.0).reshape(8, 8), "key": jax.random.key(3)}
    found = parallel.fetch(parallel.place(parallel.make_spread("fsdp", threshold=8), tree))
    assert all(isinstance(x, np.ndarray) for x in found.values())
    np.testing.assert_array_equal(found["w"], tree["w"])
    np.testing.assert_array_equal(found["key"], jax.random.key_data(tree["key"]))


@pytest.mark.parametrize("kind", ["data", "fsdp", "pmap"])
def test_an_evaluation_is_split_over_the_devices(kind):
    spread = parallel.make_spread(kind, threshold=1024)
    apply, params = network.make_apply(), network.parameters()

    def forward(params, stats, batch):
        return apply(params, stats, batch, key=None, live=frozenset())

    placed = parallel.place(spread, params)
    split = parallel.split_forward(spread, forward)
    for rows in (64, 60):
        batch = network.batch(rows)
        expected, _ = forward(params, {}, batch)
        found, _ = split(placed, {}, batch)
        assert found["head"].sharding.is_fully_replicated
        network.close(found, expected, 1e-5)

    def flops(call, params):
        return call.lower(params, {}, network.batch(64)).compile().cost_analysis()["flops"]

    assert flops(split, placed) < 0.2 * flops(jax.jit(forward), params)


def test_rows_of_this_process():
    assert parallel.rows(parallel.make_spread("data"), 32) == slice(0, 32)
    assert parallel.rows(parallel.Spread("jit", None, None, 1), 5) == slice(0, 5)


def test_a_single_device_takes_everything_as_it_is():
    alone = parallel.Spread("jit", None, None, 2**16)
    state, _ = normed.ready()
    assert parallel.place(alone, state) is state and parallel.size(alone) == 1
    host = {"x": np.ones((3, 2), np.float32)}
    rows = parallel.put(alone, host)
    assert not rows["x"].committed and float(rows["x"].sum()) == 6.0
    assert parallel.shapes(alone, host)["x"].shape == (3, 2)
    parallel.check_batch_size(alone, 7, accumulate=2)


@pytest.mark.parametrize(
    ("kind", "accumulate", "batch_size", "message"),
    [
        ("data", 1, 30, "30 rows does not divide over 8 devices; take batch_size 24 or 32"),
        ("fsdp", 4, 4, "4 rows does not divide over 8 devices; take batch_size 8"),
        ("pmap", 2, 24, "over 8 devices in 2 microbatches each; take batch_size 16 or 32"),
    ],
)
def test_a_batch_size_that_does_not_divide_is_an_error(kind, accumulate, batch_size, message):
    spread = parallel.make_spread(kind)
    with pytest.raises(ValueError, match=message):
        parallel.check_batch_size(spread, batch_size, accumulate=accumulate)
    parallel.check_batch_size(spread, 32, accumulate=accumulate)


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="parallel is 'fdsp'; did you mean 'fsdp'.*'pmap'"):
        parallel.make_spread("fdsp")
