"""Watched sources: figures by hand, what is computed again and when, and a whole run."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jtl
from jtl import data as jdata
from jtl.models import export
from jtl.models.heads import Linear, MaskedLM
from jtl.models.load import load_backbone
from jtl.models.model import attach
from jtl.recipes import language, masking, retain, tasks, terms, watching
from jtl.recipes.datasets import make_datasets, once
from jtl.recipes.job import Job, Settings
from jtl.recipes.optimizers import adamw
from jtl.recipes.predict import Predictor
from jtl.recipes.retain import Before
from jtl.report import record

HEAD, LAST = frozenset({"head"}), frozenset({"head", "block_1"})


@pytest.fixture(scope="module")
def texts():
    return tiny.reviews(train=32, validation=16, test=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, texts):
    """A folder with a BERT and its masked-LM head."""
    backbone = tiny.bert(tmp_path_factory.mktemp("tokenizer"), texts)
    lm = MaskedLM(backbone.dim, backbone.config["vocab_size"])
    model = attach(backbone, {"lm": lm}, key=jax.random.key(1))
    folder = tmp_path_factory.mktemp("checkpoint") / "bert"
    export.export(folder, model)
    return folder


@pytest.fixture(scope="module")
def start(checkpoint, texts):
    """A trained model with one head, "old"."""
    backbone = load_backbone(checkpoint)
    model = attach(backbone, {"old": Linear(2)}, key=jax.random.key(2))
    return Predictor(model, {"old": texts["train"].classes})


@pytest.fixture(scope="module")
def images():
    """A job on digits that opens the last stage after the head."""
    model = attach(tiny.resnet(), {"head": Linear(3)}, key=jax.random.key(0))
    data = tiny.digits()
    plan = tiny.head_then_last(model.groups, ("head",))
    made = tasks.classification(data["train"])
    return Job(model, "head", made, make_datasets(model, data), plan, 0)


def _watching(job, **options):
    probe = functools.partial(retain.probe, data=tiny.digits(), name="digits")
    made, _ = watching.watch(job, Settings(adamw(), **options), (probe,), Before(job.model))
    return made


def _refuse(*_):
    pytest.fail("a figure was computed that had not changed")


def _moved(model, size=0.3):
    params = jax.tree.map(lambda leaf: leaf + size * jnp.ones_like(leaf), model.params)
    return {**params, "heads": model.params["heads"]}


# Figures


def test_a_loss_over_positions_by_hand():
    """Even odds over 4 tokens at 3 real positions, and one where the right token is sure."""
    logits = jnp.zeros((2, 2, 4)).at[1, 0, 2].set(100.0)
    batch = {"label": jnp.array([[1, 0], [2, 3]]), "real": jnp.array([[1.0, 1.0], [1.0, 0.0]])}

    def loss(out, batch):
        log = jax.nn.log_softmax(out["logits"])
        return -jnp.take_along_axis(log, batch["label"][:, :, None], 2)[:, :, 0], batch["real"]

    apply = lambda *_, **__: ({"logits": logits}, {})  # noqa: E731
    source = language.per_position(
        "lm", "tokens", frozenset({"stem"}), datasets={}, apply=apply, loss_per_position=loss
    )
    values, _ = source.apply({}, {}, batch)
    values = {name: np.asarray(value) for name, value in values.items()}
    figures = source.score(values, None)
    assert figures["loss"] == pytest.approx(2 * np.log(4) / 3, rel=1e-6)
    assert figures["perplexity"] == pytest.approx(4 ** (2 / 3), rel=1e-6)
    assert source.interval(values, values, np.zeros(2)) == (0.0, 0.0)
    worse = {**values, "loss": values["loss"] + values["count"]}  # one nat at each position
    low, high = source.interval(values, worse, np.zeros(2))
    assert low > 0 and high <= (np.e - 1) * 4 + 1e-5


def test_masks_are_fixed_and_spare_special_tokens(checkpoint, texts):
    inputs = load_backbone(checkpoint).inputs
    plain = jdata.encode(texts["test"], inputs, buckets=2)
    make = functools.partial(masking.masked, plain, inputs.tokenizer, share=0.3)
    one, again, other = make(seed=0), make(seed=0), make(seed=1)
    differ = []
    for raw, first, same, third in zip(
        plain.parts, one.parts, again.parts, other.parts, strict=True
    ):
        where, labels = first[masking.POSITIONS], first[masking.LABELS]
        real = labels >= 0
        before = np.take_along_axis(raw["input_ids"], where, 1)
        assert (before[real] == labels[real]).all()
        assert not np.isin(labels[real], inputs.tokenizer.all_special_ids).any()
        ordinary = ~np.isin(raw["input_ids"], inputs.tokenizer.all_special_ids)
        assert (real.sum(1) == np.ceil(0.3 * ordinary.sum(1))).all()
        hidden = first["input_ids"] == inputs.tokenizer.mask_token_id
        assert hidden.sum() == real.sum()
        assert (first["input_ids"] == raw["input_ids"])[~hidden].all()
        assert all(np.array_equal(first[name], same[name]) for name in first)
        differ.append(not np.array_equal(first["input_ids"], third["input_ids"]))
    assert any(differ)


def test_the_masked_loss_is_that_of_the_whole_model(checkpoint, texts):
    """The head on the masked positions alone gives what a model with the head gives there."""
    backbone = load_backbone(checkpoint)
    model = attach(backbone, {"head": Linear(2)}, key=jax.random.key(0))
    source = language.masked_lm(Before(model), data=texts, max_length=16)
    whole = export.import_model(checkpoint)
    total = count = 0.0
    for batch in once(source.datasets["test"]):
        out, _ = whole.apply(whole.params, whole.stats, batch)
        (logits,) = (out[name] for name in whole.heads)
        chosen = np.take_along_axis(
            np.asarray(jax.nn.log_softmax(logits)), batch[masking.POSITIONS][:, :, None], 1
        )
        labels = batch[masking.LABELS]
        real = (labels >= 0) & batch["mask"][:, None]
        log = np.take_along_axis(chosen, np.maximum(labels, 0)[:, :, None], 2)[:, :, 0]
        total, count = total - log[real].sum(), count + real.sum()
    made = watching.make_predict(source.apply, heads=source.outputs)
    values = made(model.params, model.stats, once(source.datasets["test"]))
    assert source.score(values, None)["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_probe_is_that_of_the_first_features(images):
    """On the start model it reads what it was fitted on; other features it reads otherwise."""
    made = _watching(images)
    first = watching.scored_before(made, images, resumed=False)
    kept = watching.changed(made, images, images.model, first)["retain"]["digits"]
    assert kept["change"] == {"value": 0.0, "interval": [0.0, 0.0]}
    assert kept["before"]["test"] > 0.6  # three digits: a third by chance
    random = dataclasses.replace(images.model, params=_moved(images.model))
    lost = watching.changed(made, images, random, first)["retain"]["digits"]
    assert lost["before"] == kept["before"]
    assert lost["change"]["value"] == pytest.approx(
        lost["after"]["test"] - lost["before"]["test"], abs=1e-6
    )
    low, high = lost["change"]["interval"]
    assert low <= lost["change"]["value"] <= high < 0


# What is computed again


def test_nothing_is_computed_while_what_a_figure_reads_is_held(images, monkeypatch):
    made = _watching(images)
    watching.scored_before(made, images, resumed=False)
    model, predict = images.model, dict(made.predict)
    monkeypatch.setitem(made.predict, "digits", _refuse)
    held = made(model.params, model.stats, HEAD)
    assert made(model.params, model.stats, HEAD) == held
    monkeypatch.setitem(made.predict, "digits", predict["digits"])
    moved = made(_moved(model), model.stats, LAST)
    assert moved != held
    back = made(model.params, model.stats, HEAD)  # the best weights of the phase were put back
    assert back == held
    monkeypatch.setitem(made.predict, "digits", _refuse)
    assert made(model.params, model.stats, HEAD) == held


def test_a_run_that_goes_on_computes_its_first_figure(images):
    made = _watching(images)
    watching.scored_before(made, images, resumed=True)
    model = images.model
    fresh = made(model.params, model.stats, HEAD)
    other = _watching(images)
    watching.scored_before(other, images, resumed=False)
    assert other(model.params, model.stats, HEAD) == fresh
    later = _watching(images)
    watching.scored_before(later, images, resumed=True)
    assert later(_moved(model), model.stats, HEAD) != fresh


def test_columns_give_the_figures_of_raw_batches(images):
    model, found = images.model, []
    for mib in (64, 0):
        made = _watching(images, columns_mib=mib, columns_disk_mib=0)
        top = jax.tree.map(
            lambda leaf, label: leaf * 1.1 if label == "block_1" else leaf,
            model.params,
            model.labels,
        )
        found.append(made(top, model.stats, LAST))
        (read,) = made.views["digits"].derived.values()
        assert bool(read.derived) == (mib > 0)
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_sources_take_their_part_of_the_memory(images):
    probe = functools.partial(retain.probe, data=tiny.digits(), name="digits")
    settings = Settings(adamw(), columns_mib=72)
    _, left = watching.watch(images, settings, (probe,), Before(images.model))
    assert left.columns_mib == 72 * 56 // 72  # 40 + 16 rows of the target, 16 of the source
    only_head = images._replace(plan=images.plan[:1])
    _, left = watching.watch(only_head, settings, (probe,), Before(images.model))
    assert left.columns_mib == 72


# Refusals


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (retain.task, {}, r"head=None is given; the start model brought \[\]; start from a run"),
        (language.masked_lm, {}, "needs the masked-LM head of the start, and 'scratch'"),
    ],
)
def test_what_cannot_be_watched_is_refused(kind, options, message, checkpoint, texts):
    backbone = dataclasses.replace(load_backbone(checkpoint), source="scratch")
    model = attach(backbone, {"head": Linear(2)}, key=jax.random.key(0))
    data = make_datasets(model, texts)
    plan = tiny.head_only((), ("head",))
    job = Job(model, "head", tasks.classification(texts["train"]), data, plan, 0)
    bound = functools.partial(kind, data=texts, **options)
    with pytest.raises(ValueError, match=message):
        watching.watch(job, Settings(adamw()), (bound,), Before(model))


def test_sources_need_names_of_their_own(start, images, texts):
    bound = functools.partial(retain.task, data=texts)
    job = images._replace(model=start.model, plan=tiny.head_only((), ("old",)))
    before = Before(start.model, ("old",))
    with pytest.raises(ValueError, match=r"\['old', 'old'\]; give each a name of its own"):
        watching.watch(job, Settings(adamw()), (bound, bound), before)


def test_a_head_of_other_classes_is_refused(start, texts):
    before = Before(start.model, ("old",), {"old": ("bad", "good")})
    with pytest.raises(ValueError, match=r"\['bad', 'good'\]; its data have .*; give the data of"):
        retain.task(before, data=texts)


# A whole run


@pytest.fixture(scope="module")
def ended(tmp_path_factory, start, texts):
    folder = tmp_path_factory.mktemp("runs") / "run"
    jtl.fine_tune(
        start,
        tiny.reviews(train=40),
        folder=folder,
        plan=tiny.head_then_last,
        penalties=(functools.partial(terms.l2_sp, weight=1e-6),),
        retain=(
            functools.partial(retain.task, data=texts, name="first"),
            functools.partial(language.masked_lm, data=texts),
        ),
        head="new",
        batch_size=16,
        buckets=1,
        shares_every=1,
    )
    return folder


def _result(folder):
    return json.loads((folder / record.RESULT).read_text())


@pytest.mark.slow
def test_evaluations_carry_the_figures_of_the_sources(ended):
    rows = [row for row in record.read_rows(ended) if row["kind"] == "evaluation"]
    result = _result(ended)["retain"]
    assert set(result) == {"first", "masked_lm"}
    for name, metric in (("first", "accuracy"), ("masked_lm", "perplexity")):
        key = f"retain/{name}/{metric}"
        held = [row[key] for row in rows if row["phase"] == "head"]
        assert set(held) == {result[name]["before"]["validation"]}
        assert rows[-1][key] == pytest.approx(result[name]["after"]["validation"], rel=1e-5)
    last = rows[-1]["retain/masked_lm/loss"]
    assert last != result["masked_lm"]["figures"]["before"]["validation"]["loss"]


@pytest.mark.slow
def test_the_figures_after_are_those_of_the_saved_model(ended, start, texts):
    truth = np.asarray(texts["test"].columns["label"])
    for model, when in ((start, "before"), (jtl.load(ended), "after")):
        logits = model.logits(texts["test"].columns["text"], head="old")
        accuracy = np.mean(logits.argmax(-1) == truth)
        found = _result(ended)["retain"]["first"][when]["test"]
        assert found == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.slow
def test_a_penalty_that_holds_nothing_is_named(ended):
    result = _result(ended)
    assert "'l2_sp' never had more than 0.00 % of the gradient norm" in result["warnings"][0]
    assert result["penalties"]["l2_sp"]["share"]["greatest"] < 0.01


@pytest.mark.slow
def test_the_page_says_what_was_forgotten(ended):
    page = (ended / record.REPORT).read_text()
    for words in ("What was forgotten", "first (source)", "Warning: penalty", "masked tokens"):
        assert words in page
