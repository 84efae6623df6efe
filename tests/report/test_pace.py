import pytest

from jtl.report import pace as paces

PLAN = (paces.Planned("head", 10, 0.1), paces.Planned("open", 10, 1.1), paces.Planned("all", 5, 3))


def follow(rows, pace=None):
    pace = paces.Pace(PLAN) if pace is None else pace
    for now, row in rows:
        pace = paces.observe(pace, row, now)
    return pace


def step(number, phase="head"):
    return {"kind": "step", "step": number, "phase": phase, "examples": 32}


def start(number, phase):
    return {"kind": "phase_start", "step": number, "phase": phase}


def test_compilation_before_the_first_step_is_not_taken_for_a_slow_step():
    pace = follow([(0.0, start(0, "head")), (8.0, step(1)), (8.5, step(2)), (9.0, step(3))])
    assert (pace.done, pace.step_seconds, pace.start_seconds) == (3, 0.5, 8.0)
    assert paces.examples_per_second(pace) == 64.0
    assert paces.phase_seconds_left(pace) == 7 * 0.5


def test_the_plan_is_bounded_by_cost_and_start_of_the_later_phases():
    pace = follow([(0.0, start(0, "head")), (2.0, step(1)), (3.0, step(2))])
    # a unit of cost takes 1 s / 0.1; 8 steps are left, then 10 steps of 1.1 and 5 of 3 units
    later = (10 * 1.1 + 5 * 3) * 10.0 + 2 * 2.0
    assert paces.plan_seconds_left(pace) == pytest.approx(8 * 1.0 + later)


def test_nothing_is_promised_before_the_second_step():
    pace = follow([(0.0, start(0, "head")), (2.0, step(1))])
    assert paces.phase_seconds_left(pace) is None
    assert paces.plan_seconds_left(pace) is None
    assert paces.examples_per_second(pace) is None


def test_a_new_phase_counts_from_its_start_and_keeps_what_a_step_costs():
    rows = [(0.0, start(0, "head")), (2.0, step(1)), (3.0, step(2)), (4.0, start(2, "open"))]
    pace = follow([*rows, (9.0, step(3, "open"))])
    assert (pace.index, pace.done, pace.start_seconds) == (1, 1, 5.0)
    assert pace.unit_seconds == pytest.approx(10.0)


def test_a_run_that_goes_on_inside_a_phase_knows_how_far_it_is():
    pace = follow([(0.0, start(10, "open")), (1.0, step(17, "open")), (2.0, step(18, "open"))])
    assert pace.done == 8
    assert paces.phase_seconds_left(pace) == 2.0


def test_an_evaluation_between_steps_counts_for_the_time_left_but_not_for_the_speed():
    evaluation = {"kind": "evaluation", "step": 2, "phase": "head"}
    rows = [(0.0, start(0, "head")), (1.0, step(1)), (2.0, step(2)), (8.0, evaluation)]
    pace = follow([*rows, (9.0, step(3)), (10.0, step(4))])
    assert pace.step_seconds == 1.0
    assert paces.phase_seconds_left(pace) == pytest.approx(6 * 9.0 / 3)
