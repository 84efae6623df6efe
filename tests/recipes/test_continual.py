"""Two tasks on one backbone: the tables, what a penalty changes, and the run folder."""

import functools
import json

import numpy as np
import pytest
import tiny

import jtl
from jtl.recipes import sources, tasks, terms
from jtl.recipes.continual import continual
from jtl.train import phases

SIZES = {"train": 40, "validation": 16, "test": 40}
OPTIONS = {
    "plan": functools.partial(phases.full, rate=5e-3, head_rate=2e-2, epochs=4),
    "task": functools.partial(tasks.classification, dropout=0.0),
    "batch_size": 8,
}


def _tasks():
    return [
        {"name": "low", "data": sources.digits(classes=(0, 1, 2), **SIZES)},
        {"name": "high", "data": sources.digits(classes=(3, 4, 5), **SIZES)},
    ]


@pytest.mark.slow
def test_two_tasks_plainly_and_with_ewc(tmp_path):
    penalty = functools.partial(terms.ewc, weight=1e7, examples=16)
    given = (tiny.resnet(), _tasks())
    result = continual(*given, folder=tmp_path / "run", penalties=(penalty,), **OPTIONS)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    tables = {way: np.asarray(run["matrix"]) for way, run in result["runs"].items()}
    assert {way: table.shape for way, table in tables.items()} == {
        "plain": (2, 2),
        "penalised": (2, 2),
    }
    # Nothing comes before the first task, so its row is the same; then the penalty holds.
    np.testing.assert_array_equal(tables["plain"][0], tables["penalised"][0])
    assert not np.array_equal(tables["plain"][1], tables["penalised"][1])
    for way, table in tables.items():
        figures = result["runs"][way]
        assert figures["average"] == pytest.approx(table[1].mean())
        assert figures["backward_transfer"] == pytest.approx(table[1, 0] - table[0, 0])
    predictor = jtl.load(tmp_path / "run")
    assert predictor.classes == {"low": ("0", "1", "2"), "high": ("3", "4", "5")}
    image = given[1][1]["data"]["test"].columns["image"][0]
    (answer,) = predictor.predict([image], head="high")
    assert answer.label in ("3", "4", "5")
    again = continual(*given, folder=tmp_path / "run", penalties=(penalty,), **OPTIONS)
    assert again == result
    with pytest.raises(ValueError, match="another config; seed: 0 there, 1 asked for"):
        options = {**OPTIONS, "seed": 1, "penalties": (penalty,)}
        continual(*given, folder=tmp_path / "run", **options)


def test_tasks_need_names_of_their_own(tmp_path):
    twice = [{**entry, "name": "same"} for entry in _tasks()]
    with pytest.raises(ValueError, match=r"named \['same', 'same'\]; give at least two"):
        continual(tiny.resnet(), twice, folder=tmp_path / "run")
