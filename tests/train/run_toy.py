"""A toy in plain jnp: body, norm with a running mean, head; and data made of steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtl import masks
from jtl.train import run
from jtl.train.compile import make_compiled
from jtl.train.plan import Phase
from jtl.train.step import make_step

ROWS, DIM, PER_EPOCH = 8, 3, 4
RULES = (("body/.*", "body"), ("norm/.*", "norm"), ("head/.*", "head"))


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "body": {"kernel": jax.random.normal(keys[0], (DIM, 4))},
        "norm": {"scale": jnp.ones(4)},
        "head": {"kernel": jax.random.normal(keys[1], (4, 1)), "bias": jnp.zeros(1)},
    }


def make_stats():
    return {"norm": {"mean": jnp.zeros(4)}}


def apply(params, stats, batch, *, key=None, live=frozenset()):
    """Dropout in a live body; a running mean that moves only where the norm is live."""
    hidden = jnp.tanh(batch["x"] @ params["body"]["kernel"])
    if "body" in live:
        hidden = hidden * jax.random.bernoulli(key, 0.9, hidden.shape) / 0.9
    mean = stats["norm"]["mean"]
    if "norm" in live:
        mean = 0.9 * mean + 0.1 * jnp.mean(hidden, axis=0)
        stats = {"norm": {"mean": mean}}
    hidden = (hidden - mean[None, :]) * params["norm"]["scale"][None, :]
    out = hidden @ params["head"]["kernel"] + params["head"]["bias"][None, :]
    return {"head": out[:, 0]}, stats


def leaky(params, stats, batch, *, key=None, live=frozenset()):
    """An `apply` that moves the running mean of a held norm."""
    return apply(params, stats, batch, key=key, live=live | {"norm"})


def error(c):
    weight = c.batch["mask"].astype(jnp.float32)
    return jnp.sum(weight * (c.out["head"] - c.batch["label"]) ** 2), jnp.sum(weight)


def batch_at(step):
    """Return a batch that depends on nothing but the step, the same in each epoch."""
    rng = np.random.default_rng(step % PER_EPOCH)
    x = rng.normal(size=(ROWS, DIM)).astype(np.float32)
    return {
        "x": x,
        "label": np.sin(x.sum(1)).astype(np.float32),
        "mask": np.arange(ROWS) < ROWS - 1,
        "index": np.arange(ROWS, dtype=np.int32),
    }


def feed(live, params, stats):
    def batches(start):
        while True:
            yield batch_at(start)
            start += 1

    return run.Feed(batches, PER_EPOCH)


def evaluate(params, stats, live):
    out, _ = apply(params, stats, batch_at(0))
    return {"score": -float(jnp.mean((out["head"] - batch_at(0)["label"]) ** 2))}


def script(*values):
    """Return an `evaluate` that gives these figures one after the other."""
    left = list(values)
    return lambda params, stats, live: {"score": left.pop(0)}


def labels():
    return masks.label(make_params(), RULES)


TXS = {name: optax.adam(1.0) for name in ("body", "norm", "head")}


_MADE = {}


def make(apply, terms, tx, labels, rates, **given):
    """Return the compiled step of a toy phase, the same one for the same rates."""
    build = lambda: make_compiled(make_step(apply, terms, tx, labels, rates, **given))  # noqa: E731
    if any(callable(rate) for rate in rates.values()):
        return build()
    slots = str(jax.tree.structure(jax.eval_shape(tx.init, make_params())))
    key = (apply, frozenset(rates.items()), frozenset(terms), tuple(given.items()), slots)
    return _MADE[key] if key in _MADE else _MADE.setdefault(key, build())


def options(**changes):
    return {
        "make": make,
        "apply": apply,
        "terms": {"error": error},
        "txs": TXS,
        "labels": labels(),
        "feed": feed,
        "evaluate": evaluate,
        "metric": "score",
        **changes,
    }


def begin(plan, **changes):
    """Return the state before a plan."""
    given = {"txs": TXS, "labels": labels(), "key": jax.random.key(5), **changes}
    return run.start_state(make_params(), make_stats(), plan, **given)


def start(plan, **changes):
    """Return the generator of a run from the toy's start."""
    return run.run(begin(plan), plan, **options(**changes))


def copied(state):
    """Return a state as numpy, which the next step cannot take."""
    state = state._replace(key=jax.random.key_data(state.key))
    return jax.tree.map(lambda x: np.array(x, copy=True), state)


def head_then_all():
    return [
        Phase("head", {"head": 0.05}, epochs=1),
        Phase("all", {"body": 0.01, "norm": 0.01, "head": 0.02}, epochs=1.5),
    ]
