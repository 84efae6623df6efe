"""The line from start to tuned weights: figures, statistics, choice, heads, resuming."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jtl
from jtl import config, masks, trees
from jtl.models.export import export
from jtl.models.heads import Linear
from jtl.models.model import add_head, attach
from jtl.recipes import between, retain, sources
from jtl.recipes.datasets import make_datasets, once
from jtl.recipes.interpolate import choose, interpolate
from jtl.recipes.predict import Predictor
from jtl.train.evaluate import make_predict

OLD = ("5", "6", "7")
NEW = ("0", "1", "2")


@pytest.fixture(scope="module")
def data():
    return tiny.digits()


@pytest.fixture(scope="module")
def start():
    """A model with a head of its own, as a run before this one would leave it."""
    model = attach(tiny.resnet(), {"old": Linear(3)}, key=jax.random.key(1))
    return Predictor(model, {"old": OLD})


@pytest.fixture(scope="module")
def tuned(start, data):
    """The same, moved in everything but the stem, with one head more."""
    model = add_head(start.model, "head", Linear(3), key=jax.random.key(2))
    leaves, structure = jax.tree.flatten(model.params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    moved = jax.tree.unflatten(structure, moved)
    kept = masks.mask(model.labels, "stem")
    params = jax.tree.map(lambda keep, x, y: x if keep else y, kept, model.params, moved)
    stats = jax.tree.map(lambda x: x + 0.1, model.stats)
    model = fitted(dataclasses.replace(model, params=params, stats=stats), data)
    return Predictor(model, {"old": OLD, "head": NEW})


def fitted(model, data):
    """Return the model with the head that least squares give on its features."""
    train = make_datasets(model, data)["train"]
    pooled = make_predict(model.apply, heads=("pooled",))
    features = pooled(model.params, model.stats, once(train))["pooled"]
    inputs = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    kernel = np.linalg.lstsq(inputs, np.eye(3)[train.labels], rcond=1e-4)[0].astype(np.float32)
    head = {"classifier": {"kernel": jnp.asarray(kernel[:-1]), "bias": jnp.asarray(kernel[-1])}}
    heads = {**model.params["heads"], "head": head}
    return dataclasses.replace(model, params={**model.params, "heads": heads})


@pytest.fixture(scope="module")
def watched():
    old = sources.digits(classes=(5, 6, 7), train=40, validation=16, test=16)
    return [functools.partial(retain.task, data=old, name="old digits", head="old")]


@pytest.fixture(scope="module")
def ran(start, tuned, data, watched, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "line"
    options = {"retain": watched, "alphas": (0.25, 0.5), "batch_size": 16, "tolerance": 0.05}
    return folder, options, interpolate(start, tuned, data, folder=folder, **options)


def figure(model, data, part="validation", head="head"):
    datasets = make_datasets(model, data)
    predict = make_predict(model.apply, heads=(head,))
    logits = predict(model.params, model.stats, once(datasets[part]))[head]
    return float((logits.argmax(-1) == datasets[part].labels).mean())


def test_every_alpha_is_scored_on_target_and_source(ran):
    _, _, result = ran
    assert [row["alpha"] for row in result["curve"]] == [0.0, 0.25, 0.5, 1.0]
    assert [row["recomputed"] for row in result["curve"]] == [False, True, True, False]
    for row in result["curve"]:
        assert 0 <= row["target"]["accuracy"] <= 1
        assert 0 <= row["retain"]["old digits"]["accuracy"] <= 1
    assert result["heads"] == {"old": "interpolated", "head": "tuned"}


def test_the_ends_are_start_and_tuned_themselves(ran, start, tuned, data, watched):
    _, _, result = ran
    old = watched[0].keywords["data"]
    curve, tests = result["curve"], result["retain"]["old digits"]
    assert curve[-1]["target"]["accuracy"] == pytest.approx(figure(tuned.model, data))
    assert result["target"]["tuned"]["test"] == pytest.approx(figure(tuned.model, data, "test"))
    for row, end, model in ((curve[0], "before", start.model), (curve[-1], "tuned", tuned.model)):
        found = figure(model, old, head="old")
        assert row["retain"]["old digits"]["accuracy"] == pytest.approx(found)
        assert tests[end]["test"] == pytest.approx(figure(model, old, "test", head="old"))


def test_what_is_exported_is_the_chosen_point_with_its_own_statistics(
    ran, start, tuned, data, tmp_path, monkeypatch
):
    _, options, _ = ran
    monkeypatch.setattr("jtl.recipes.interpolate.choose", lambda *_, **__: 0.25)
    result = interpolate(start, tuned, data, folder=tmp_path / "run", **options)
    made = jtl.load(tmp_path / "run")
    first = {**start.model.params["heads"], "head": tuned.model.params["heads"]["head"]}
    begun = {"backbone": start.model.params["backbone"], "heads": first}
    wanted = trees.lerp(begun, tuned.model.params, 0.25)
    near = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(near, made.model.params, wanted)
    assert made.classes == {"old": OLD, "head": NEW}
    validation = result["curve"][1]["target"]["accuracy"]
    assert figure(made.model, data) == pytest.approx(validation)
    assert result["target"]["after"]["validation"] == pytest.approx(validation)
    assert result["target"]["after"]["test"] == pytest.approx(figure(made.model, data, "test"))
    for other in (start, tuned):
        assert trees.changes(made.model.stats, other.model.stats)


def test_between_the_ends_statistics_are_of_these_weights(start, tuned, data):
    line = make_line(start, tuned, data)
    model = between.at(line, 0.5)
    assert len(trees.changes(tuned.model.stats, model.stats)) > 0
    batch = next(iter(once(line.datasets["train"], 40)))
    live = frozenset(tuned.model.groups)
    # in training mode the batch is its own statistics: that is what stored ones must come to
    wanted, _ = model.apply(model.params, model.stats, batch, live=live - {"stem"})
    found, _ = model.apply(model.params, model.stats, batch)
    stale, _ = model.apply(model.params, tuned.model.stats, batch)
    gap, old = (float(jnp.abs(out["pooled"] - wanted["pooled"]).mean()) for out in (found, stale))
    assert gap < 0.25 * old


def test_statistics_below_what_moved_stay(start, tuned, data):
    line = make_line(start, tuned, data)
    changed = trees.changes(tuned.model.stats, between.at(line, 0.5).stats)
    assert not any("embedder" in name for name in changed)
    assert {name for name in masks.names(tuned.model.stats) if "embedder" not in name} == set(
        changed
    )


def test_where_only_heads_moved_all_statistics_stay(start, tuned, data):
    heads = jax.tree.map(lambda x: x + 0.1, tuned.model.params["heads"])
    params = {**start.model.params, "heads": heads}
    only = dataclasses.replace(tuned.model, params=params, stats=start.model.stats)
    line = make_line(start, Predictor(only, tuned.classes), data)
    assert between.at(line, 0.5).stats is only.stats
    assert not between.validated(line, 0.5)["recomputed"]


def test_ends_keep_their_own_statistics(start, tuned, data):
    line = make_line(start, tuned, data)
    assert not trees.changes(between.at(line, 0.0).stats, start.model.stats)
    assert between.at(line, 1.0) is tuned.model
    head = between.at(line, 0.0).params["heads"]["head"]
    assert not trees.changes(head, tuned.model.params["heads"]["head"])


def make_line(start, tuned, data):
    ends = between.make_ends(start.model, tuned.model)
    datasets = make_datasets(ends.tuned, data)
    task = jtl.recipes.tasks.classification(data["train"])
    return between.make_line(ends, "head", task, datasets, [], batch_size=40, seed=0)


def test_a_finished_run_comes_back_and_no_other_config(ran, start, tuned, data, monkeypatch):
    folder, options, result = ran
    monkeypatch.setattr("jtl.recipes.interpolate.validated", None)  # nothing is computed again
    assert interpolate(start, tuned, data, folder=folder, **options) == result
    with pytest.raises(ValueError, match=r"tolerance: 0.05 there, 0.2 asked for"):
        interpolate(start, tuned, data, folder=folder, **{**options, "tolerance": 0.2})


def test_an_interrupted_run_goes_on_where_it_was(ran, start, tuned, data, tmp_path, monkeypatch):
    _, options, result = ran
    seen = []

    def stopping(line, alpha):
        seen.append(alpha)
        if seen == [0.0, 0.25, 0.5]:
            raise KeyboardInterrupt
        return between.validated(line, alpha)

    monkeypatch.setattr("jtl.recipes.interpolate.validated", stopping)
    with pytest.raises(KeyboardInterrupt):
        interpolate(start, tuned, data, folder=tmp_path / "run", **options)
    again = interpolate(start, tuned, data, folder=tmp_path / "run", **options)
    assert seen == [0.0, 0.25, 0.5, 0.5, 1.0]
    assert again["curve"] == result["curve"] and again["chosen"] == result["chosen"]


def test_the_choice_reads_validation_alone(ran, start, tuned, data, tmp_path):
    _, options, result = ran
    test = tiny.with_labels(
        data["test"], (np.asarray(data["test"].columns["label"]) + 1) % 3, data["test"].classes
    )
    other = interpolate(start, tuned, {**data, "test": test}, folder=tmp_path / "run", **options)
    assert other["target"]["tuned"]["test"] != result["target"]["tuned"]["test"]
    assert other["curve"] == result["curve"] and other["chosen"] == result["chosen"]


def test_a_call_that_trains_runs_first_in_a_folder_of_its_own(start, tuned, data, tmp_path):
    given = {}

    def train(backbone, splits, *, folder, **options):
        given.update(options, backbone=backbone, folder=folder)
        export(folder / "model", tuned.model, labels=tuned.classes)

    result = interpolate(start, train, data, folder=tmp_path / "run", alphas=(), seed=3)
    assert given["backbone"] is start and given["folder"] == tmp_path / "run" / "tuned"
    assert given["seed"] == 3 and given["head"] == "head" and "task" in given
    assert len(result["curve"]) == 2 and result["retain"] == {}


def test_the_page_shows_both_curves(ran):
    folder, _, result = ran
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 2 and "old digits (source)" in page
    assert f"Chosen: alpha {result['chosen']:g}, the smallest within 5.0 points" in page
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["alpha"] for row in rows] == [0.0, 0.25, 0.5, 1.0]
    assert (
        rows[1]["retain/old digits/accuracy"]
        == result["curve"][1]["retain"]["old digits"]["accuracy"]
    )


@pytest.mark.parametrize(
    ("figures", "rule", "wanted"),
    [
        ({0.0: 0.70, 0.5: 0.79, 1.0: 0.80}, "smallest", 0.5),
        ({0.0: 0.70, 0.5: 0.78, 1.0: 0.80}, "smallest", 1.0),
        ({0.0: 0.80, 0.5: 0.10, 1.0: 0.80}, "smallest", 0.0),
        ({0.0: 0.70, 0.5: 0.85, 1.0: 0.80}, "best", 0.5),
        ({0.0: 0.70, 0.5: 0.80, 1.0: 0.80}, "best", 0.5),
    ],
)
def test_rules_by_hand(figures, rule, wanted):
    curve = [{"alpha": alpha, "target": {"r2": value}} for alpha, value in figures.items()]
    assert choose(curve, "r2", rule=rule, tolerance=0.01) == wanted


def test_bad_inputs_are_refused(start, tuned, data, tmp_path):
    go = functools.partial(interpolate, folder=tmp_path / "run")
    with pytest.raises(ValueError, match="rule is 'largest'"):
        go(start, tuned, data, rule="largest")
    with pytest.raises(ValueError, match="alphas are"):
        go(start, tuned, data, alphas=(2,))
    with pytest.raises(ValueError, match=r"has the heads \['head', 'old'\] and none named 'top'"):
        go(start, tuned, data, head="top")
    with pytest.raises(ValueError, match=r"'old' answers \['5', '6', '7'\].*'0', '1', '2'"):
        go(start, tuned, data, head="old")
    same = add_head(start.model, "head", Linear(3), key=jax.random.key(0))
    with pytest.raises(ValueError, match="nothing between them"):
        go(start, same, data)
    other = jtl.recipes.scratch.scratch("resnet", {**tiny.RESNET, "hidden_sizes": [4, 6]})
    with pytest.raises(ValueError, match="shapes"):
        go(other, tuned, data)


def test_a_config_names_a_run_or_trains_one():
    shape = dict(kind="scratch", family="resnet", config=tiny.RESNET)
    digits = dict(kind="digits", classes=(0, 1, 2), train=40, validation=16, test=16)
    rest = dict(recipe="interpolate", folder="none", backbone=shape, data=digits)
    for section, message in (
        (dict(kind="run", folder="absent"), "absent holds no finished model"),
        (dict(kind="fine_tune", plans={}), "tuned of kind 'fine_tune' has no field 'plans'"),
        (dict(kind="fine_tune", plan=dict(kind="full", rates=1)), "'full' has no field 'rates'"),
    ):
        with pytest.raises(ValueError, match=message):
            config.run({"tuned": section, **rest})
