import jax
import jax.numpy as jnp
import network
import numpy as np
import optax

from jtl.train.failure import NonFiniteError, explain
from jtl.train.optimizer import phase_optimizer
from jtl.train.state import create
from jtl.train.step import make_step

START = jnp.int32(0)
LIVE = frozenset({"head", "block_5"})


def clean():
    return {**network.parameters(), "unused": {"bias": jnp.zeros(2)}}


def ready(terms, *, params=None, refs=None):
    params = clean() if params is None else params
    labels = network.labelled(params)
    tx = phase_optimizer(dict.fromkeys(LIVE, optax.adamw(1.0)), labels, LIVE, LIVE)
    apply = network.make_apply(dropout=0.1)
    step = make_step(apply, terms, tx, labels, dict.fromkeys(LIVE, 1e-2), clip=1.0)
    state = create(params, {}, tx, refs=refs, key=jax.random.key(0))
    return state._replace(step=jnp.int32(11)), jax.jit(step), dict(apply=apply, labels=labels)


def explained(terms, batch, *, locate=None, **made):
    state, step, known = ready(terms, **made)
    after, metrics = step(state, batch, START)
    assert not bool(metrics["finite"])
    apply, labels = known["apply"], known["labels"]
    error = explain(
        apply, terms, after, batch, labels=labels, live=LIVE, step=int(state.step), locate=locate
    )
    assert isinstance(error, NonFiniteError) and isinstance(error, ValueError)
    return str(error)


def penalty(c):
    return 0.0 * sum(jnp.sum(x**2) for x in jax.tree.leaves(c.params["head"])), jnp.float32(1.0)


def test_a_nan_in_the_data_is_found():
    batch = network.batch(8)
    batch["x"][[2, 5], 3] = np.nan
    batch["index"] = batch["index"] + 100
    asked = []

    def locate(params, stats, batch):
        asked.append(set(batch))
        return "block_0"

    said = explained({"task": network.cross_entropy, "pull": penalty}, batch, locate=locate)
    assert "step 11: the loss is not finite: term 'task' is nan" in said
    assert "'pull'" not in said
    assert "column 'x' is not finite in examples [102, 105] of the data" in said
    assert "the first block that is not finite is 'block_0'" in said
    assert "labels ['block_5', 'head']" in said
    assert "the state before step 11 is kept; clean these rows" in said
    assert asked == [set(batch)]


def test_the_term_is_named():
    def broken(c):
        return jnp.log(-jnp.sum(c.params["head"]["kernel"] ** 2)), jnp.float32(1.0)

    said = explained({"task": network.cross_entropy, "pull": broken}, network.batch(8))
    assert "term 'pull' is nan" in said
    assert "'task'" not in said
    assert "column" not in said
    assert "takes the log of" in said


def test_a_gradient_alone_is_named():
    def cusp(c):  # value 0, slope infinite
        return jnp.sqrt(jnp.sum(c.params["body"]["block_5"]["bias"] ** 2)), jnp.float32(1.0)

    said = explained({"task": network.cross_entropy, "pull": cusp}, network.batch(8))
    assert "step 11: the gradient is not finite: the gradient is not finite at labels" in said
    assert "['block_5']; the state" in said
    assert "lower the rates of ['block_5'] or set clip" in said


def test_a_start_that_is_not_finite_is_named():
    params = clean()
    params["body"]["block_1"]["bias"] = params["body"]["block_1"]["bias"].at[3].set(jnp.inf)

    def nan(c):
        return c.refs["anchor"] * 1.0, 1.0

    said = explained(
        {"task": network.cross_entropy, "pull": nan},
        network.batch(8),
        params=params,
        refs={"anchor": jnp.float32(jnp.nan)},
    )
    assert "params are not finite at 'body/block_1/bias'" in said
    assert "refs are not finite at 'anchor'" in said


def test_what_does_not_repeat_is_said():
    state, _, known = ready({"task": network.cross_entropy})
    error = explain(
        known["apply"],
        {"task": network.cross_entropy},
        state,
        network.batch(8),
        labels=known["labels"],
        live=LIVE,
    )
    assert "step 11: the update is not finite" in str(error)
    assert "finite loss and gradient when it is replayed" in str(error)


def test_rows_without_index():
    batch = network.batch(8)
    del batch["index"]
    batch["x"][1] = np.inf
    said = explained({"task": network.cross_entropy}, batch)
    assert "column 'x' is not finite in rows [1] of the batch" in said
