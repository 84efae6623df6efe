"""A network with a live and a held BatchNorm, and batches whose devices have unequal real rows."""

import jax
import jax.numpy as jnp
import network
import numpy as np
import optax

from jtl.models.layers.norms import BatchNorm
from jtl.train.optimizer import phase_optimizer
from jtl.train.state import create
from jtl.train.step import make_step

START = jnp.int32(0)
DIM = 4
LABELS = {
    "low": {"kernel": "low"},
    "norm": {"scale": "norm", "bias": "norm"},
    "held": {"scale": "held", "bias": "held"},
    "head": {"kernel": "head"},
}
LIVE = frozenset({"low", "norm", "head"})


def unequal_mask():
    """Rows of 8 devices: 3, 0, 1, 2, ... of the 4 of each are real."""
    real = np.zeros((8, 4), bool)
    for device, count in enumerate((3, 0, 1, 2, 4, 4, 1, 3)):
        real[device, :count] = True
    return real.reshape(-1)


def make_apply(axis_name=None):
    def normalise(name, params, stats, hidden, batch, live):
        own = {"params": params[name], "batch_stats": stats[name]}
        hidden, moved = BatchNorm(axis_name=axis_name).apply(
            own, hidden, jnp.asarray(batch["mask"]), name in live, mutable=["batch_stats"]
        )
        return hidden, moved["batch_stats"]

    def apply(params, stats, batch, *, key, live):
        hidden, held = normalise("held", params, stats, jnp.asarray(batch["x"]), batch, live)
        hidden = hidden @ params["low"]["kernel"]
        hidden, norm = normalise("norm", params, stats, hidden, batch, live)
        return {"head": jnp.tanh(hidden) @ params["head"]["kernel"]}, {"norm": norm, "held": held}

    return apply


def ready(axis_name=None, *, terms=None, dim=DIM, tx=None, **options):
    rng = np.random.default_rng(0)
    params = {
        "low": {"kernel": jnp.asarray(rng.normal(size=(dim, dim)), jnp.float32)},
        "norm": {"scale": jnp.full(dim, 1.5), "bias": jnp.full(dim, 0.1)},
        "held": {"scale": jnp.full(dim, 0.7), "bias": jnp.full(dim, 0.3)},
        "head": {"kernel": jnp.asarray(rng.normal(size=(dim, network.CLASSES)), jnp.float32)},
    }
    one = {"mean": jnp.full(dim, 0.1), "var": jnp.full(dim, 1 / 3)}
    tx = phase_optimizer(dict.fromkeys(LIVE, tx or optax.sgd(1.0)), LABELS, LIVE, LIVE)
    step = make_step(
        make_apply(axis_name),
        terms or {"task": network.cross_entropy, "pull": pull},
        tx,
        LABELS,
        dict.fromkeys(LIVE, 0.1),
        clip=0.3,
        axis_name=axis_name,
        **options,
    )
    return create(params, {"norm": one, "held": one}, tx, key=jax.random.key(0)), step


def pull(c):
    return 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(c.params)), jnp.float32(1.0)


def trained(state, call, batches):
    metrics = []
    for batch in batches:
        state, values = call(state, batch, START)
        metrics.append(jax.tree.map(float, values))
    return state, metrics


def batches(count=3, dim=DIM):
    return [
        network.batch(32, seed=s, dim=dim, real=np.roll(unequal_mask(), 8 * s))
        for s in range(count)
    ]
