"""How `until` counts, by hand: patience, min_delta, the best, and what a series skips."""

import dataclasses

import pytest
import run_toy as toy

from jtl.train import progress as rules
from jtl.train.plan import EarlyStop, Phase, Plateau
from jtl.train.progress import Progress

LENGTH = 100


def watched(phase, start, *figures):
    """Return the progress after a figure every 10 steps, up to where the phase is over."""
    progress = rules.judge(Progress(("a",)), start, phase)
    progress = rules.enter(progress, {})
    for figure in figures:
        if rules.over(progress, phase, LENGTH):
            break
        progress = dataclasses.replace(progress, step=progress.step + 10)
        progress = rules.judge(progress, figure, phase)
    return progress


def phase(until, **fields):
    return Phase("a", {"head": 1.0}, steps=LENGTH, until=until, **fields)


@pytest.mark.parametrize("kind", [Plateau, EarlyStop])
@pytest.mark.parametrize(
    ("patience", "delta", "figures", "stopped", "best"),
    [
        # one evaluation without a new best ends it
        (1, 0.0, (0.6, 0.6, 0.9), 20, (0.6, 10)),
        # two in a row; a new best in between starts the count anew
        (2, 0.0, (0.6, 0.5, 0.7, 0.6, 0.6, 0.9), 50, (0.7, 30)),
        # equal to the best is no rise
        (2, 0.0, (0.5, 0.5, 0.9), 20, (0.5, 0)),
        # 0.55 and 0.6 rise by no more than 0.1 over the best, 0.5; 0.62 does
        (3, 0.1, (0.55, 0.6, 0.62, 0.6, 0.6, 0.6), 60, (0.62, 30)),
        # small rises add up: 0.5 is the best until 0.61 beats it by more than 0.1
        (9, 0.1, (0.54, 0.58, 0.61), 30, (0.61, 30)),
        # never above its start: the best is the start
        (3, 0.0, (0.4, 0.3, 0.2, 0.9), 30, (0.5, 0)),
        # patience longer than the phase: it runs its length
        (20, 0.0, (0.4,) * 12, 100, (0.5, 0)),
    ],
)
def test_patience_and_min_delta(kind, patience, delta, figures, stopped, best):
    ended = watched(phase(kind(patience, delta)), 0.5, *figures)
    assert (ended.step, (ended.best_metric, ended.best_step)) == (stopped, best)


def test_without_until_a_phase_runs_its_length():
    assert watched(phase(None), 0.5, *(0.1,) * 12).step == LENGTH


def left(until, figures, **fields):
    one = phase(until, **fields)
    return rules.leave(watched(one, 0.5, *figures), one, LENGTH, {})


def test_a_plateau_without_a_rise_ends_its_series_and_no_other_phase_does():
    assert left(Plateau(1), (0.4,), series="s").ended == ("s",)
    assert left(Plateau(1), (0.6, 0.6), series="s").ended == ()
    assert left(Plateau(1), (0.4,)).ended == ()
    assert left(EarlyStop(1), (0.4,)).ended == ()


def test_the_metric_after_a_phase_is_that_of_the_weights_that_stay():
    # 0.6 at step 10 is restored after two evaluations below it; without `until` the last stays
    assert left(EarlyStop(2), (0.6, 0.3, 0.4)).metric == 0.6
    assert left(None, (0.6,) + (0.4,) * 9).metric == 0.4
    assert left(EarlyStop(2), (0.6, 0.3, 0.4)).history[-1]["stopped"] == "no rise"
    assert left(EarlyStop(20), (0.6,) * 10).history[-1]["stopped"] == "length"


def test_a_run_goes_on_after_a_plateau_and_skips_the_rest_of_its_series():
    # start 0.5; "one" rises to 0.7, then 0.6; "two" 0.6 is no rise; "three" is skipped; "last" runs
    plan = [
        Phase("one", {"head": 0.1}, epochs=5, until=Plateau(1), series="s"),
        Phase("two", {"head": 0.1}, epochs=5, until=Plateau(1), series="s"),
        Phase("three", {"head": 0.1}, epochs=5, until=Plateau(1), series="s"),
        Phase("last", {"head": 0.1}, epochs=1),
    ]
    events = list(toy.start(plan, evaluate=toy.script(0.5, 0.7, 0.6, 0.6, 0.9)))
    history = events[-1].progress.history
    per_epoch = toy.PER_EPOCH
    assert [(row["name"], row["steps"]) for row in history] == [
        ("one", 2 * per_epoch), ("two", per_epoch), ("three", 0), ("last", per_epoch),
    ]  # fmt: skip
    assert [row["metric_after"] for row in history] == [0.7, 0.7, 0.7, 0.9]
