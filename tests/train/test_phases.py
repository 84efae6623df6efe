import math

import pytest

from jtl.train import phases, schedules
from jtl.train.phases import EarlyStop, Phase, Plateau

GROUPS = ("stem", "block_0", "block_1", "block_2", "top")
HEADS = ("head",)
BUILDERS = {
    name: getattr(phases, name)
    for name in (
        "feature_extraction",
        "last_groups",
        "full",
        "gradual_unfreeze",
        "linear_probe_then_finetune",
        "progressive",
    )
}


def table(plan):
    """Return {phase: {label: peak rate}}, rounded, for comparison with a table by hand."""
    return {
        phase.name: {label: round(schedules.peak(r), 10) for label, r in phase.rates.items()}
        for phase in plan
    }


def test_discriminative_by_hand():
    assert phases.discriminative(GROUPS, 16.0, 0.5) == {
        "stem": 1.0,
        "block_0": 2.0,
        "block_1": 4.0,
        "block_2": 8.0,
        "top": 16.0,
    }


def test_feature_extraction_table():
    plan = phases.feature_extraction(GROUPS, ("a", "b"), head_rate=0.1, epochs=4)
    assert table(plan) == {"head": {"a": 0.1, "b": 0.1}}
    assert (plan[0].epochs, plan[0].steps, plan[0].until) == (4, None, None)


def test_last_groups_table():
    plan = phases.last_groups(GROUPS, HEADS, n=2, rate=0.4, head_rate=1.0, decay=0.5)
    assert table(plan) == {"last_2": {"block_2": 0.2, "top": 0.4, "head": 1.0}}


def test_full_table():
    plan = phases.full(GROUPS, HEADS, rate=0.8, head_rate=1.0, decay=0.5, patience=2)
    assert table(plan) == {
        "all": {
            "stem": 0.05,
            "block_0": 0.1,
            "block_1": 0.2,
            "block_2": 0.4,
            "top": 0.8,
            "head": 1.0,
        }
    }
    assert plan[0].until == EarlyStop(2)


def test_linear_probe_then_finetune_table():
    plan = phases.linear_probe_then_finetune(
        GROUPS[:2], HEADS, rate=0.2, head_rate=1.0, decay=0.5, head_epochs=7, epochs=2
    )
    assert table(plan) == {
        "head": {"head": 1.0},
        "all": {"stem": 0.1, "block_0": 0.2, "head": 0.2},
    }
    assert [phase.epochs for phase in plan] == [7, 2]


def test_gradual_unfreeze_table():
    plan = phases.gradual_unfreeze(
        GROUPS, HEADS, rate=0.8, head_rate=1.0, decay=0.5, per_phase=2, head_epochs=3
    )
    assert table(plan) == {
        "head": {"head": 1.0},
        "open_block_2": {"block_2": 0.4, "top": 0.8, "head": 1.0},
        "open_block_0": {"block_0": 0.1, "block_1": 0.2, "block_2": 0.4, "top": 0.8, "head": 1.0},
        "open_stem": {
            "stem": 0.05,
            "block_0": 0.1,
            "block_1": 0.2,
            "block_2": 0.4,
            "top": 0.8,
            "head": 1.0,
        },
    }
    assert [phase.epochs for phase in plan] == [3, 1, 1, 1]
    assert all(phase.until is None and not phase.series for phase in plan)


def test_progressive_table():
    plan = phases.progressive(
        GROUPS,
        HEADS,
        rate=0.8,
        head_rate=1.0,
        final_rate=0.08,
        decay=0.5,
        per_phase=2,
        min_delta=0.01,
    )
    assert table(plan) == {
        "head": {"head": 1.0},
        "open_block_2": {"block_2": 0.4, "top": 0.8, "head": 1.0},
        "open_block_0": {"block_0": 0.1, "block_1": 0.2, "block_2": 0.4, "top": 0.8, "head": 1.0},
        "all": {
            "stem": 0.005,
            "block_0": 0.01,
            "block_1": 0.02,
            "block_2": 0.04,
            "top": 0.08,
            "head": 0.08,
        },
    }
    early, plateau = EarlyStop(1, 0.01), Plateau(1, 0.01)
    assert [phase.until for phase in plan] == [early, plateau, plateau, early]
    assert [phase.series for phase in plan] == ["", "opening", "opening", ""]


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("heads", [("head",), ("a", "b")])
def test_every_builder_makes_a_plan_that_can_run(name, heads):
    plan = BUILDERS[name](GROUPS, heads)
    phases.check_plan(plan, {*GROUPS, *heads, "unused"})
    assert all(set(heads) <= phase.live for phase in plan)
    assert phases.ever_live(plan) <= {*GROUPS, *heads}
    opened = [phase.live for phase in plan]
    assert all(a <= b for a, b in zip(opened, opened[1:], strict=False)), "groups only open"


@pytest.mark.parametrize("name", sorted(set(BUILDERS) - {"feature_extraction", "last_groups"}))
def test_builders_end_with_everything_open(name):
    assert BUILDERS[name](GROUPS, HEADS)[-1].live == {*GROUPS, *HEADS}


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "steps"), [(1, 7, 7), (0.5, 7, 4), (2.5, 10, 25), (0.01, 7, 1)]
)
def test_length_in_steps(epochs, per_epoch, steps):
    assert phases.length(Phase("a", {"head": 1.0}, epochs=epochs), per_epoch) == steps


def test_length_given_in_steps_knows_no_epochs():
    assert phases.length(Phase("a", {"head": 1.0}, steps=13), 7) == 13


GOOD = Phase("a", {"head": 0.1}, epochs=1)
BAD_PLANS = {
    "the plan has no phases": [],
    "two phases bear one name.*'a', 'a'": [GOOD, GOOD],
    "'a' names .'haed'.*'head', 'stem'.*nearest to 'haed'.*head": [
        Phase("a", {"haed": 0.1}, epochs=1)
    ],
    "would move nothing": [Phase("a", {}, epochs=1)],
    "epochs=None and steps=None": [Phase("a", {"head": 0.1})],
    "epochs=1 and steps=2": [Phase("a", {"head": 0.1}, epochs=1, steps=2)],
    "a length is above 0": [Phase("a", {"head": 0.1}, epochs=0)],
    "rate 0.0; a rate is above 0": [Phase("a", {"head": 0.0}, epochs=1)],
    "rate nan; a rate is above 0": [Phase("a", {"head": math.nan}, epochs=1)],
    "a series ends by Plateau": [Phase("a", {"head": 0.1}, epochs=1, series="s")],
    "patience 0": [Phase("a", {"head": 0.1}, epochs=1, until=Plateau(patience=0))],
}


@pytest.mark.parametrize("message", sorted(BAD_PLANS))
def test_a_plan_that_cannot_run_is_refused(message):
    with pytest.raises(ValueError, match=message):
        phases.check_plan(BAD_PLANS[message], ["head", "stem"])


@pytest.mark.parametrize("n", [0, 6])
def test_last_groups_beyond_the_backbone_is_refused(n):
    with pytest.raises(ValueError, match=f"n={n} groups; the backbone has 5"):
        phases.last_groups(GROUPS, HEADS, n=n)


def test_no_groups_for_each_phase_is_refused():
    with pytest.raises(ValueError, match="per_phase is 0"):
        phases.progressive(GROUPS, HEADS, per_phase=0)
