"""A sweep on real sentences: what it leaves, that nothing was trained, and what it refuses."""

import functools
import json

import jax
import numpy as np
import optax
import pytest
import tiny

from jtl import data as jdata
from jtl.models.model import attach
from jtl.recipes import tasks, terms
from jtl.recipes.find_rate import find_rate
from jtl.report import rates

TASK = functools.partial(tasks.classification, dropout=0.0)
OPTIONS = {
    "plan": tiny.head_then_last,
    "task": TASK,
    "batch_size": 16,
    "buckets": 1,
    "steps": 40,
    "lowest": 1e-4,
    "columns_disk_mib": 0,
}


@pytest.fixture(scope="module")
def data():
    return tiny.reviews()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, data):
    return tiny.bert(tmp_path_factory.mktemp("tokenizer"), data)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, backbone, data):
    folder = tmp_path_factory.mktemp("runs") / "swept"
    return folder, find_rate(backbone, data, folder=folder, phase="last", **OPTIONS)


def test_a_sweep_leaves_its_readings_and_a_page(swept):
    folder, result = swept
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["phase"] == "last" and "head" in result["live"]
    # tiny.head_then_last: the head at 0.05, the rest at 0.01
    assert result["fastest"] == ["head"] and result["peaks"]["block_1"] == 0.01
    assert set(result["suggestions"]) == {"minimum/10", "slide", "steepest", "valley"}
    for rule, rate in result["suggestions"].items():
        assert result["scales"][rule] == pytest.approx(rate / 0.05)
    got = [row["rate"] for row in result["readings"]]
    assert got[0] == pytest.approx(1e-4)
    np.testing.assert_allclose(np.diff(np.log(got)), np.log(1e5) / 39, rtol=1e-6)
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 1 and "valley" in page and "training loss by learning rate" in page


def test_the_first_loss_is_that_of_the_start_model(swept, backbone, data):
    made = TASK(data["train"])
    model = attach(backbone, {"head": made.head}, key=jax.random.key(0))
    train = jdata.encode(data["train"], backbone.inputs, buckets=1)
    batch = next(jdata.batches(train, 16, seed=0))
    key = jax.random.key(0)
    out, _ = model.apply(model.params, model.stats, batch, key=key, live=frozenset())
    rows = np.asarray(batch["mask"], bool)
    losses = optax.softmax_cross_entropy_with_integer_labels(out["head"], batch["label"])
    loss = float(np.mean(np.asarray(losses)[rows]))
    assert swept[1]["readings"][0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_nothing_was_trained(swept, tmp_path, backbone, data):
    before = jax.tree.map(np.array, backbone.params)
    again = find_rate(backbone, data, folder=tmp_path / "again", phase="last", **OPTIONS)
    jax.tree.map(np.testing.assert_array_equal, before, backbone.params)
    assert again["readings"] == swept[1]["readings"]


def test_a_sweep_that_ended_is_returned_as_it_is(swept, backbone, data, capsys):
    folder, result = swept
    found = find_rate(backbone, data, folder=folder, phase="last", **OPTIONS)
    assert found == result
    said = capsys.readouterr().out
    assert "valley" in said and "report.html" in said
    with pytest.raises(ValueError, match="another config.*steps: 40 there, 41 asked for"):
        find_rate(backbone, data, folder=folder, phase="last", **{**OPTIONS, "steps": 41})


def test_the_first_phase_reads_columns_or_raw_batches_alike(tmp_path, backbone, data):
    # 40 steps of 16 read all 40 examples, so the held prefix is computed once, if it fits
    columns = find_rate(backbone, data, folder=tmp_path / "a", **OPTIONS)
    raw = find_rate(backbone, data, folder=tmp_path / "b", columns_mib=0, **OPTIONS)
    assert columns["phase"] == "head" and columns["live"] == ["head"]
    assert len(columns["readings"]) == len(raw["readings"])
    for one, other in zip(columns["readings"], raw["readings"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_a_penalty_is_part_of_the_swept_loss(swept, tmp_path, backbone, data):
    penalty = functools.partial(terms.l2_sp, weight=1e4)
    options = {**OPTIONS, "phase": "last", "penalties": [penalty]}
    found = find_rate(backbone, data, folder=tmp_path / "l2", **options)
    plain, other = (result["readings"] for result in (swept[1], found))
    # 0 at the start, where nothing has moved, and far above the plain loss later
    assert other[0]["loss"] == pytest.approx(plain[0]["loss"])
    assert other[-1]["loss"] > 2 * plain[len(other) - 1]["loss"]


def test_a_phase_that_the_plan_lacks_and_a_sweep_too_short_are_refused(tmp_path, backbone, data):
    with pytest.raises(ValueError, match=r"no phase 'lsat'; it has \['head', 'last'\].*'last'"):
        find_rate(backbone, data, folder=tmp_path / "a", phase="lsat", **OPTIONS)
    with pytest.raises(ValueError, match="ended after 6 of 6 steps.*take more steps"):
        find_rate(backbone, data, folder=tmp_path / "b", **{**OPTIONS, "steps": 6})


def test_a_loss_that_hardly_falls_is_said(swept):
    flat = {**swept[1], "losses": [0.7] * len(swept[1]["losses"])}
    assert "hardly falls, from 0.700 to 0.700" in rates.sentence(flat)
