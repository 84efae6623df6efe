import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_toy as toy

from jtl import trees
from jtl.train import average, checkpoint, run
from jtl.train.plan import EarlyStop, Phase


def seen(plan, *, ema=0.9, **changes):
    """Return the events of a toy run that keeps an average, their states as numpy."""
    options = toy.options(ema=ema, **changes)
    stream = run.run(toy.begin(plan, ema=ema), plan, **options)
    return [event._replace(state=toy.copied(event.state)) for event in stream]


def test_an_average_by_hand():
    # d = min(0.5, (1 + t) / (10 + t)): 0.1, 2/11, ... 0.5 from t = 8 on
    mean = average.begin({"w": jnp.float32(0.0)}, {}, {"w": True})
    for since, weight, expected in [(0, 1.0, 0.9), (1, 1.9, 0.9 + 9 / 11), (8, 0.0, None)]:
        before = mean["params"]["w"]
        new = {"params": {"w": jnp.float32(weight)}, "stats": {}}
        mean = average.moved(mean, new, {"params": {"w": None}, "stats": {}}, 0.5, since)
        got = float(mean["params"]["w"])
        assert got == pytest.approx(float(before) / 2 if expected is None else expected, rel=1e-6)


def test_a_run_follows_the_average_of_its_weights():
    plan = [Phase("both", {"head": 0.1, "body": 0.01}, steps=6)]
    found = seen(plan)
    weights = [e.state.params for e in found if e.kind == "step"]
    mean = jax.tree.map(np.asarray, toy.make_params())
    for step, new in enumerate(weights):
        keep = min(0.9, (1 + step) / (10 + step))
        mean = jax.tree.map(lambda a, b, k=keep: a + (1 - k) * (b - a), mean, new)
    end = found[-1].state
    for label in ("head", "body"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            end.params[label],
            mean[label],
        )
    assert not trees.changes(end.params["norm"], weights[-1]["norm"])
    assert end.ema["params"]["norm"]["scale"] is None, "what never moves has no average"


def test_the_average_is_what_is_evaluated_and_restored():
    plan = [Phase("head", {"head": 0.3}, epochs=3, until=EarlyStop(patience=3))]
    judged = []

    def evaluate(params, stats, live):
        judged.append(jax.tree.map(np.array, params))
        return {"score": [0.1, 0.3, 0.2, 0.25][len(judged) - 1]}

    found = seen(plan, evaluate=evaluate)
    at_best = next(e for e in found if (e.kind, e.step) == ("evaluation", 4)).state
    assert not trees.changes(judged[1]["head"], at_best.ema["params"]["head"])
    assert trees.changes(judged[1]["head"], at_best.params["head"])
    assert not trees.changes(found[-1].state.params, judged[1])


def test_each_phase_begins_its_average_at_its_weights():
    plan = [
        Phase("head", {"head": 0.3}, steps=3),
        Phase("all", {"head": 0.1, "body": 0.1}, steps=2),
    ]
    found = seen(plan)
    begun = next(e for e in found if (e.kind, e.phase) == ("phase_start", "all")).state
    for label in ("head", "body"):
        assert not trees.changes(begun.ema["params"][label], begun.params[label])


def test_statistics_are_averaged_where_they_move_and_keep_their_bits_where_not():
    moving = seen([Phase("norm", {"norm": 0.1}, steps=3)])
    last_step = [e for e in moving if e.kind == "step"][-1].state
    assert trees.changes(last_step.stats, moving[-1].state.stats)
    held = seen([Phase("head", {"head": 0.1}, steps=3)])
    assert not trees.changes(held[0].state.stats, held[-1].state.stats)


def test_an_average_resumes_bit_for_bit(tmp_path):
    plan = [Phase("both", {"head": 0.1, "body": 0.01}, steps=6), Phase("b", {"head": 0.1}, steps=2)]
    whole = seen(plan)[-1].state
    saved = checkpoint.open_checkpoints(tmp_path, fingerprint={})
    stream = run.run(
        toy.begin(plan, ema=0.9), plan, **toy.options(ema=0.9, checkpoints=saved, save_every=2)
    )
    for event in stream:
        if event.step == 4:
            stream.close()
            break
    again = seen(plan, checkpoints=saved)[-1].state
    checkpoint.close(saved)
    assert not trees.changes(whole, again)


def test_an_average_that_the_state_lacks_is_an_error():
    plan = [Phase("head", {"head": 0.1}, steps=2)]
    with pytest.raises(ValueError, match=r"ema is 0.9 and the state keeps no average"):
        list(run.run(toy.begin(plan), plan, **toy.options(ema=0.9, make=None)))
    with pytest.raises(ValueError, match=r"ema is 1.5; it is the decay"):
        list(run.run(toy.begin(plan, ema=0.9), plan, **toy.options(ema=1.5)))
