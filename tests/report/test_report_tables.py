import example_run as example
import pytest

from jtl.report import readable, tables


def test_verdict_has_a_row_for_each_way():
    table = tables.verdict(example.result())
    assert table.headers == ("accuracy", "validation", "test", "95 % interval", "time")
    assert [row[0] for row in table.rows] == ["majority class", "linear probe", "fine-tuned"]
    assert table.rows[2][1:] == ("80.0 %", "79.0 %", "77.0 to 81.0 %", "1.5 s")


@pytest.mark.parametrize(
    ("interval", "begins"),
    [
        ([0.01, 0.05], "Better than the linear probe by 3.0 points"),
        ([-0.05, -0.01], "Worse than the linear probe by 3.0 points"),
        ([-0.01, 0.05], "No difference from the linear probe can be told"),
        ([0.0, 0.05], "No difference from the linear probe can be told"),
    ],
)
def test_the_sentence_follows_the_interval(interval, begins):
    gain = {"over": "linear_probe", "value": sum(interval), "interval": interval}
    gain["value"] = 0.03 if interval[1] > 0 else -0.03
    sentence = tables.sentence({"metric": "accuracy", "gain": gain})
    assert sentence.startswith(begins)


def test_without_a_gain_the_sentence_gives_the_figure():
    assert tables.sentence(example.result()) == (
        "79.0 % accuracy on the test split (95 % interval 77.0 to 81.0 %)."
    )


def test_a_skipped_phase_says_so_and_live_labels_stand_in_depth_order():
    rows = tables.phases(example.result()["phases"], "accuracy", order=example.ORDER).rows
    assert rows[1][:3] == ("open_block_1", "block_1, head", "1")
    assert rows[1][-3:] == ("2.0 GFLOP", "3.0 kB", "same bits")
    assert rows[2][:3] == ("open_stem", "stem, block_0, block_1, head", "skipped")


def test_held_bits_that_changed_shout():
    row = example.phase("a", ["head"], 0.5, 0.6, 2) | {"held_bit_equal": False}
    assert tables.phases([row], "accuracy").rows[0][-1] == "CHANGED"


def test_every_table_is_a_full_grid():
    full = example.full_result()
    names = [phase["name"] for phase in full["phases"]]
    for table in (
        tables.verdict(full),
        tables.phases(full["phases"], "accuracy"),
        tables.groups(full["groups"], names),
        tables.openings(full["groups"], names),
        tables.load(full["loaded"], full["load_report"]),
    ):
        assert {len(row) for row in table.rows} == {len(table.headers)}


def test_a_rate_that_is_not_known_is_a_schedule_and_an_absent_phase_is_held():
    row = {"label": "head", "leaves": 2, "parameters": 10, "rates": {"a": None}}
    assert tables.groups([row], ["a", "b"]).rows[0][3:] == ("schedule", "held")
    assert tables.openings([row], ["a", "b"]).rows[0][3:] == ("a", "schedule")
    held = {"label": "stem", "leaves": 2, "parameters": 10, "rates": {}}
    assert tables.openings([held], ["a", "b"]).rows[0][3:] == ("held", "")


def test_a_load_names_what_did_not_come_and_not_too_much_of_it():
    names = [f"leaf_{i}" for i in range(20)]
    counts = {"loaded": 20, "fresh": 20, "unexpected": 0, "wrong_shape": 0}
    table = tables.load(counts, {"loaded": names, "fresh": names}, limit=2)
    assert table.rows[:2] == (("loaded", "20", ""), ("fresh", "20", "leaf_0, leaf_1 and 18 more"))


def test_numbers_read_well_at_their_borders():
    assert [readable.magnitude(v, "B") for v in (999, 999.6, 1e5, 2.5e6)] == [
        *("999 B", "1.0 kB", "100 kB", "2.5 MB"),
    ]
    assert readable.seconds(59.99) == "60.0 s"
    assert readable.seconds(3700) == "1 h 1 min"
    assert readable.figure("accuracy", float("nan")) == "-"
    assert readable.spans(["a_0", "a_2", "b", "a_3", "a_4", "a_5"]) == "a_0, a_2, b, a_3..5"
