"""The benchmarks' arithmetic by hand, and what they do where a peer fails."""

import dataclasses
import doctest
import math

import jax
import numpy as np
import pytest

from benchmarks import (
    freezing,
    held_prefix,
    jtl_steps,
    known_answers,
    measure,
    reviews,
    schedule,
    shapes,
    table,
    text_forgetting,
    torch_steps,
    torch_text,
)
from jtl.recipes.optimizers import adamw
from jtl.train import schedules
from jtl.train.optimizer import phase_optimizer
from jtl.train.run import Event

OURS = {"forward": 2.0, "matmul": 1.0, "head": 2.1, "last_block": 3.0, "full": 6.0}
EAGER = {"torch_eager/forward": 4.0, "torch_eager/head": 4.4, "torch_eager/full": 12.0}
SECONDS = {**OURS, **EAGER, "torch_compile/forward": 3.0, "torch_compile/full": 9.0}
FLOPS = {"forward": 100.0, "matmul": 60.0, "head": 100.0, "last_block": 120.0, "full": 300.0}


@pytest.mark.parametrize(
    "module", [known_answers, measure, table, torch_text, reviews], ids=lambda m: m.__name__
)
def test_examples(module):
    assert doctest.testmod(module).failed == 0


@pytest.fixture(scope="module")
def tiny():
    return shapes.make_model(shapes.SHAPES["tiny"], dropout=None, dtype="float32")


def test_least_takes_all_in_turn_and_leaves_out_the_first(monkeypatch):
    order, now = [], [0.0]
    takes = {"a": iter([0.0, 4.0, 1.0]), "b": iter([0.0, 2.0, 6.0])}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def pass_by(name, seconds):
        order.append(name)
        now[0] += seconds

    def timed(name):
        prepare = lambda: pass_by(f"prepare {name}", 100.0)  # noqa: E731
        return measure.Timed(lambda: pass_by(name, next(takes[name])), prepare=prepare)

    assert measure.least({"a": timed("a"), "b": timed("b")}, repeats=2) == {"a": 1.0, "b": 2.0}
    assert order == ["prepare a", "a", "prepare b", "b"] * 3


def test_rows_of_steps_by_hand():
    rows = {row["figure"]: row for row in freezing.step_rows("bert", SECONDS, FLOPS)}
    assert list(rows) == ["forward", "head", "last_block", "full"]
    assert rows["forward"]["matmul_share"] == pytest.approx(50 / 60)
    head, full = rows["head"], rows["full"]
    assert head["value"] == pytest.approx(1.05)
    assert head["aim"] == 1.05
    assert head["peer"] == "torch_eager"
    assert head["peer_value"] == pytest.approx(1.1)
    assert head["ratio"] == pytest.approx(1.1 / 1.05)
    assert head["faster"] == pytest.approx(4.4 / 2.1)
    # The faster peer in seconds, over its own forward pass.
    assert (full["peer"], full["peer_value"]) == ("torch_compile", 3.0)
    assert full["faster"] == pytest.approx(1.5)
    assert full["flops_over_forward"] == 3.0
    assert full["backward_share"] == pytest.approx(200 / 4 / 60)
    assert rows["last_block"]["met"] is False
    assert rows["last_block"]["peer"] is None


def test_a_small_model_is_held_against_its_flops_not_the_aims():
    rows = {row["figure"]: row for row in freezing.step_rows("minilm", SECONDS, FLOPS)}
    assert rows["head"]["aim"] is None
    assert rows["last_block"]["over_floor"] == pytest.approx(1.5 / 1.2)


def test_rows_of_a_run_by_hand():
    times = {
        "head": held_prefix.PhaseTime([0.2, 0.6, 0.4], 0.05, None, None, 1.0),
        "last_block": held_prefix.PhaseTime([2.2, 2.0], 0.5, 3.0, 0.75, 0.0),
    }
    rows = {r["figure"]: r for r in freezing.run_rows(times, 8.0, 12, SECONDS)}
    head, block, stall = rows["epoch_2_head"], rows["epoch_2_last_block"], rows["border_stall"]
    assert head["value"] == pytest.approx(0.05)
    assert head["met"]
    assert head["peer_value"] == pytest.approx(1.1)
    assert (block["value"], block["aim"]) == (0.25, 0.25)
    assert block["peer"] is None
    assert (stall["value"], stall["met"]) == (1.5, False)
    assert stall["stalls"] == {"last_block": 1.5}


def test_times_of_phases_from_events(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(held_prefix.time, "perf_counter", lambda: float(next(clock)))
    row = {"border_seconds": 5.0, "stall_seconds": 2.0, "compile_wait_seconds": 1.0, "steps": 2}
    kinds = ["phase_start", "evaluation", "step", "step", "evaluation", "step", "step"]
    kinds += ["evaluation", "phase_end"]
    events = [Event(k, 0, name, None, row, None) for name in ("a", "b") for k in kinds]
    found = held_prefix._times(iter(events))
    assert found["a"] == held_prefix.PhaseTime([3.0, 3.0], 1.0, None, None, 1.0)
    assert found["b"] == held_prefix.PhaseTime([3.0, 3.0], 1.0, 5.0, 2.0, 1.0)


def test_optimizer_memory_of_what_never_moves_is_counted(tiny):
    live = frozenset({"head"})
    txs = dict.fromkeys((*tiny.groups, "head"), adamw())
    weights = 64 * 2 + 2
    own = phase_optimizer(txs, tiny.labels, live, live).init(tiny.params)
    assert jtl_steps.optimizer_bytes(own, live) == (2 * 4 * weights + 4, 0)  # moments and a count
    everything = phase_optimizer(txs, tiny.labels, live, frozenset(txs)).init(tiny.params)
    total, never = jtl_steps.optimizer_bytes(everything, live)
    assert never == total - (2 * 4 * weights + 4) > 0
    made = jtl_steps.Made(measure.Timed(lambda: None), total, never)
    assert freezing.memory_row(made)["met"] is False


def test_live_labels_of_each_step(tiny):
    live = {name: jtl_steps.live_labels(tiny, case) for name, case in jtl_steps.CASES.items()}
    assert live["head"] == live["head_all_on"] == {"head"}
    assert live["last_block"] == {"block_1", "head"}
    assert live["full"] == {"stem", "block_0", "block_1", "head"}


def test_a_peer_that_fails_leaves_its_reason(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch_steps, "_build", broken)
    options = dict(cases=jtl_steps.CASES, dropout=None, dtype="float32", compiled=True)
    peers = torch_steps.make_peers(shapes.SHAPES["tiny"], {}, **options)
    assert peers["torch_compile"] == torch_steps.Peer({}, {"forward": "RuntimeError: no compiler"})


def test_a_process_that_dies_with_the_peers_is_run_without_them(monkeypatch):
    def spawn(module, cell, **_):
        if cell["peers"] or cell["name"] == "vit":
            raise RuntimeError("killed")
        yield {"figure": "head", "peers": {}}

    monkeypatch.setattr(measure, "spawn", spawn)
    (row,) = freezing._of_model({"name": "bert", "peers": ["eager"]}, apart=True)
    assert row["figure"] == "head"
    assert row["peers_failed"]
    with pytest.raises(RuntimeError, match="killed"):
        list(freezing._of_model({"name": "vit", "peers": ["eager"]}, apart=True))


SIDES = {
    "jtl": {"seconds": 10.0, "compile_seconds": 3.0, "accuracy": 0.80, "phases": {"head": 2.0}},
    "jtl_warm": {"seconds": 8.0, "accuracy": 0.80},
    "jtl_plain": {"seconds": 30.0, "accuracy": 0.80},
    "torch": {"seconds": 60.0, "accuracy": 0.82},
    "torch_cached": {"seconds": 12.0, "accuracy": 0.82},
}


def test_row_of_a_training_by_hand():
    row = schedule.feature_row(SIDES)
    assert (row["value"], row["aim"], row["met"]) == (6.0, 5.0, True)
    assert (row["warm"], row["kernels"], row["columns"]) == (7.5, 2.0, 3.0)
    assert row["kernels"] * row["columns"] == row["value"]
    assert row["cached"] == pytest.approx(1.2)
    assert row["accuracy_over_peer"] == pytest.approx(-0.02)


def test_the_aim_is_missed_where_accuracy_is():
    fast = {"seed": 0} | schedule.feature_row(SIDES)
    (summary,) = schedule.summaries([fast])
    assert (summary["value"], summary["met"]) == (6.0, False)
    level = {**SIDES, "torch": {"seconds": 60.0, "accuracy": 0.809}}
    (summary,) = schedule.summaries([schedule.feature_row(level)])
    assert summary["met"] is True


def test_a_failed_peer_leaves_our_row():
    sides = {**SIDES, "torch": {"failed": "MemoryError: "}}
    rows = schedule.progressive_rows(sides, "progressive", 2000)
    assert rows[0]["bound"] == pytest.approx(3.5 / 1.5)  # two epochs of the head alone
    assert [row["value"] for row in rows] == [None, None]
    assert rows[0]["accuracy"] == 0.80
    assert schedule.summaries(rows) == []


def test_the_peer_runs_the_same_phases():
    groups = ("stem", *(f"block_{i}" for i in range(6)))
    plan = reviews.plan_of("progressive", groups, 3)
    same = reviews.peer_phases(plan, None)
    assert [phase.rates for phase in same] == [
        {label: schedules.peak(rate) for label, rate in phase.rates.items()} for phase in plan
    ]
    assert [phase.epochs for phase in same] == [3, 1, 1, 1, 2]
    replayed = reviews.peer_phases(plan, {"head": 2.0, "open_block_4": 1.0, "all": 1.0})
    assert [(phase.epochs, phase.span) for phase in replayed] == [(2, 3), (1, 1), (1, 2)]
    assert all(phase.watch for phase in replayed)
    assert not reviews.peer_phases(reviews.plan_of("full", groups, 3), None)[0].watch


def test_the_peer_has_our_rates_at_every_step():
    ours = schedules.resolve(schedules.curve("warmup_linear", 1.0), 40)
    theirs = [torch_text.curve(step, 40) for step in range(40)]
    np.testing.assert_allclose([float(ours(step)) for step in range(40)], theirs, rtol=1e-6)


def test_the_plain_path_is_asked_for():
    cells = []

    def train(cell, *, warm=False):
        cells.append((cell, warm))
        return SIDES["jtl"]

    base = reviews.Cell("jtl", "opening", 32, 0, 3)
    schedule._progressive_sides(base, train, quick=False)
    ours = [(c.strategy, c.columns, warm) for c, warm in cells if c.side == "jtl"]
    assert ours == [
        *(("opening", True, False), ("opening", True, True)),
        *(("opening", False, False), ("full", True, False)),
    ]
    theirs = [(c.strategy, c.replay) for c, _ in cells if c.side == "torch"]
    assert theirs in ([], [("opening", {"head": 2.0}), ("full", None)])


def test_plain_data_has_no_nan():
    row = measure.clean({"flops": math.nan, "rows": (np.float32(0.5), np.int64(3), 123456.0)})
    assert row == {"flops": None, "rows": [0.5, 3, 123500.0]}


@pytest.mark.parity
@pytest.mark.parametrize("name", jtl_steps.CASES)
def test_both_sides_open_as_much(name, tiny):
    shape, case = shapes.SHAPES["tiny"], jtl_steps.CASES[name]
    live = jtl_steps.live_labels(tiny, case)
    made = torch_steps._build(shape, shapes.make_batch(shape, 4), None, "float32")
    torch_steps._open(made, case)
    theirs = sum(
        p.numel() for part in (made.body, made.head) for p in part.parameters() if p.requires_grad
    )
    sizes = jax.tree.map(lambda p, label: p.size if label in live else 0, tiny.params, tiny.labels)
    assert theirs == sum(jax.tree.leaves(sizes))


def test_cells_are_plain_data():
    cell = reviews.Cell("torch", "opening", 32, 0, 3, replay={"head": 2.0})
    assert reviews.Cell(**dataclasses.asdict(cell)) == cell


def test_what_a_way_keeps_is_a_share_of_what_plain_tuning_loses():
    plain = {"target": 0.97, "source": 0.66, "before": 0.86}
    seed = {
        "plain": plain,
        "held": {"target": 0.965, "source": 0.83, "before": 0.86},
        "slow": {"target": 0.90, "source": 0.85, "before": 0.86},
    }
    held, slow = (text_forgetting._row(way, [seed]) for way in ("held", "slow"))
    assert held["kept"] == pytest.approx(0.85) and held["equal_target"] and held["met"]
    assert not slow["equal_target"] and slow["met"] is None  # no aim where the target fell behind


def test_nothing_is_kept_where_plain_tuning_loses_nothing():
    same = {"target": 0.97, "source": 0.86, "before": 0.86}
    assert text_forgetting._row("held", [{"plain": same, "held": same}])["kept"] is None
