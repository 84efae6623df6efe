"""Statistics made anew: equal to those of the activations, whatever stood there before."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.models.heads import Linear
from jtl.models.layers.norms import BatchNorm
from jtl.models.model import attach
from jtl.recipes.scratch import scratch
from jtl.train.statistics import make_recompute, recompute
from jtl.trees import names

SHAPE = {
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "depths": [1, 1],
    "layer_type": "basic",
    "image_size": 16,
}
ROWS = 24


@pytest.fixture(scope="module")
def model():
    return attach(scratch("resnet", SHAPE), {"head": Linear(3)}, key=jax.random.key(0))


@pytest.fixture(scope="module")
def again(model):
    return make_recompute(model.apply, live=model.groups)


def batch(seed=0, real=ROWS):
    pixels = jax.random.normal(jax.random.key(seed), (ROWS, 16, 16, 3))
    mask = np.arange(ROWS) < real
    return {"pixel_values": 2.0 * pixels + 0.5, "mask": mask}


def activations(model, params, data, live):
    """Return {path of a norm: what comes into it}, real rows only."""
    seen = {}

    def look(run, args, kwargs, context):
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            seen["/".join(context.module.path)] = np.asarray(args[0], np.float64)[data["mask"]]
        return run(*args, **kwargs)

    with nn.intercept_methods(look):
        model.apply(params, model.stats, data, live=frozenset(live))
    return seen


def at(stats, path):
    for name in path.split("/"):
        stats = stats[name]
    return stats


def test_they_are_mean_and_variance_of_the_activations(model, again):
    data = batch(real=18)
    wrong = jax.tree.map(lambda leaf: leaf * 3.0 + 7.0, model.stats)
    found = again(model.params, wrong, [data])["backbone"]
    seen = activations(model, model.params, data, model.groups)
    assert len(seen) == len(jax.tree.leaves(found)) // 2 > 4
    for path, x in seen.items():
        flat = x.reshape(-1, x.shape[-1])
        np.testing.assert_allclose(at(found, path)["mean"], flat.mean(0), rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(at(found, path)["var"], flat.var(0, ddof=1), rtol=2e-4)


def test_over_batches_the_mean_weighs_rows_and_the_order_does_not_count(model, again):
    data = [batch(1), batch(2, real=8), batch(3, real=0)]
    found = again(model.params, model.stats, data)
    alone = [again(model.params, model.stats, [one]) for one in data[:2]]
    wanted = jax.tree.map(lambda x, y: (24 * x + 8 * y) / 32, *alone)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, wanted)
    other = again(model.params, found, data[::-1])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, other)


def test_the_first_mean_is_that_of_all_rows(model, again):
    data = [batch(1), batch(2, real=8)]
    found = again(model.params, model.stats, data)["backbone"]
    seen = [activations(model, model.params, one, model.groups) for one in data]
    first = next(iter(seen[0]))
    both = np.concatenate([one[first].reshape(-1, one[first].shape[-1]) for one in seen])
    np.testing.assert_allclose(at(found, first)["mean"], both.mean(0), rtol=1e-5, atol=1e-6)


def test_an_evaluation_with_them_gives_what_training_mode_gives(model, again):
    data = batch()
    other = jax.tree.map(lambda leaf: leaf * 1.5, model.params)
    trained, _ = model.apply(other, model.stats, data, live=frozenset(model.groups))
    before, _ = model.apply(other, model.stats, data)
    fresh = again(other, model.stats, [data])
    after, kept = model.apply(other, fresh, data)
    scale = float(jnp.abs(trained["pooled"]).mean())
    gaps = [float(jnp.abs(out["pooled"] - trained["pooled"]).mean()) for out in (before, after)]
    assert gaps[1] < 0.02 * scale < 0.1 * scale < gaps[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, fresh))


def test_only_live_stages_change(model):
    live = {"block_1"}
    wrong = jax.tree.map(lambda leaf: leaf + 0.5, model.stats)
    found = recompute(model.apply, model.params, wrong, [batch()], live=live)
    _, step = model.apply(model.params, wrong, batch(), live=frozenset(live))
    rows = zip(names(wrong), *map(jax.tree.leaves, (wrong, found, step)), strict=True)
    moved = 0
    for name, old, new, after in rows:
        if np.array_equal(old, after):
            assert np.array_equal(old, new), name
            continue
        moved += 1  # one step of momentum 0.1 goes a tenth of the way
        np.testing.assert_allclose(0.9 * old + 0.1 * new, after, rtol=1e-5, atol=1e-6)
    assert 0 < moved < len(names(wrong))


@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.5, 1.0])
def test_the_decay_plays_no_part(momentum):
    norm = BatchNorm(momentum=momentum)
    params = {"scale": jnp.ones(1), "bias": jnp.zeros(1)}

    def apply(params, stats, batch, *, key, live):
        own = {"params": params, "batch_stats": stats}
        out, moved = norm.apply(own, batch["x"], batch["mask"], bool(live), mutable=["batch_stats"])
        return {"out": out}, moved["batch_stats"]

    old = {"mean": jnp.array([1e4]), "var": jnp.array([1e6])}
    data = {"x": jnp.array([[1.0], [3.0], [5.0], [90.0]]), "mask": np.array([1, 1, 1, 0], bool)}
    again = make_recompute(apply, live={"norm"})
    found = again(params, old, [data])
    np.testing.assert_allclose([*found["mean"], *found["var"]], [3.0, 4.0], rtol=1e-5)
    # Where they are right on the first batch already, the second counts all the same.
    other = {**data, "x": data["x"] + 10.0}
    np.testing.assert_allclose(again(params, found, [data, other])["mean"], [8.0], rtol=1e-5)


def test_without_statistics_nothing_is_done():
    def never(*_, **__):
        raise AssertionError("called")

    assert recompute(never, {}, {}, iter([]), live={"a"}) == {}


def test_nothing_to_take_them_from_is_refused(model, again):
    with pytest.raises(ValueError, match="no batch with a real row"):
        again(model.params, model.stats, [batch(real=0)])
    with pytest.raises(ValueError, match=r"no statistics move with live=\['head'\]"):
        recompute(model.apply, model.params, model.stats, [batch()], live={"head"})
