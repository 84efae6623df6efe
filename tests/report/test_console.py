import io

import example_run as example
import numpy as np
import pytest
from rich.console import Console

from jtl.report import console, progress


def plain(width=100):
    return Console(file=io.StringIO(), width=width, force_terminal=False)


def text(out):
    return out.file.getvalue()


def ticking(seconds):
    now = iter(np.arange(0.0, 1e5, seconds).tolist())
    return lambda: next(now)


def test_loaded_says_what_came_and_names_the_rest():
    out = plain()
    report = {"loaded": ["a"] * 101, "fresh": ["h/[kernel]"], "unexpected": [], "wrong_shape": []}
    console.loaded("MiniLM", report, out=out)
    assert text(out) == (
        "MiniLM: weights 101 loaded, 1 fresh, 0 unexpected, 0 of wrong shape\n  fresh: h/[kernel]\n"
    )


def test_random_weights_are_called_so():
    out = plain()
    console.loaded("scratch", None, out=out)
    assert text(out) == "scratch: random weights, no checkpoint\n"


@pytest.mark.parametrize(
    ("width", "phases", "found"),
    [(100, 3, "open_block_1"), (55, 3, "phases: 1 head, 2 open_block_1"), (60, 9, "moves from")],
)
def test_groups_fit_the_console_whatever_its_width(width, phases, found):
    names = [phase["name"] for phase in example.PLAN] + [f"later_{i}" for i in range(phases - 3)]
    out = plain(width)
    console.groups(example.full_result()["groups"], names, out=out)
    assert found in text(out)
    assert "…" not in text(out)
    assert "1,200" in text(out)


def test_verdict_and_its_sentence():
    out = plain()
    console.finished("runs/a", example.full_result(), out=out)
    shown = text(out)
    assert "fine-tuned          80.0 %  79.0 %  77.0 to 81.0 %  1.5 s" in shown
    assert "Better than the linear probe by 5.0 points" in shown
    assert "run ended after 1 min 1 s; all of it: runs/a/report.html" in shown


def run_lines(every, out):
    with progress.progress(
        example.PLAN, metric="accuracy", order=example.ORDER, every=every, out=out, now=ticking(0.5)
    ) as show:
        for row in example.rows():
            show(row)


def test_away_from_a_terminal_each_event_is_a_line():
    out = plain()
    run_lines(1e9, out)
    assert text(out).splitlines() == [
        "phase 1/3 head: head live, at most 4 steps",
        "  step 4: validation accuracy 70.0 %",
        "phase 1/3 head: done, accuracy 50.0 to 70.0 %, 4 steps, 2.0 s (compiling 1.0 s), "
        "held bits equal",
        "phase 2/3 open_block_1: block_1, head live, at most 2 steps",
        "  step 6: validation accuracy 90.0 %",
        "phase 2/3 open_block_1: done, accuracy 70.0 to 90.0 %, 2 steps, 2.0 s (compiling 1.0 s), "
        "held bits equal",
        "phase 3/3 open_stem: skipped, the metric no longer rises",
    ]


def test_plain_lines_between_come_no_more_often_than_asked():
    often, seldom = plain(), plain()
    run_lines(0.0, often)
    run_lines(2.5, seldom)
    counts = [text(out).count("whole plan at most") for out in (often, seldom)]
    assert counts[0] == 6
    assert 1 <= counts[1] <= 2


def test_a_loss_that_is_not_finite_is_shown():
    out = plain()
    with progress.progress(example.PLAN, metric="accuracy", every=0.0, out=out) as show:
        show({"kind": "step", "step": 1, "phase": "head", "loss": np.float32("nan")})
    assert "loss not finite" in text(out)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_has_a_bar_and_keeps_the_event_lines(width):
    out = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    run_lines(1.0, out)
    assert "4/4" in text(out)
    assert "held bits equal" in text(out).replace("\n", " ")
    assert "whole plan" not in text(out)


def test_a_phase_outside_the_plan_is_shown_too():
    row = {"kind": "phase_start", "step": 0, "phase": "x", "live": ["head"], "steps": 3}
    assert progress.event_line(row, "accuracy", []) == "phase x: head live, at most 3 steps"
