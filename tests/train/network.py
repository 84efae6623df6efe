"""A small network in labelled blocks, as plain functions: dropout, compute dtype, BatchNorm."""

import jax
import jax.numpy as jnp
import numpy as np

from jtl import masks

BLOCKS = 6
DIM = 64
CLASSES = 3
LIVE = frozenset({"head"})
ALL = frozenset({"head", *(f"block_{i}" for i in range(BLOCKS))})


def parameters(seed=0, *, dim=DIM, blocks=BLOCKS):
    rng = np.random.default_rng(seed)

    def dense(width):
        kernel = rng.normal(size=(dim, width)) / np.sqrt(dim)
        return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(width)}

    body = {f"block_{i}": dense(dim) for i in range(blocks)}
    payload = np.array([0x7FC12345, 0x80000000], np.uint32).view(np.float32)  # a NaN, and -0.0
    return {"body": body, "head": dense(CLASSES), "unused": {"bias": jnp.asarray(payload)}}


def labelled(params):
    rules = [(r"body/block_\d+/.*", "block"), ("head/.*", "head"), ("unused/.*", "unused")]
    labels = masks.label(params, rules)
    body = {name: dict.fromkeys(leaf, name) for name, leaf in labels["body"].items()}
    return {**labels, "body": body}


def make_apply(*, dropout=0.0, dtype=jnp.float32):
    def apply(params, stats, batch, *, key, live):
        hidden = batch["x"].astype(dtype)
        for i, layer in enumerate(params["body"].values()):
            layer = jax.tree.map(lambda x: x.astype(dtype), layer)
            hidden = jnp.tanh(hidden @ layer["kernel"] + layer["bias"][None])
            if dropout and f"block_{i}" in live:
                kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - dropout, hidden.shape)
                hidden = jnp.where(kept, hidden / (1 - dropout), 0.0)
        head = params["head"]
        logits = hidden.astype(jnp.float32) @ head["kernel"] + head["bias"][None]
        return {"head": logits}, stats

    return apply


def cross_entropy(context):
    logits, batch = context.out["head"], context.batch
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], 1)[:, 0]
    return -jnp.sum(jnp.where(batch["mask"], picked, 0.0)), jnp.sum(batch["mask"])


def batch(rows=32, *, seed=0, real=None, dim=DIM):
    rng = np.random.default_rng(seed)
    mask = np.ones(rows, bool) if real is None else np.asarray(real)
    return {
        "x": rng.normal(size=(rows, dim)).astype(np.float32),
        "label": rng.integers(0, CLASSES, rows).astype(np.int32),
        "mask": mask,
        "index": np.where(mask, np.arange(rows), -1).astype(np.int32),
    }


def close(a, b, tolerance=1e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )
