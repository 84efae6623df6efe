import math

import pytest

from jtl.train import phases, schedules
from jtl.train.phases import EarlyStop, Phase, Plateau
from jtl.train.plan import check_spans

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


def rates_of(phase, steps):
    """Return {label: rates at these steps} of a phase of 8 steps."""
    made = {name: schedules.resolve(rate, 8) for name, rate in phase.rates.items()}
    return {
        name: [round(float(rate(step)), 6) if callable(rate) else rate for step in steps]
        for name, rate in made.items()
    }


def test_only_what_a_phase_opens_warms_up():
    plan = phases.gradual_unfreeze(
        ("stem", "top"), HEADS, rate=0.8, head_rate=6.0, decay=0.5,
        schedule="warmup_linear", warmup=0.5, opening_warmup="2 steps",
    )  # fmt: skip
    # up by 1/4 of the peak a step and down again; opened: up by 1/2 in 2 steps, down by 1/6
    # in the other 6; live already: down by 1/8 from the start
    assert rates_of(plan[0], (0, 2, 4, 8)) == {"head": [0, 3, 6, 0]}
    steps = (0, 1, 2, 5, 8)
    live = {"head": [6, 5.25, 4.5, 2.25, 0]}
    assert rates_of(plan[1], steps) == {"top": [0, 0.4, 0.8, 0.4, 0], **live}
    assert rates_of(plan[2], steps) == {
        "stem": [0, 0.2, 0.4, 0.2, 0],
        "top": [0.8, 0.7, 0.6, 0.3, 0],
        **live,
    }


def test_the_last_progressive_phase_warms_up_what_a_plateau_may_have_skipped():
    plan = phases.progressive(GROUPS, HEADS, schedule="constant", opening_warmup=0.25)
    warm = [{name for name, rate in p.rates.items() if callable(schedules.resolve(rate, 8))}
            for p in plan]  # fmt: skip
    # only the first opening, that of the top, runs whatever comes
    assert warm == [
        set(), {"top"}, {"block_2"}, {"block_1"}, {"block_0"},
        {"stem", "block_0", "block_1", "block_2"},
    ]  # fmt: skip


def test_without_opening_warmup_all_labels_warm_up_alike():
    plan = phases.gradual_unfreeze(GROUPS[:1], HEADS, warmup=0.25)
    assert {rate.warmup for phase in plan for rate in phase.rates.values()} == {0.25}


def test_spread_rates_by_hand():
    # three equal factors of 10 from 1e-4 to 1e-1
    made = phases.spread_rates(GROUPS[:4], 1e-4, 1e-1)
    assert list(made.values()) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert phases.spread_rates(GROUPS[:3], None, 0.5) == {
        "stem": 0.05, "block_0": 0.05, "block_1": 0.5,
    }  # fmt: skip
    assert phases.spread_rates(["stem"], 0.1, 0.5) == phases.spread_rates(["stem"], None, 0.5)
    for lowest, highest in ((0.5, 0.1), (0.0, 0.1), (None, -1.0), (-0.1, 0.1)):
        with pytest.raises(ValueError, match="give a pair"):
            phases.spread_rates(GROUPS, lowest, highest)


@pytest.mark.parametrize("name", sorted(set(BUILDERS) - {"feature_extraction"}))
def test_a_pair_of_rates_spreads_over_the_groups(name):
    plan = BUILDERS[name](GROUPS, HEADS, rate=(1e-4, 1.0), head_rate=3.0)
    moving = ("block_2", "top") if name == "last_groups" else GROUPS
    spread = phases.spread_rates(moving, 1e-4, 1.0)
    phase = plan[-1]
    if name == "progressive":  # the stem moves in the last phase, whose rates are its own
        phase = plan[-2]
        del spread["stem"]
    rest = 1.0 if name == "linear_probe_then_finetune" else 3.0
    assert table([phase])[phase.name] == pytest.approx({**spread, "head": rest})
    with pytest.raises(ValueError, match=r"rate is \(0.1, 1.0\) and the decay 0.5"):
        BUILDERS[name](GROUPS, HEADS, rate=(0.1, 1.0), decay=0.5)


def test_a_builder_takes_a_schedule_with_its_options():
    shape = {"kind": "flat_cosine", "flat": 0.5}
    (phase,) = phases.full(GROUPS[:1], HEADS, schedule=shape, warmup="3 steps", head_rate=1.0)
    assert phase.rates["head"] == schedules.Curve("flat_cosine", 1.0, warmup="3 steps", flat=0.5)


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


@pytest.mark.parametrize(("examples", "steps"), [(640, 20), (100, 3), (1, 1)])
def test_length_given_in_examples(examples, steps):
    # an epoch is 10 steps and 320 examples, 32 a step
    phase = Phase("a", {"head": 1.0}, examples=examples)
    assert phases.length(phase, 10, 320) == steps
    with pytest.raises(ValueError, match="phase 'a' counts examples.*give steps_per_epoch and"):
        phases.length(phase, 10)


GOOD = Phase("a", {"head": 0.1}, epochs=1)
BAD_PLANS = {
    "the plan has no phases": [],
    "two phases bear one name.*'a', 'a'": [GOOD, GOOD],
    "'a' names .'haed'.*'head', 'stem'.*did you mean 'head'": [Phase("a", {"haed": 0.1}, epochs=1)],
    "would move nothing": [Phase("a", {}, epochs=1)],
    r"lengths \{\}; give one": [Phase("a", {"head": 0.1})],
    "'epochs': 1, 'steps': 2": [Phase("a", {"head": 0.1}, epochs=1, steps=2)],
    "'steps': 2, 'examples': 8": [Phase("a", {"head": 0.1}, steps=2, examples=8)],
    "'constant' has no option 'flat'": [
        Phase("a", {"head": schedules.Curve("constant", 0.1, flat=0.5)}, epochs=1)
    ],
    "warmup is '1 parsec'": [
        Phase("a", {"head": schedules.Curve("constant", 0.1, "1 parsec")}, epochs=1)
    ],
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


def test_a_warmup_longer_than_its_phase_is_found_before_the_run():
    plan = [GOOD, Phase("b", {"head": schedules.Curve("constant", 0.1, "9 steps")}, epochs=2)]
    check_spans(plan, 5)
    with pytest.raises(
        ValueError, match="phase 'b', rate of 'head': .*9 steps, and the phase has 8"
    ):
        check_spans(plan, 4)
    with pytest.raises(ValueError, match="give steps_per_epoch and examples_per_epoch"):
        check_spans([Phase("c", {"head": 0.1}, examples=32)], 4)


@pytest.mark.parametrize("n", [0, 6])
def test_last_groups_beyond_the_backbone_is_refused(n):
    with pytest.raises(ValueError, match=f"n={n} groups; the backbone has 5"):
        phases.last_groups(GROUPS, HEADS, n=n)


BY_HAND = (
    {
        "name": "head",
        "rates": {"head": {"kind": "one_cycle", "peak": 2.0, "start": 0.1}},
        "epochs": 2,
        "until": {"kind": "early_stop", "patience": 3},
    },
    {
        "name": "body",
        "rates": {"block_*": (1.0, 4.0), "block_2": 0.5, "[st]*": {"peak": 8.0, "decay": 0.5}},
        "examples": 640,
        "until": {"kind": "plateau", "min_delta": 0.1},
        "series": "s",
    },
)


def test_phases_by_hand_from_a_config():
    plan = phases.by_hand(GROUPS, HEADS, phases=BY_HAND)
    assert plan == [
        Phase(
            "head",
            {"head": schedules.Curve("one_cycle", 2.0, start=0.1)},
            epochs=2,
            until=EarlyStop(3),
        ),
        Phase(
            "body",
            {"stem": 4.0, "block_0": 1.0, "block_1": 4.0, "block_2": 0.5, "top": 8.0},
            examples=640,
            until=Plateau(1, 0.1),
            series="s",
        ),
    ]
    assert list(plan[1].rates) == list(GROUPS), "in order of depth"
    phases.check_plan(plan, (*GROUPS, *HEADS))


def test_a_phase_stands_among_phases_by_hand_as_it_is():
    own = Phase("own", {"head": 0.1}, steps=3)
    assert phases.by_hand(GROUPS, HEADS, phases=[own]) == [own]


BAD_PHASES = {
    "rate for 'blok_0', which names no label.*did you mean 'block_0'": {"rates": {"blok_0": 1.0}},
    "'block_0' two rates, by .*'b.*', '.*0'": {"rates": {"b*": 1.0, "*0": 2.0}},
    "no field 'epoch'; it has .*did you mean 'epochs'": {"epoch": 3},
    "a phase is a dict with name and rates": {"rates": None},
    "until=.*'plato'": {"until": {"kind": "plato"}},
    "no field 'patient'.*did you mean 'patience'": {"until": {"kind": "plateau", "patient": 2}},
    r"fields \['kind'\] and no peak": {"rates": {"head": {"kind": "constant"}}},
    "schedule 'constant' has no option 'peek'": {"rates": {"head": {"peak": 1.0, "peek": 2.0}}},
    "and the decay 0.5": {"rates": {"b*": {"peak": (0.1, 1.0), "decay": 0.5}}},
}


@pytest.mark.parametrize("message", sorted(BAD_PHASES))
def test_a_phase_by_hand_that_says_something_else_is_refused(message):
    fields = {"name": "a", "rates": {"head": 1.0}, "steps": 2, **BAD_PHASES[message]}
    if fields["rates"] is None:
        del fields["rates"]
    with pytest.raises(ValueError, match=message):
        phases.by_hand(GROUPS, HEADS, phases=[fields])


def test_no_groups_for_each_phase_is_refused():
    with pytest.raises(ValueError, match="per_phase is 0"):
        phases.progressive(GROUPS, HEADS, per_phase=0)
