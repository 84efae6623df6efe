"""A whole run on real sentences: what it leaves, how it resumes, what it refuses."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import jtl
from jtl.models.model import add_head, attach
from jtl.recipes import finetune, tasks, terms, training
from jtl.recipes.datasets import make_datasets
from jtl.report import record
from jtl.train.failure import NonFiniteError
from jtl.train.plan import Phase

OPTIONS = {"plan": tiny.head_then_last, "batch_size": 16, "buckets": 1}
KEYS = {"metric", "baselines", "target", "phases", "held_bit_equal", "loaded", "seed"}
KEYS |= {"versions", "config"}
PHASE_KEYS = {"name", "live", "epochs", "steps", "metric_before", "metric_after", "seconds"}
PHASE_KEYS |= {"compile_seconds", "flops_per_step", "optimizer_bytes"}


@pytest.fixture(scope="module")
def data():
    return tiny.reviews()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, data):
    return tiny.bert(tmp_path_factory.mktemp("tokenizer"), data)


@pytest.fixture(scope="module")
def ended(tmp_path_factory, backbone, data):
    """A run that went to its end: its folder."""
    folder = tmp_path_factory.mktemp("runs") / "ended"
    jtl.fine_tune(backbone, data, folder=folder, **OPTIONS)
    return folder


def _result(folder):
    return json.loads((folder / record.RESULT).read_text())


def _rows(folder, kind):
    return [row for row in record.read_rows(folder) if row["kind"] == kind]


def _losses(folder):
    return [row["loss"] for row in _rows(folder, "step")]


def test_a_run_leaves_its_proof(ended, backbone):
    result = _result(ended)
    assert set(result) >= KEYS
    assert all(set(row) >= PHASE_KEYS for row in result["phases"])
    assert [row["name"] for row in result["phases"]] == ["head", "last"]
    assert [row["steps"] for row in result["phases"]] == [6, 3]  # 40 rows: 16, 16, 8
    assert result["held_bit_equal"] is True
    low, high = result["target"]["test_interval"]
    assert low <= result["target"]["test"] <= high
    assert set(result["baselines"]) == {"majority", "linear_probe"}
    there = {path.name for path in ended.iterdir()}
    assert {"config.json", "metrics.jsonl", "report.html", "checkpoints", "model"} <= there
    assert len(_losses(ended)) == 9


def test_what_no_phase_opens_keeps_its_bits(ended, backbone):
    trained = jtl.load(ended).model.params["backbone"]
    stem = backbone.params["embeddings"], trained["embeddings"]
    pairs = zip(*map(jax.tree.leaves, stem), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    layers = backbone.params["encoder"]["layer"], trained["encoder"]["layer"]
    for number, equal in (("0", True), ("1", False)):
        pairs = zip(*(jax.tree.leaves(layer[number]) for layer in layers), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs) == equal


def test_predictions_are_named_and_in_order(ended, data):
    predictor = jtl.load(ended)
    raw = data["test"].columns["text"][:7]
    found = predictor.predict(raw, batch=3)
    classes = data["train"].classes
    assert [set(row.probabilities) for row in found] == [set(classes)] * 7
    for text, row in zip(raw, found, strict=True):
        assert sum(row.probabilities.values()) == pytest.approx(1, abs=1e-6)
        assert row.probability == max(row.probabilities.values())
        assert row.probabilities[row.label] == row.probability
        (alone,) = predictor.predict(text)
        assert alone.probability == pytest.approx(row.probability, abs=1e-5)


def test_the_result_is_that_of_the_saved_model(ended, data):
    """The exported folder scores on the test split what result.json says."""
    found = jtl.load(ended).predict(data["test"].columns["text"])
    truth = [data["test"].classes[label] for label in data["test"].columns["label"]]
    right = np.mean([row.label == label for row, label in zip(found, truth, strict=True)])
    assert right == pytest.approx(_result(ended)["target"]["test"], abs=1e-6)


def test_a_run_that_ended_is_returned_as_it_is(ended, backbone, data):
    before = (ended / record.RESULT).stat().st_mtime_ns
    again = jtl.fine_tune(backbone, data, folder=ended, **OPTIONS)
    assert again == _result(ended)
    assert (ended / record.RESULT).stat().st_mtime_ns == before


def test_a_folder_of_another_run_is_refused(ended, backbone, data):
    with pytest.raises(ValueError, match=r"another config; seed: 0 there, 1 asked for; give"):
        jtl.fine_tune(backbone, data, folder=ended, **OPTIONS, seed=1)
    with pytest.raises(ValueError, match="another config"):
        jtl.fine_tune(backbone, tiny.reviews(train=32), folder=ended, **OPTIONS)


@pytest.mark.slow
def test_derived_columns_give_the_numbers_of_the_plain_path(ended, tmp_path, backbone, data):
    plain = jtl.fine_tune(backbone, data, folder=tmp_path / "plain", **OPTIONS, columns_mib=0)
    result = _result(ended)
    np.testing.assert_allclose(_losses(tmp_path / "plain"), _losses(ended), rtol=2e-3)
    for name in ("accuracy", "loss"):
        figure = result["figures"]["validation"][name]
        assert plain["figures"]["validation"][name] == pytest.approx(figure, abs=2e-3)


@pytest.mark.slow
def test_columns_in_files_give_the_same_bits_and_a_later_run_finds_them(
    ended, tmp_path, backbone, data
):
    place = {"columns_mib": 0, "columns_disk_mib": 64, "columns_folder": str(tmp_path / "columns")}
    first = jtl.fine_tune(backbone, data, folder=tmp_path / "first", **OPTIONS, **place)
    second = jtl.fine_tune(backbone, data, folder=tmp_path / "second", **OPTIONS, **place)
    assert _losses(tmp_path / "first") == _losses(tmp_path / "second") == _losses(ended)
    assert first["target"] == second["target"] | {"seconds": first["target"]["seconds"]}
    rows = [r["phases"][0] for r in (first, second)]
    assert rows[0]["column_mib"] == 0 < rows[0]["disk_mib"]
    assert rows[0]["reused"] == 0 < rows[1]["reused"]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 7])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    steps, ended, tmp_path, backbone, data, monkeypatch
):
    append = record.append

    def until(run, row):
        append(run, row)
        if row["kind"] == "step" and row["step"] == steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(record, "append", until)
        jtl.fine_tune(backbone, data, folder=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run" / record.RESULT).exists()
    jtl.fine_tune(backbone, data, folder=tmp_path / "run", **OPTIONS)
    assert [row["step"] for row in _rows(tmp_path / "run", "step")] == list(range(1, 10))
    assert _losses(tmp_path / "run") == _losses(ended)
    weights = [folder / "model" / "model.safetensors" for folder in (tmp_path / "run", ended)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert _result(tmp_path / "run")["target"]["test"] == _result(ended)["target"]["test"]


@pytest.mark.slow
def test_penalties_keep_to_the_run_that_training_starts_from(ended, tmp_path, data):
    """At the start all are zero; then they grow; the head of the first run keeps its bits."""
    penalties = (
        functools.partial(terms.l2_sp, weight=2.0),
        functools.partial(terms.ewc, weight=1e3, examples=8, data=data),
        functools.partial(terms.kl, weight=1.0),
    )
    start = jtl.load(ended)
    jtl.fine_tune(
        start,
        data,
        folder=tmp_path / "run",
        head="second",
        plan=tiny.everything,
        task=functools.partial(tasks.classification, dropout=0.0),
        penalties=penalties,
        batch_size=16,
        buckets=1,
    )
    rows = _rows(tmp_path / "run", "step")
    names = [f"loss/{name}" for name in ("l2_sp", "ewc_head", "kl_head")]
    for name in names:
        assert rows[0][name] == pytest.approx(0.0, abs=1e-6), name
        assert rows[-1][name] > 1e-5, name
    parts = [rows[-1][name] for name in ("loss/classification", *names)]
    assert rows[-1]["loss"] == pytest.approx(sum(parts), rel=1e-5)
    tuned = jtl.load(tmp_path / "run")
    assert tuned.classes == {"head": data["train"].classes, "second": data["train"].classes}
    kept = start.model.params["heads"]["head"]["classifier"]["kernel"]
    assert np.array_equal(kept, tuned.model.params["heads"]["head"]["classifier"]["kernel"])
    assert len(tuned.predict(["a film"], head="second")) == 1
    with pytest.raises(ValueError, match="head None is asked for; the model has .*; name one"):
        tuned.predict(["a film"])


@pytest.mark.parametrize("penalty", [terms.kl, terms.ewc])
def test_a_penalty_on_outputs_needs_a_trained_head(penalty, tmp_path, backbone, data):
    with pytest.raises(ValueError, match=r"trained head, .*; the start model brought \[\]; start"):
        jtl.fine_tune(backbone, data, folder=tmp_path / "run", penalties=(penalty,), **OPTIONS)


def test_ewc_needs_the_data_of_its_head(ended, tmp_path, data):
    with pytest.raises(ValueError, match=r"examples of the task of head 'head'; .*; give data="):
        jtl.fine_tune(
            jtl.load(ended), data, folder=tmp_path / "run", penalties=(terms.ewc,), **OPTIONS
        )


def test_a_head_of_other_outputs_is_refused(ended, tmp_path, data):
    three = {
        part: tiny.with_labels(source, np.arange(source.size) % 3, ("a", "b", "c"))
        for part, source in data.items()
    }
    with pytest.raises(ValueError, match="'head' has 2 outputs and the task 3; give .* head="):
        jtl.fine_tune(jtl.load(ended), three, folder=tmp_path / "run", **OPTIONS)


def test_a_head_of_other_classes_is_refused(ended, tmp_path, data):
    spam = {
        part: tiny.with_labels(source, np.arange(source.size) % 2, ("ham", "spam"))
        for part, source in data.items()
    }
    with pytest.raises(ValueError, match="'head' answers .* has the classes .'ham', 'spam'.; give"):
        jtl.fine_tune(jtl.load(ended), spam, folder=tmp_path / "run", **OPTIONS)


def _absent(data):
    labels = np.zeros(data["train"].size, np.int32)
    return {**data, "train": tiny.with_labels(data["train"], labels, data["train"].classes)}


def _other_classes(data):
    labels = np.full(data["test"].size, 2, np.int32)
    return {**data, "test": tiny.with_labels(data["test"], labels, ("neg", "pos", "so-so"))}


def _empty(data):
    return {**data, "validation": data["validation"].take([])}


def _two_parts(data):
    return {part: data[part] for part in ("train", "test")}


BAD_DATA = {
    r"no example of .*; it has .*; take another seed": _absent,
    r"part 'test' has the classes .*so-so.* and 'train' has .*; give": _other_classes,
    r"parts \['validation'\] are empty; there are .*'validation': 0.*; give": _empty,
    r"data has no \['validation'\]; it has .*; give a source": _two_parts,
}


@pytest.mark.parametrize("message", BAD_DATA)
def test_bad_data_is_refused(message, tmp_path, backbone, data):
    with pytest.raises(ValueError, match=message):
        jtl.fine_tune(backbone, BAD_DATA[message](data), folder=tmp_path / "run", **OPTIONS)


def _misspelt(groups, heads):
    return [Phase("head", {"block_9": 0.1, heads[0]: 0.1}, epochs=1)]


BAD_OPTIONS = {
    r"batch of 64 rows is larger than the data: .* has 40; take": {"batch_size": 64},
    r"'head'.*block_9.*block_1": {"plan": _misspelt},
    r"parallel is 'vmap'; did you mean": {"parallel": "vmap"},
    r"accumulate=3 microbatches; give": {"accumulate": 3},
    r"20 tokens are asked for; the checkpoint takes 1 to 16; give": {"max_length": 20},
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_options_are_refused_before_any_work(message, tmp_path, backbone, data, monkeypatch):
    monkeypatch.setattr(finetune, "_baselines", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        jtl.fine_tune(
            backbone, data, folder=tmp_path / "run", **{**OPTIONS, **BAD_OPTIONS[message]}
        )


def test_texts_for_an_image_backbone_are_refused(tmp_path, data):
    with pytest.raises(ValueError, match="take data or a backbone of the other kind"):
        jtl.fine_tune(tiny.resnet(), data, folder=tmp_path / "run", plan=tiny.head_only)


class _Spoiling:
    """An image processor that makes NaN of one image."""

    def __init__(self, processor, image):
        self.processor, self.image = processor, image

    def __call__(self, images, **options):
        batch = self.processor(images, **options)
        for row, image in enumerate(images):
            if np.array_equal(np.asarray(image), self.image):
                batch["pixel_values"][row] = np.nan
        return batch


def _spoil(backbone, image):
    processor = _Spoiling(backbone.inputs.processor, image)
    inputs = dataclasses.replace(backbone.inputs, processor=processor)
    return dataclasses.replace(backbone, inputs=inputs)


@pytest.mark.slow
def test_nan_in_training_data_names_step_term_block_and_row(tmp_path):
    data = tiny.digits()
    backbone = _spoil(tiny.resnet(), data["train"].columns["image"][11])
    folder = tmp_path / "run"
    with pytest.raises(NonFiniteError) as caught:
        jtl.fine_tune(backbone, data, folder=folder, plan=tiny.everything, batch_size=16)
    said = str(caught.value)
    step = len(_losses(folder)) - 1  # the step that failed has a row too
    assert said.startswith(f"step {step}: the loss is not finite: term 'classification' is nan")
    assert "first block that is not finite is 'stem'" in said
    assert "'pixel_values' is not finite in examples [11] of the data" in said
    assert said.endswith("clean these rows")
    saved = [path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]
    assert str(step) in saved  # the state before the step that failed


def test_nan_in_validation_data_names_the_rows(tmp_path):
    data = tiny.digits()
    backbone = _spoil(tiny.resnet(), data["validation"].columns["image"][5])
    with pytest.raises(
        ValueError, match=r"of validation are not finite in 1 of 16 .* \[5\]; clean"
    ):
        jtl.fine_tune(backbone, data, folder=tmp_path / "run", plan=tiny.head_only, batch_size=16)


def _engine_losses(backbone, data, parallel):
    """Return losses and last params of one epoch in which all moves, by SGD and without dropout."""
    task = tasks.classification(data["train"], dropout=0.0)
    model = attach(backbone, {"head": task.head}, key=jax.random.key(3))
    encoded = make_datasets(model, data, buckets=1)
    plan = tiny.everything(model.groups, ("head",))
    settings = training.Settings(optax.sgd(1.0), batch_size=16, parallel=parallel)
    engine = training.make_engine(
        training.Job(model, "head", task, encoded, plan, seed=0), settings
    )
    events = list(engine.events)
    losses = [event.metrics["loss"] for event in events if event.kind == "step"]
    return losses, events[-1].state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"), [("bert", "pmap"), ("resnet", "pmap"), ("resnet", "fsdp")]
)
def test_every_way_over_the_devices_has_the_losses_of_jit(family, kind, backbone, data):
    """8 devices; 40 rows are batches of 16, 16 and 8, whose masked rows fill four devices."""
    assert jax.local_device_count() == 8
    start, source = (backbone, data) if family == "bert" else (tiny.resnet(), tiny.digits())
    alone, one = _engine_losses(start, source, "jit")
    spread, many = _engine_losses(start, source, kind)
    assert len(alone) == 3
    np.testing.assert_allclose(spread, alone, rtol=1e-5)
    for left, right in zip(jax.tree.leaves(one.stats), jax.tree.leaves(many.stats), strict=True):
        np.testing.assert_allclose(np.asarray(right), np.asarray(left), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_regression_has_numbers_for_answers(tmp_path, backbone, data):
    lengths = {
        part: tiny.with_labels(
            source,
            np.asarray([len(text) / 100 for text in source.columns["text"]], np.float32),
            None,
        )
        for part, source in data.items()
    }
    folder = tmp_path / "run"
    result = jtl.fine_tune(
        backbone,
        lengths,
        folder=folder,
        task=tasks.regression,
        plan=tiny.head_only,
        batch_size=16,
        buckets=1,
    )
    assert result["metric"] == "r2" and set(result["baselines"]) == {"mean", "linear_probe"}
    assert "confusion" not in result
    truth = lengths["test"].columns["label"]
    (first, *rest) = found = jtl.load(folder).predict(data["test"].columns["text"])
    assert isinstance(first.label, float) and first.probabilities == {} and len(rest) == 23
    error = np.mean((np.asarray([row.label for row in found]) - truth) ** 2)
    assert 1 - error / np.var(truth) == pytest.approx(result["target"]["test"], abs=1e-4)


def test_add_head_keeps_all_that_is_there(ended):
    model = jtl.load(ended).model
    more = add_head(model, "more", model.heads["head"], key=jax.random.key(0))
    assert list(more.heads) == ["head", "more"]
    same = jax.tree.map(
        jnp.array_equal, model.params["heads"]["head"], more.params["heads"]["head"]
    )
    assert all(jax.tree.leaves(same))
    with pytest.raises(ValueError, match="has a head 'more' among .*; take another"):
        add_head(more, "more", model.heads["head"], key=jax.random.key(0))
