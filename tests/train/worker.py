"""One process of several: goes on from a checkpoint, trains, saves; prints what it saw as JSON.

python worker.py PROCESS PROCESSES PORT FOLDER
"""

import json
import os
import pathlib
import sys

import jax
import network
import numpy as np
import optax

from jtl.train import checkpoint, parallel
from jtl.train.held import check_held, digest, digests
from jtl.train.optimizer import phase_optimizer
from jtl.train.state import create
from jtl.train.step import make_step

LIVE = frozenset({"head", "block_1"})
ROWS = 12


def ready(seed=0):
    params = network.parameters(seed, blocks=2)
    labels = network.labelled(params)
    ever = LIVE | {"block_0"}
    tx = phase_optimizer(dict.fromkeys(ever, optax.sgd(1.0, momentum=0.9)), labels, LIVE, ever)
    terms, rates = {"task": network.cross_entropy}, dict.fromkeys(LIVE, 0.1)
    step = make_step(network.make_apply(), terms, tx, labels, rates, clip=1.0, accumulate=2)
    return create(params, {}, tx, key=jax.random.key(seed)), step, labels


def batch(number):
    """Return the whole batch; the halves have unequal numbers of real rows."""
    return network.batch(ROWS, seed=number, real=np.arange(ROWS) > number)


def train(folder, spread, numbers):
    """Go on from the checkpoint in `folder` and return the state, the losses and the digests."""
    state, step, labels = ready()
    state = parallel.place(spread, state)
    saved = checkpoint.open_checkpoints(folder, fingerprint={})
    if checkpoint.latest(saved) is not None:
        state = checkpoint.restore(saved, {"state": state})["state"]
    held = digests(state, labels, LIVE)
    steps, losses = parallel.compiled(spread, step), []
    for number in numbers:
        own = {n: x[parallel.rows(spread, ROWS)] for n, x in batch(number).items()}
        state, metrics = steps(state, parallel.put(spread, own), 0)
        losses.append(float(metrics["loss"]))
    check_held(held, digests(state, labels, LIVE), "test")
    checkpoint.save(saved, max(numbers) + 1, {"state": state}, {"losses": losses}, wait=True)
    checkpoint.close(saved)
    return state, losses, held


def main(process, processes, port, folder):
    jax.distributed.initialize(f"localhost:{port}", processes, process, initialization_timeout=60)
    spread = parallel.make_spread("fsdp", threshold=1024)
    state, losses, held = train(pathlib.Path(folder), spread, (2, 3))
    try:
        parallel.place(spread, ready(seed=process)[0])
    except ValueError as error:
        refused = str(error)
    kernel = state.params["body"]["block_0"]["kernel"]
    slot = state.opt_state.inner_states["block_1"]
    shares = [x.addressable_data(0).nbytes / x.nbytes for x in (kernel, *jax.tree.leaves(slot))]
    whole = parallel.fetch({"kernel": kernel, "step": state.step})
    assert digest(whole["kernel"]) == digest(kernel) == held["params/body/block_0/kernel"]
    rows = parallel.rows(spread, ROWS)
    print(
        json.dumps(
            {
                "losses": losses,
                "held": held,
                "shares": shares,
                "rows": [rows.start, rows.stop],
                "refused": refused,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
