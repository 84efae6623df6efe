"""Reference terms: their gradient is not added, the others' is projected against it."""

import jax
import jax.numpy as jnp
import network
import numpy as np
import optax
import pytest

from jtl import trees
from jtl.penalties import agem
from jtl.train import parallel
from jtl.train.compile import compile_step, make_compiled
from jtl.train.optimizer import phase_optimizer
from jtl.train.state import create
from jtl.train.step import make_step

START = jnp.int32(0)
LIVE = frozenset({"head", "block_1"})
PROJECT = (("memory",), agem.project)


def half(rows):
    """Return the cross-entropy over some rows of the batch, by a column of their own."""

    def term(c):
        own = c.batch["mask"] & (c.batch["stream"] == rows)
        return network.cross_entropy(c._replace(batch={**c.batch, "mask": own}))

    return term


TERMS = {"task": half(0), "memory": half(1)}


def batch(rows=32, *, seed=0):
    """Return task rows and memory rows that want the opposite: the same x, another label."""
    rng = np.random.default_rng(seed)
    found = network.batch(rows, dim=16, seed=seed)
    x = np.repeat(found["x"][: rows // 2], 2, axis=0)
    label = np.stack([np.zeros(rows // 2), rng.integers(1, 3, rows // 2)], 1).reshape(-1)
    stream = np.tile([0, 1], rows // 2).astype(np.int32)
    order = rng.permutation(rows)  # so that microbatches and devices have unequal shares
    found |= {"x": x, "label": label.astype(np.int32), "stream": stream}
    return found | {name: found[name][order] for name in ("x", "label", "stream")}


def ready(terms=TERMS, live=LIVE, **options):
    params = network.parameters(dim=16, blocks=2)
    labels = network.labelled(params)
    tx = phase_optimizer(dict.fromkeys(live, optax.sgd(1.0)), labels, live, live)
    state = create(params, {}, tx, key=jax.random.key(0))
    rates = dict.fromkeys(live, 0.1)
    return state, make_step(network.make_apply(), terms, tx, labels, rates, **options)


def gradient(terms, **options):
    """Return metrics, and the gradient that the optimizer got: SGD shows it."""
    state, step = ready(terms, **options)
    new, metrics = jax.jit(step)(state, batch(), START)
    moved = jax.tree.map(lambda a, b: (a - b) / 0.1, state.params, new.params)
    return metrics, {"body": moved["body"]["block_1"], "head": moved["head"]}


def test_the_gradient_is_that_of_the_task_projected():
    task_metrics, task = gradient({"task": half(0)})
    _, memory = gradient({"memory": half(1)})
    assert float(trees.dot(task, memory)) < 0
    metrics, found = gradient(TERMS, project=PROJECT)
    network.close(found, agem.project(task, memory), 1e-5)
    assert float(trees.dot(found, memory)) == pytest.approx(0.0, abs=1e-5)
    assert float(metrics["loss"]) == float(task_metrics["loss"]) == float(metrics["loss/task"])
    assert float(metrics["loss/memory"]) > 0
    assert float(metrics["grad_norm"]) == pytest.approx(float(trees.norm(found)), rel=1e-4)


def test_the_clip_comes_after_the_projection():
    _, found = gradient(TERMS, project=PROJECT)
    _, clipped = gradient(TERMS, project=PROJECT, clip=0.01)
    factor = 0.01 / float(trees.norm(found))
    network.close(clipped, jax.tree.map(lambda g: factor * g, found), 1e-5)


def test_a_reference_that_agrees_changes_nothing():
    _, task = gradient({"task": half(0)})
    _, found = gradient({"task": half(0), "memory": half(0)}, project=PROJECT)
    network.close(found, task, 1e-6)


def test_a_reference_without_rows_changes_nothing():
    _, task = gradient({"task": half(0)})
    _, found = gradient({"task": half(0), "memory": half(7)}, project=PROJECT)
    network.close(found, task, 1e-6)


@pytest.mark.parametrize(("kind", "accumulate"), [("jit", 4), ("fsdp", 1), ("pmap", 2)])
def test_microbatches_and_devices_are_one_batch(kind, accumulate):
    # To project on each device and add up is another gradient: the product runs over the sums.
    state, step = ready(project=PROJECT)
    alone, one = make_compiled(step)(state, batch(), 0)
    spread = parallel.make_spread(kind, threshold=64)
    if kind == "jit":
        spread = parallel.Spread(kind, None, None, 1)
    state, step = ready(project=PROJECT, accumulate=accumulate, axis_name=spread.axis_name)
    steps = parallel.compiled(spread, step)
    together, many = steps(parallel.place(spread, state), parallel.put(spread, batch()), 0)
    network.close(many, one, 1e-5)
    network.close(together.params["body"], alone.params["body"], 1e-6)
    network.close(together.params["head"], alone.params["head"], 1e-6)


def test_it_is_one_forward_pass_and_two_backward():
    def flops(**options):
        state, step = ready(TERMS, network.ALL & {"head", "block_0", "block_1"}, **options)
        return compile_step(step, state, batch(512), START).flops

    # Forward and backward of live layers are 1 and 2 parts: (1 + 2 + 2) / (1 + 2), less what the
    # lowest layer does not send on.
    assert 1.4 < flops(project=PROJECT) / flops() < 5 / 3 + 0.05


def test_a_reference_that_is_not_finite_stops_the_step():
    def infinite(c):  # the slope of the root at 0
        return jnp.sqrt(jnp.sum(jnp.abs(c.params["head"]["bias"]))), 1.0

    state, step = ready({"task": half(0), "memory": infinite}, project=PROJECT)
    new, metrics = step(state, batch(), START)
    assert not bool(metrics["finite"]) and int(new.step) == 0


@pytest.mark.parametrize("names", [(), ("mem",), ("task", "memory")])
def test_errors(names):
    with pytest.raises(ValueError, match=r"the terms are \['memory', 'task'\]; name one or more"):
        ready(project=(names, agem.project))
