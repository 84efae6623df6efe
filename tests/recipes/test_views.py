"""Views: memory, files, reused files and raw batches agree; shapes are known before a phase."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jtl import data as jdata
from jtl.models.heads import Linear
from jtl.models.model import attach
from jtl.recipes import identity, views
from jtl.recipes.datasets import make_datasets

HEAD = frozenset({"head"})
LAST = frozenset({"head", "top", "block_1"})
ALL = LAST | {"block_0", "stem"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A model for texts and its training data, of two lengths."""
    sources = tiny.reviews(train=40)
    backbone = tiny.bert(tmp_path_factory.mktemp("tokenizer"), sources)
    model = attach(backbone, {"head": Linear(2)}, key=jax.random.key(0))
    return model, make_datasets(model, sources)["train"]


@pytest.fixture(scope="module")
def images():
    """A model with BatchNorm and images that are read batch by batch."""
    model = attach(tiny.resnet(), {"head": Linear(3)}, key=jax.random.key(0))
    source = tiny.digits()["train"]
    return model, jdata.encode(source, model.backbone.inputs, memory_bytes=0)


def _store(folder, memory_mib=0.0, disk_mib=64, **options):
    sizes = {"memory_bytes": int(memory_mib * 2**20), "disk_bytes": int(disk_mib * 2**20)}
    return jdata.Store(**sizes, folder=folder, **options)


def _view(pair, store=None, lives=(HEAD, LAST, ALL)):
    model, dataset = pair
    return views.make_view(model, dataset, lives, batch_size=16, store=store)


def _start(pair):
    return pair[0].params, pair[0].stats


def _moved(params, name):
    """Return the parameters with one stage of the text backbone changed."""
    layers = params["backbone"]["encoder"]["layer"]
    layers = {**layers, name: jax.tree.map(lambda x: x + 0.5, layers[name])}
    return {**params, "backbone": {**params["backbone"], "encoder": {"layer": layers}}}


def _gradient(model, stats):
    def loss(params, batch):
        logits = model.apply(params, stats, batch)[0]["head"]
        chosen = jax.nn.log_softmax(logits)[jnp.arange(16), batch["label"]]
        return -jnp.sum(chosen * batch["mask"]) / jnp.sum(batch["mask"])

    return jax.jit(jax.value_and_grad(loss))


def _train(pair, view, gradient):
    """Return the losses of a small run: head, then the last block too, then all, the head again."""
    model, losses = pair[0], []
    params, stats = _start(pair)
    for live in (HEAD, LAST, ALL, HEAD):
        rates = jax.tree.map(lambda name, live=live: 0.05 * (name in live), model.labels)
        for batch in jdata.batches(view(live, params, stats), 16, seed=1, stop=3):
            loss, slope = gradient(params, batch)
            params = jax.tree.map(lambda x, g, rate: x - rate * g, params, slope, rates)
            losses.append(float(loss))
    return np.asarray(losses)


def test_memory_files_reused_files_and_raw_batches_train_alike(texts, tmp_path):
    shared = {"folder": tmp_path, "margin_bytes": 0}
    stores = {
        "memory": jdata.Store(),
        "files": _store(**shared),
        "reused": _store(**shared),
        "raw": jdata.Store(memory_bytes=0),
    }
    gradient = _gradient(texts[0], texts[0].stats)
    made = {name: _view(texts, store) for name, store in stores.items()}
    losses = {name: _train(texts, view, gradient) for name, view in made.items()}
    assert np.ptp(losses["raw"]) > 0.01
    assert losses["memory"].tobytes() == losses["files"].tobytes() == losses["reused"].tobytes()
    np.testing.assert_allclose(losses["raw"], losses["memory"], rtol=1e-4)
    accounts = {name: store.account() for name, store in stores.items()}
    assert accounts["memory"]["column_mib"] > 0 == accounts["memory"]["disk_mib"]
    assert accounts["files"]["disk_mib"] > 0 == accounts["files"]["column_mib"]
    assert accounts["files"]["reused"] == 0 < accounts["files"]["derive_seconds"]
    # the borders of HEAD and LAST, and both once more after all had moved
    assert accounts["reused"]["reused"] == 4 and accounts["reused"]["derive_seconds"] == 0
    assert accounts["raw"]["derive_seconds"] == 0


@pytest.mark.parametrize(
    ("kind", "memory_mib", "lives"),
    [("texts", 64, (HEAD, LAST, ALL)), ("texts", 0, (HEAD, LAST)), ("images", 64, (HEAD,))],
)
def test_shapes_are_those_of_the_batches_and_known_before(kind, memory_mib, lives, request):
    pair = request.getfixturevalue(kind)
    for live in lives:
        fresh = _view(pair, jdata.Store(memory_bytes=memory_mib * 2**20), lives=[live])
        before = fresh.shapes(live, 8)
        assert fresh.store.account()["derive_seconds"] == 0 and not fresh.derived
        dataset = fresh(live, *_start(pair))
        assert fresh.shapes(live, 8) == before
        met = [
            {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
            for batch in jdata.batches(dataset, 8, stop=jdata.steps_per_epoch(dataset, 8))
        ]
        assert len(before) == len(set(pair[1].bucket.tolist()))
        assert all(shapes in before for shapes in met)
        assert all(shapes in met for shapes in before)


def test_shapes_with_other_columns(texts):
    model, dataset = texts
    size = {"reference/head": np.ones((16, 3), np.float32)}
    whole = jdata.derive(dataset, 16, lambda batch: size, names=list(size))
    assert whole is not None
    for live in (HEAD, LAST):
        view = _view((model, whole))
        before = view.shapes(live, 8)
        assert all("reference/head" in shapes for shapes in before)
        view(live, *_start(texts))
        assert view.shapes(live, 8) == before


def test_augmented_images_are_read_raw_in_every_phase(images, tmp_path):
    model, dataset = images
    rng = np.random.default_rng(0)

    def flipped(rows):
        pixels = dataset.read(rows)["pixel_values"]
        turn = rng.random(len(rows)) < 0.5
        return {"pixel_values": np.where(turn[:, None, None, None], pixels[:, :, ::-1], pixels)}

    marked = dataclasses.replace(dataset, augmented=True)
    for other in (marked, dataclasses.replace(dataset, read=flipped)):
        view = _view((model, other), _store(tmp_path, 64, keep_seconds=0.0))
        assert view(HEAD, *_start(images)) is other
        assert set(view.shapes(HEAD, 4)[0]) == {"pixel_values", "label", "mask", "index"}
        assert not list(tmp_path.iterdir())
    assert "pooled" in _view(images)(HEAD, *_start(images)).derived


def test_images_are_derived_in_files_and_found_again(images, tmp_path):
    for reused in (0, 2):  # the borders of HEAD and LAST
        store = _store(tmp_path)
        found = _view(images, store)(HEAD, *_start(images))
        assert store.account()["reused"] == reused
    plain = _view(images)(HEAD, *_start(images))
    np.testing.assert_array_equal(found.parts[0]["pooled"], plain.parts[0]["pooled"])


def test_a_column_is_of_the_weights_below_its_border_and_of_the_data(texts, tmp_path):
    model, dataset = texts
    params, stats = _start(texts)

    def reused(params=params, pair=texts, live=LAST):
        store = _store(tmp_path)
        _view(pair, store, lives=[live])(live, params, stats)
        return store.account()["reused"] == 1

    assert not reused() and reused()
    assert reused(_moved(params, "1"))  # the block above the border
    assert not reused(_moved(params, "0"))
    assert not reused(live=HEAD) and not reused(_moved(params, "1"), live=HEAD)
    wider = {**dataset.parts[0], "input_ids": dataset.parts[0]["input_ids"] + 1}
    others = dataclasses.replace(dataset, parts=(wider, *dataset.parts[1:]))
    assert others.name == dataset.name and not reused(pair=(model, others))
    relabelled = dataclasses.replace(dataset, labels=dataset.labels[::-1].copy())
    assert reused(pair=(model, relabelled))
    config = dataclasses.replace(model.backbone.module.config, layer_norm_eps=1e-3)
    module = model.backbone.module.clone(config=config)
    other = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, module=module))
    assert not reused(pair=(other, dataset))


def test_statistics_are_part_of_what_a_column_is_of(images, tmp_path):
    params, stats = _start(images)
    others = jax.tree.map(lambda x: x + 1, stats)
    for given, reused in ((stats, 0), (others, 0), (stats, 1)):
        store = _store(tmp_path)
        _view(images, store, lives=[HEAD])(HEAD, params, given)
        assert store.account()["reused"] == reused


def test_where_no_budget_suffices_the_log_says_what_is_needed(texts, tmp_path, caplog):
    view = _view(texts, _store(tmp_path, memory_mib=0.001, disk_mib=0.001))
    with caplog.at_level(logging.WARNING, logger="jtl.recipes"):
        assert view(LAST, *_start(texts)) is texts[1]
        assert view(LAST, *_start(texts)) is texts[1]
    (message,) = [row.getMessage() for row in caplog.records]
    assert "border 2 needs" in message and "raise one of the budgets (columns_mib" in message
    assert "input_ids" in view.shapes(LAST, 8)[0]


def test_the_column_of_a_phase_comes_before_those_of_later_phases(texts):
    everything = _view(texts)
    everything(HEAD, *_start(texts))
    assert set(everything.derived) == {2, 4}
    bulky = everything.store.account()["column_mib"]
    small = _view(texts, _store(None, memory_mib=bulky / 2, disk_mib=0))
    small(HEAD, *_start(texts))
    assert set(small.derived) == {4}
    exact = texts[1].size * 32 * 4 / 2**20
    tight = _view(texts, _store(None, memory_mib=bulky - exact, disk_mib=0))
    tight(HEAD, *_start(texts))
    assert "hidden_2" in tight(LAST, *_start(texts)).derived and set(tight.derived) == {2}
    assert "pooled" in tight(HEAD, *_start(texts)).derived and set(tight.derived) == {4}


def test_teacher_outputs_have_keys_of_their_own(texts, tmp_path):
    model, dataset = texts

    def teacher(params):
        return lambda batch: {"t": model.apply(params, model.stats, batch)[0]["head"]}

    def key(function):
        return identity.column_keys(function, dataset, 16, ["t"])["t"]

    moved = _moved(model.params, "1")
    assert key(teacher(model.params)) == key(teacher(model.params)) != key(teacher(moved))
    jitted = key(jax.jit(teacher(model.params)))  # its arrays lie deeper
    assert jitted == key(jax.jit(teacher(model.params))) != key(jax.jit(teacher(moved)))
    for reused in (0, 1):
        store = _store(tmp_path)
        function = teacher(model.params)
        options = {"keys": {"t": key(function)}, "store": store}
        assert jdata.derive(dataset, 16, jax.jit(function), names=["t"], **options) is not None
        assert store.account()["reused"] == reused
