"""Rows of several streams in one batch: each term over its own, however the batch is split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jtl import data as jdata
from jtl.losses.classification import cross_entropy
from jtl.models.heads import Linear
from jtl.models.model import add_head, attach
from jtl.recipes import supply, tasks, training
from jtl.recipes.datasets import make_datasets, once
from jtl.recipes.streams import own_rows
from jtl.recipes.terms import Part, Stream
from jtl.train import parallel
from jtl.train.state import Context, create
from jtl.train.step import make_step


def _context(batch):
    return Context({}, {}, batch, {}, jnp.int32(0), jax.random.key(0))


def test_without_a_stream_the_term_sees_the_batch_as_it_is():
    batch = {"mask": jnp.array([True, False])}
    seen = own_rows(lambda c: (c.batch, 1.0), 0)(_context(batch))[0]
    assert seen is batch


def test_padding_rows_belong_to_no_stream():
    batch = {"mask": jnp.array([True, False, True]), "stream": jnp.array([1, 1, 0])}
    masks = [own_rows(lambda c: (c.batch["mask"], 1.0), k)(_context(batch))[0] for k in (0, 1)]
    np.testing.assert_array_equal(masks, [[False, False, True], [True, False, False]])


def test_a_term_never_reads_labels_of_other_rows():
    batch = {
        "mask": jnp.ones(3, bool),
        "stream": jnp.array([0, 1, 2]),
        "label": jnp.array([1, 9, 0]),
        "label/2": jnp.array([0.0, 0.0, 0.5]),
    }
    labels = [own_rows(lambda c: (c.batch["label"], 1.0), k)(_context(batch))[0] for k in range(3)]
    assert [x.tolist() for x in labels] == [[1, 0, 0], [0, 9, 0], [0.0, 0.0, 0.5]]
    assert labels[2].dtype == jnp.float32 and labels[0].dtype == jnp.int32

    def careless(c):  # a loss that masks too late: 0 * nan is nan
        picked = jnp.take(jnp.log(jnp.array([0.5, 0.5])), c.batch["label"], mode="fill")
        return jnp.sum(picked * c.batch["mask"]), jnp.sum(c.batch["mask"])

    assert not np.isfinite(careless(_context(batch))[0])
    assert float(own_rows(careless, 0)(_context(batch))[0]) == pytest.approx(np.log(0.5))


SPREADS = [("jit", 1), ("jit", 2), ("fsdp", 1), ("pmap", 2)]


@pytest.mark.parametrize(("kind", "accumulate"), SPREADS)
def test_the_step_is_that_of_the_loss_by_hand(kind, accumulate):
    """16 rows, 10 of the task, of which 3 are padding, 5 and 1 of two streams, over 8 devices."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 3)).astype(np.float32), rng.normal(size=16).astype(np.float32)
    batch = {
        "x": x,
        "label": y,
        "mask": np.arange(16) < 7,
        "stream": np.repeat([0, 1, 2], (10, 5, 1)),
    }
    batch["mask"][10:] = True
    batch["stream"] = batch["stream"].astype(np.int32)

    def square(c):
        gap = jnp.where(c.batch["mask"], c.out - c.batch["label"], 0.0)
        return jnp.sum(gap**2), jnp.sum(c.batch["mask"], dtype=jnp.float32)

    def thrice(c):
        total, weight = square(c)
        return 3.0 * total, weight

    terms = {"task": own_rows(square, 0), "one": own_rows(thrice, 1), "two": own_rows(square, 2)}
    spread, tx = parallel.make_spread(kind, threshold=1), optax.sgd(1.0)
    step = make_step(
        lambda params, stats, batch, **_: (batch["x"] @ params["w"], stats),
        *(terms, tx, {"w": "w"}, {"w": 0.1}),
        accumulate=accumulate,
        axis_name=spread.axis_name,
    )
    w = np.array([0.5, -1.0, 2.0], np.float32)
    state = parallel.place(spread, create({"w": w}, {}, tx, key=jax.random.key(0)))
    state, metrics = parallel.compiled(spread, step)(state, parallel.put(spread, batch), 0)
    loss, slope = 0.0, np.zeros(3)
    for rows, weight in ((slice(0, 7), 1.0), (slice(10, 15), 3.0), (slice(15, 16), 1.0)):
        gap = x[rows] @ w - y[rows]
        loss += weight * np.mean(gap**2)
        slope += weight * 2 * gap @ x[rows] / len(gap)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(parallel.fetch(state.params)["w"], w - 0.1 * slope, rtol=1e-5)


def _both(start):
    """Return a source that goes through a head of its own, as a part on a stream."""
    model, dataset = start

    def term(c):
        label, mask = c.batch["label"], c.batch["mask"]
        return cross_entropy(c.out["other"], label, mask=mask)

    def columns(batch):
        return {"reference": model.apply(model.params, model.stats, batch)[0]["other"]}

    return Part("other", term, {}, columns, ("reference",), Stream(dataset, 0.25))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A job on sentences, and other sentences that are longer."""
    data = tiny.reviews(train=48)
    backbone = tiny.bert(tmp_path_factory.mktemp("tokenizer"), data)
    task = tasks.classification(data["train"], dropout=0.0)
    model = attach(backbone, {"head": task.head}, key=jax.random.key(0))
    model = add_head(model, "other", Linear(2), key=jax.random.key(1))
    encoded = make_datasets(model, data)
    stream = jdata.encode(data["test"], model.backbone.inputs, buckets=(16,))
    plan = tiny.head_then_last(model.groups, ("head",))
    return training.Job(model, "head", task, encoded, plan, 0), _both((model, stream))


def _settings(**options):
    return training.Settings(optax.sgd(0.1), batch_size=16, columns_disk_mib=0, **options)


def _supply(texts, **options):
    job, part = texts
    settings = _settings(**options)
    return supply.make_supply(job, settings, parallel.make_spread("jit"), [part])


def _batches(ready, live, rows=12):
    model = ready.job.model
    feed = supply.feed(ready, live, model.params, model.stats)
    made = feed.batches(0)
    return feed, [next(made) for _ in range(rows)]


def test_a_held_prefix_runs_on_the_rows_of_streams_too(texts):
    ready = _supply(texts)
    head, last = (phase.live for phase in ready.job.plan)
    feed, batches = _batches(ready, head)
    added = {"label", "mask", "index", "stream", "reference"}
    assert set(batches[0]) == {"pooled", *added}
    assert feed.steps_per_epoch == jdata.steps_per_epoch(ready.train, 12)
    assert feed.account["column_mib"] > 0
    batches = _batches(ready, last, 5)[1]
    assert set(batches[0]) == {"hidden_2", "attention_mask", *added}
    model = ready.job.model
    forward = jax.jit(lambda b: model.apply(model.params, model.stats, b)[0])
    raw = {name: view.dataset for name, view in ready.views.items()}
    streams = [(raw["stream 1"], 4)]
    for batch, plain in zip(
        batches, jdata.mixed_batches(raw["train"], streams, 16, seed=0), strict=False
    ):
        assert "input_ids" in plain and "input_ids" not in batch
        one, other = (forward(jax.tree.map(jnp.asarray, b)) for b in (batch, plain))
        for name in ("head", "other"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5)
        rows = batch["stream"] == 1
        np.testing.assert_allclose(batch["reference"][rows], one["other"][rows], atol=1e-5)
        assert not batch["reference"][~rows].any()


def test_where_one_has_no_room_all_are_read_raw(texts):
    job, part = texts
    head = job.plan[0].live
    large = dataclasses.replace(part.stream.dataset, augmented=True)
    part = part._replace(stream=Stream(large, 4), columns=None, column_names=())
    ready = _supply((job, part))
    batches = _batches(ready, head)[1]
    assert "input_ids" in batches[0] and "pooled" not in batches[0]
    assert all("input_ids" in shapes for shapes in supply.ahead(ready, job.model).shapes(head))


def test_a_stream_without_room_has_the_task_read_raw_too(texts):
    job, part = texts
    ready = _supply(texts)
    full = jdata.Store(memory_bytes=0)
    views = {**ready.views, "stream 1": dataclasses.replace(ready.views["stream 1"], store=full)}
    ready = ready._replace(views=views)
    head = job.plan[0].live
    shapes = supply.ahead(ready, job.model).shapes(head)
    batches = _batches(ready, head)[1]
    assert "input_ids" in batches[0] and "pooled" not in batches[0]
    assert {x["input_ids"].shape for x in shapes} == {x["input_ids"].shape for x in batches}


@pytest.mark.parametrize("kind", ["jit", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_run_compiles_nothing_when_a_phase_begins(texts, kind, monkeypatch):
    made, compiled = [], parallel.compiled

    def kept(spread, step):
        made.append(compiled(spread, step))
        return made[-1]

    monkeypatch.setattr(parallel, "compiled", kept)
    job, part = texts
    engine = training.make_engine(job, _settings(parallel=kind), parts=[part])
    events = list(engine.events)
    steps = [event for event in events if event.kind == "step"]
    assert engine.epoch.steps == jdata.steps_per_epoch(job.datasets["train"], 12)
    assert len(steps) == 3 * engine.epoch.steps
    assert all("loss/other" in event.metrics for event in steps)
    assert len(made) == 2 and not any(steps.waits for steps in made)


def test_evaluation_sees_no_stream(texts):
    ready = _supply(texts)
    view = ready.views["validation"]
    model = ready.job.model
    dataset = view(ready.job.plan[0].live, model.params, model.stats)
    assert "stream" not in next(iter(once(dataset)))
    assert ready.views["train"].dataset.derived == ()  # the part's column is the stream's alone
    plain = supply.make_supply(ready.job, _settings(), ready.spread, [])
    figures = [supply.score(r, model.params, model.stats, frozenset()) for r in (ready, plain)]
    assert figures[0] == figures[1]


def test_without_streams_the_batches_are_the_plain_ones(texts):
    job, _ = texts
    ready = supply.make_supply(job, _settings(), parallel.make_spread("jit"), [])
    live = frozenset({*job.model.groups, "head"})
    plain = jdata.batches(job.datasets["train"], 16, seed=0)
    for batch, other in zip(_batches(ready, live)[1], plain, strict=False):
        assert batch.keys() == other.keys()
        for name, column in batch.items():
            np.testing.assert_array_equal(column, other[name])
