import json
import math

import example_run as example
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.report import record


def row(step, **more):
    return {"kind": "step", "step": step, "phase": "head", **more}


def test_a_new_folder_gets_its_config(tmp_path):
    run = record.open_run(tmp_path / "a" / "b", config={"seed": 3, "sizes": (1, 2)})
    assert run.result is None
    assert json.loads((run.folder / "config.json").read_text()) == {"seed": 3, "sizes": [1, 2]}


def test_the_same_config_opens_the_run_with_its_result(tmp_path):
    run = record.open_run(tmp_path / "run", config={"seed": 3, "plan": {"epochs": (1,)}})
    record.write_result(run, example.result())
    asked = {"plan": {"epochs": [1]}, "seed": 3, "folder": "elsewhere", "overwrite": False}
    again = record.open_run(tmp_path / "run", config=asked)
    assert again.result == example.result()


def test_another_config_is_refused_and_told_apart(tmp_path):
    run = record.open_run(tmp_path / "run", config={"plan": {"rate": 0.1, "kind": "full"}})
    record.append(run, row(1))
    with pytest.raises(ValueError, match=r"plan\.rate: 0\.1 there, 0\.2 asked for"):
        record.open_run(tmp_path / "run", config={"plan": {"rate": 0.2, "kind": "full"}})
    with pytest.raises(ValueError, match=r"seed: 'absent' there, 1 asked for"):
        record.open_run(tmp_path / "run", config={"plan": {"rate": 0.1, "kind": "full"}, "seed": 1})


def test_a_run_that_never_began_may_change_its_config(tmp_path):
    record.open_run(tmp_path / "run", config={"seed": 1})
    record.open_run(tmp_path / "run", config={"seed": 2})
    assert json.loads((tmp_path / "run" / record.CONFIG).read_text()) == {"seed": 2}


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    run = record.open_run(tmp_path / "run", config={"seed": 1})
    record.append(run, row(1))
    record.write_result(run, example.result())
    (run.folder / "checkpoints").mkdir()
    (run.folder / "notes.txt").write_text("mine")
    run = record.open_run(run.folder, config={"seed": 2}, overwrite=True)
    assert run.result is None
    assert sorted(path.name for path in run.folder.iterdir()) == ["config.json", "notes.txt"]


def test_a_folder_of_something_else_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"no run folder: it has thesis\.tex"):
        record.open_run(tmp_path, config={}, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        record.open_run(tmp_path / "thesis.tex", config={})
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_rows_come_back_with_arrays_as_numbers(tmp_path):
    run = record.open_run(tmp_path / "run", config={})
    values = {"loss": jnp.float32(0.5), "finite": np.bool_(True), "grad_norm": math.inf}
    record.append(run, row(1, **values, live=frozenset({"b", "a"})))
    expected = {"loss": 0.5, "finite": True, "grad_norm": None, "live": ["a", "b"]}
    assert record.read_rows(run.folder) == [row(1, **expected)]


def test_a_row_without_a_kind_is_refused(tmp_path):
    run = record.open_run(tmp_path / "run", config={})
    with pytest.raises(ValueError, match="needs kind, step and phase"):
        record.append(run, {"step": 1, "phase": "head"})
    with pytest.raises(ValueError, match="one of"):
        record.append(run, {"kind": "stepp", "step": 1, "phase": "head"})


def test_what_is_no_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a function"):
        record.open_run(tmp_path / "run", config={"plan": row})


def test_a_resumed_run_cuts_the_rows_after_its_save(tmp_path):
    run = record.open_run(tmp_path / "run", config={})
    for step in range(1, 6):
        record.append(run, row(step, loss=1.0))
    record.cut(run, 3)
    for step in range(4, 7):
        record.append(run, row(step, loss=2.0))
    assert [r["loss"] for r in record.read_rows(run.folder)] == [1.0] * 3 + [2.0] * 3


def test_an_event_that_came_twice_counts_once(tmp_path):
    run = record.open_run(tmp_path / "run", config={})
    end = {"kind": "phase_end", "step": 1, "phase": "head"}
    for entry in (row(1), {**end, "seconds": 1.0}, {**end, "seconds": 2.0}, row(2)):
        record.append(run, entry)
    assert record.read_rows(run.folder) == [row(1), {**end, "seconds": 2.0}, row(2)]


def test_a_line_cut_short_is_left_out_and_mended(tmp_path):
    run = record.open_run(tmp_path / "run", config={})
    record.append(run, row(1))
    path = run.folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "st')
    assert record.read_rows(run.folder) == [row(1)]
    run = record.open_run(run.folder, config={})
    record.append(run, row(2))
    assert record.read_rows(run.folder) == [row(1), row(2)]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    run = record.open_run(tmp_path / "run", config={})
    (run.folder / "metrics.jsonl").write_text('nonsense\n{"kind": "step"}\n')
    with pytest.raises(ValueError, match="line 1 of .* is no JSON: 'nonsense'"):
        record.read_rows(run.folder)


@pytest.mark.parametrize("key", ["metric", "held_bit_equal", "versions"])
def test_a_result_without_a_key_is_refused(key):
    with pytest.raises(ValueError, match=f"the result lacks .'{key}'."):
        record.check_result({name: v for name, v in example.result().items() if name != key})


def test_a_part_of_a_result_without_a_key_is_refused(tmp_path):
    result = example.result()
    del result["phases"][1]["flops_per_step"]
    with pytest.raises(ValueError, match="phase 1 lacks .'flops_per_step'."):
        record.check_result(result)
    result = example.result()
    del result["baselines"]["majority"]["test"]
    run = record.open_run(tmp_path / "run", config={})
    with pytest.raises(ValueError, match="baseline 'majority' lacks .'test'."):
        record.write_result(run, result)
    assert not (run.folder / "result.json").exists()


def test_versions_name_what_a_run_rests_on():
    found = record.versions()
    assert found["jax"].count(".") >= 1
    assert found["python"].startswith("3.")
