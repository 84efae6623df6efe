import dataclasses
import logging
import threading
import time

import jax
import numpy as np
import pytest
import run_toy as toy

from jtl.train import coming, late, run
from jtl.train.compile import make_compiled
from jtl.train.plan import EarlyStop, Phase, Plateau
from jtl.train.prefetch import prefetched
from jtl.train.progress import Progress
from jtl.train.step import make_step


def shapes(live):
    batch = {name: np.asarray(value) for name, value in toy.batch_at(0).items()}
    return [{name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}]


def plan():
    until = Plateau()
    return [
        Phase("head", {"head": 0.1}, epochs=1),
        Phase("open_1", {"head": 0.1, "norm": 0.1}, epochs=1, until=until, series="opening"),
        Phase("open_2", {"head": 0.1, "body": 0.1}, epochs=1, until=until, series="opening"),
        Phase("all", {"head": 0.01, "norm": 0.01, "body": 0.01}, epochs=1, until=EarlyStop()),
    ]


class Maker:
    """A `make` that keeps what it made, with the live labels and the thread that it was made in."""

    def __init__(self):
        self.made = []

    def __call__(self, apply, terms, tx, labels, rates, **given):
        step = make_compiled(make_step(apply, terms, tx, labels, rates, **given))
        self.made.append((sorted(rates), step, threading.current_thread().name))
        return step

    def ready(self, count):
        return len(self.made) == count and all(step.compiled for _, step, _ in self.made)


def ended(**changes):
    ahead = run.Ahead(shapes, toy.PER_EPOCH)
    return list(toy.start(plan(), **{"ahead": ahead, **changes}))


def test_no_phase_waits_for_its_step_to_compile():
    maker = Maker()
    found = ended(make=maker, evaluate=toy.script(0.1, 0.2, 0.3, 0.4, 0.5))
    rows = found[-1].progress.history
    assert [row["name"] for row in rows] == ["head", "open_1", "open_2", "all"]
    assert len(maker.made) == 4, "each phase is made once, though two phases announce the last"
    assert all(name.startswith("jtl-compile") for _, _, name in maker.made)
    assert all(step.waits == [] for _, step, _ in maker.made)
    for row in rows:
        assert row["compilations"] == 1 and row["compile_seconds"] > 0
        assert 0 <= row["compile_wait_seconds"] <= row["border_seconds"]
        assert row["stall_seconds"] == row["border_seconds"]


def test_the_numbers_are_those_of_a_run_that_compiles_when_it_must():
    evaluate = lambda: toy.script(0.1, 0.2, 0.3, 0.4, 0.5)  # noqa: E731
    last = toy.copied(ended(make=Maker(), evaluate=evaluate())[-1].state)
    plain = toy.copied(list(toy.start(plan(), evaluate=evaluate()))[-1].state)
    assert not jax.tree.leaves(
        jax.tree.map(lambda a, b: None if (a == b).all() else 1, last, plain)
    )


def test_a_plateau_has_two_followers_and_what_is_not_needed_is_dropped():
    maker, found = Maker(), []
    options = {"make": maker, "ahead": run.Ahead(shapes, toy.PER_EPOCH)}
    evaluate = toy.script(0.1, 0.2, 0.1, 0.5)  # open_1 does not help
    for event in toy.start(plan(), evaluate=evaluate, **options):
        found.append(event)
        while event.kind == "step" and event.step == 7 and not maker.ready(4):
            time.sleep(0.01)
    assert [e.phase for e in found if e.kind == "phase_end"] == ["head", "open_1", "all"]
    assert all(step.waits == [] for _, step, _ in maker.made)


@pytest.mark.parametrize(
    ("phase", "ended_series", "names"),
    [(0, (), ["open_1"]), (1, (), ["open_2", "all"]), (2, (), ["all"]), (3, (), [])],
)
def test_which_phases_may_follow(phase, ended_series, names):
    progress = Progress(("head",), phase=phase, ended=ended_series)
    assert [p.name for p in coming.candidates(plan(), progress)] == names


def test_a_step_that_cannot_be_prepared_is_made_in_its_turn(caplog):
    def broken(live):
        raise RuntimeError("no shapes today")

    maker = Maker()
    with caplog.at_level(logging.INFO, "jtl.train.coming"):
        found = ended(
            make=maker,
            ahead=run.Ahead(broken, toy.PER_EPOCH),
            evaluate=toy.script(0.1, 0.2, 0.3, 0.4, 0.5),
        )
    assert found[-1].kind == "phase_end" and "no shapes today" in caplog.text


def test_a_step_prepared_for_data_of_another_size_is_made_anew():
    """A schedule spans its phase: with a wrong length of the epoch its numbers would be others."""
    maker = Maker()
    figures = (0.1, 0.2, 0.3, 0.4, 0.5)
    ahead = run.Ahead(shapes, toy.PER_EPOCH + 1)
    found = ended(make=maker, ahead=ahead, evaluate=toy.script(*figures))
    in_turn = [name for _, _, name in maker.made if not name.startswith("jtl-compile")]
    assert len(in_turn) == 4 and found[-1].kind == "phase_end"


def test_a_run_that_nobody_iterates_ends_its_thread_when_it_is_closed():
    maker = Maker()
    events = toy.start(plan(), make=maker, ahead=run.Ahead(shapes, toy.PER_EPOCH))
    before = [t for t in threading.enumerate() if t.name.startswith("jtl-compile")]
    assert len(before) == 1, "it compiles from the call on"
    events.close()
    before[0].join(30)
    assert not before[0].is_alive() and len(maker.made) <= 2


def test_what_evaluation_needs_is_warmed_for_the_phases_to_come():
    warmed = []
    ahead = run.Ahead(shapes, toy.PER_EPOCH, warm=lambda live: warmed.append(sorted(live)))
    ended(make=Maker(), ahead=ahead, evaluate=toy.script(0.1, 0.2, 0.3, 0.4, 0.5))
    assert warmed[0] == ["head", "norm"] and ["head"] not in warmed


def test_a_step_is_started_before_the_metrics_of_the_one_before_are_read(monkeypatch):
    log = []
    read = jax.device_get
    monkeypatch.setattr(late.jax, "device_get", lambda x: (log.append("read"), read(x))[1])

    def make(*args, **given):
        inner = toy.make(*args, **given)

        def step(*arguments):
            log.append("start")
            return inner(*arguments)

        return step

    for event in toy.start([Phase("head", {"head": 0.1}, epochs=1)], make=make):
        log.append(event.kind)
    steps = [entry for entry in log if entry in ("start", "read")]
    # four steps: the second is under way when the first is read; the last is read to evaluate
    assert steps == ["start", "start", "read", "start", "read", "start", "read", "read"]


def test_late_metrics_are_a_mapping_of_floats():
    metrics = late.Late({"loss": jax.numpy.float32(0.5), "finite": jax.numpy.bool_(True)})
    assert not metrics.found
    assert {**metrics} == {"loss": 0.5, "finite": True} and len(metrics) == 2
    assert repr(metrics) == "{'loss': 0.5, 'finite': True}"
    assert dataclasses.is_dataclass(metrics)


def test_batches_are_put_before_they_are_asked_for():
    put = []
    batches = prefetched(iter(range(5)), lambda i: put.append(i) or i * 10, ahead=2)
    assert next(batches) == 0 and put == [0, 1, 2]
    assert list(batches) == [10, 20, 30, 40]


def test_no_batch_beyond_the_phase_is_made():
    made = []

    def feed(live, params, stats):
        whole = toy.feed(live, params, stats)

        def batches(start):
            for number, batch in enumerate(whole.batches(start), start):
                made.append(number)
                yield batch

        return whole._replace(batches=batches)

    list(toy.start([Phase("head", {"head": 0.1}, steps=3)], feed=feed))
    assert made == [0, 1, 2]
