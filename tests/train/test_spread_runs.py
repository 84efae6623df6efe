import jax
import numpy as np
import optax
import pytest
import run_toy as toy

from jtl.train import checkpoint, parallel, run
from jtl.train.step import make_step

PLAN = toy.head_then_all()
TXS = dict.fromkeys(toy.TXS, optax.sgd(1.0, momentum=0.9))
WAYS = {
    "one": parallel.make_spread("data", jax.devices()[:1]),
    "data": parallel.make_spread("data"),
    "fsdp": parallel.make_spread("fsdp", jax.devices()[:4], threshold=4),
}


MADE = {}


def started(way, checkpoints=None):
    spread = WAYS[way]

    def make(apply, terms, tx, labels, rates, **given):
        key = way, frozenset(rates)
        step = make_step(apply, terms, tx, labels, rates, axis_name=spread.axis_name, **given)
        return MADE.setdefault(key, parallel.compiled(spread, step))

    state = parallel.place(spread, toy.begin(PLAN, txs=TXS))
    put = lambda batch: parallel.put(spread, batch)  # noqa: E731
    options = toy.options(txs=TXS, make=make, put=put, checkpoints=checkpoints, save_every=1)
    return run.run(state, PLAN, **options)


def ended(events):
    *_, last = events
    assert all(row["held_bit_equal"] for row in last.progress.history)
    return toy.copied(last.state), last


@pytest.fixture(scope="module")
def wholes():
    return {way: ended(started(way)) for way in WAYS}


def test_a_run_over_devices_is_a_run_on_one(wholes):
    for way in ("data", "fsdp"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            wholes[way][0],
            wholes["one"][0],
        )
    kernel = wholes["fsdp"][1].state.params["body"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


@pytest.mark.parametrize(("first", "then"), [("fsdp", "fsdp"), ("fsdp", "one"), ("one", "data")])
def test_a_run_goes_on_with_the_devices_that_there_are(tmp_path, wholes, first, then):
    saved = checkpoint.open_checkpoints(tmp_path, fingerprint={})
    events = started(first, saved)
    for event in events:
        if (
            event.kind == "step" and event.step == 2
        ):  # body and norm are held, by the digests of the first run
            events.close()
    checkpoint.close(saved)
    saved = checkpoint.open_checkpoints(tmp_path, fingerprint={})
    state, last = ended(started(then, saved))
    checkpoint.close(saved)
    assert last.step == wholes[then][1].step
    exact = first == then
    jax.tree.map(
        np.testing.assert_array_equal
        if exact
        else lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        state,
        wholes[then][0],
    )
