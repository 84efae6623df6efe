"""Replay and A-GEM as parts: the memory over tasks, the right head, the right loss, no leak."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jtl import data as jdata
from jtl.models.heads import Linear
from jtl.models.model import attach
from jtl.recipes import scratch, sources, supply, tasks, terms, training
from jtl.recipes.continual import continual
from jtl.recipes.datasets import make_datasets
from jtl.recipes.streams import own_rows
from jtl.train import parallel, phases
from jtl.train.plan import Phase
from jtl.train.state import Context

PENALTIES = {"replay": terms.replay, "agem": terms.agem}


@pytest.fixture(scope="module")
def images():
    """A model with three heads, the task of each and its training data; row r's pixels say r."""
    source = tiny.digits(train=60)["train"]
    heads = {"a": 3, "b": 3, "n": 1}
    model = attach(tiny.mlp(), {n: Linear(k) for n, k in heads.items()}, key=jax.random.key(0))
    whole = jdata.encode(source, model.backbone.inputs)
    numbers = np.linspace(-1.0, 1.0, 20, dtype=np.float32)
    parts = {
        "a": whole.take(np.arange(20)),
        "b": whole.take(np.arange(20, 40)),
        "n": dataclasses.replace(whole.take(np.arange(40, 60)), labels=numbers, classes=None),
    }
    classes = tasks.classification(source)
    numbered = tiny.with_labels(source, np.linspace(0.0, 1.0, 60, dtype=np.float32), None)
    made = {"a": classes, "b": classes, "n": tasks.regression(numbered)}
    return model, parts, made


def _start(images, names, previous=None, **options):
    model, parts, made = images
    return terms.Start(
        *(model, tuple(names), frozenset({"block_1"}), {names[-1]: parts[names[-1]]}),
        jax.random.key(len(names)),
        previous=previous,
        tasks={name: made[name] for name in names},
        **options,
    )


def _sequence(images, names, penalty=terms.replay, **options):
    """Return the part after these tasks, and the parts before it."""
    part, found = penalty(_first(images)), []
    assert part is None
    for count in range(1, len(names) + 1):
        part = penalty(_start(images, names[:count], part), **options)
        found.append(part)
    return found


def _first(images):
    return terms.Start(images[0], (), frozenset(), {}, jax.random.key(0), first=True)


def _batch(dataset, rows):
    batch = {name: jnp.asarray(x) for name, x in dataset.columns(rows).items()}
    label, mask = jnp.asarray(dataset.labels[rows]), jnp.ones(len(rows), bool)
    return {**batch, "label": label, "mask": mask}


def _value(part, out, batch):
    total, weight = part.term(Context({}, out, batch, {}, jnp.int32(0), jax.random.key(0)))
    return float(total), float(weight)


def test_each_row_goes_through_the_head_of_its_own_task(images):
    """Logits of the wrong heads are NaN: a sum that touches them shows it (avalanche#502)."""
    part = _sequence(images, ["a", "b", "n"], size=9, weight=2.0)[-1]
    dataset = part.stream.dataset
    batch = _batch(dataset, np.arange(9))
    head = np.asarray(batch["replay/head"])
    assert head.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    logits = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    out = {
        name: jnp.where((head == i)[:, None], logits[:, :width], jnp.nan)
        for i, (name, width) in enumerate({"a": 3, "b": 3, "n": 1}.items())
    }
    label = dataset.labels
    chosen = logits[np.arange(6), label[:6].astype(int)]
    entropy = np.log(np.exp(logits[:6]).sum(axis=1)) - chosen
    square = (logits[6:, 0] - label[6:]) ** 2
    total, weight = _value(part, out, batch)
    assert total == pytest.approx(2.0 * (entropy.sum() + square.sum()), rel=1e-5) and weight == 9
    masked = {**batch, "mask": batch["mask"].at[:3].set(False)}
    total, weight = _value(part, out, masked)
    assert total == pytest.approx(2.0 * (entropy[3:].sum() + square.sum()), rel=1e-5)
    assert weight == 6


@pytest.mark.parametrize("choose", ["class_balanced", "reservoir", "herding"])
@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_a_memory_is_shared_evenly_by_the_tasks(images, name, choose):
    found = _sequence(images, ["a", "b", "n"], PENALTIES[name], size=8, choose=choose)
    rows = [_rows(images, part.stream.dataset) for part in found]
    assert [[len(mine) for mine in of_part.values()] for of_part in rows] == [
        [8],
        [4, 4],
        [3, 3, 2],
    ]
    for before, after in zip(rows, rows[1:], strict=False):
        for task, mine in before.items():  # what stays was there, and no row comes twice
            assert after[task] == mine[: len(after[task])] and len(set(mine)) == len(mine)
    assert [part.project for part in found] == [name == "agem"] * 3
    assert [part.name for part in found] == [name] * 3


def _rows(images, dataset):
    """Return {task: row numbers of its training data} of a memory, found by their pixels."""
    found = {}
    for row in range(dataset.size):
        columns = dataset.columns(np.array([row]))
        task = int(columns["replay/task"][0])
        own = list(images[1].values())[task].parts[0]["pixel_values"]
        same = np.flatnonzero((own == columns["pixel_values"]).all(axis=(1, 2, 3)))
        assert len(same) == 1
        found.setdefault(task, []).append(int(same[0]))
    return found


def test_classes_are_balanced_in_what_is_kept(images):
    part = _sequence(images, ["a", "b"], size=12)[-1]
    counts = np.bincount(part.stream.dataset.labels[:6].astype(int), minlength=3)
    assert counts.tolist() == [2, 2, 2]


def test_what_stays_of_a_task_that_was_kept_whole_is_balanced_too(images):
    model, parts, made = images
    order = np.argsort(parts["a"].labels, kind="stable")  # sorted by class, as files often are
    sorted_rows = model, {**parts, "a": parts["a"].take(order)}, made
    part = _sequence(sorted_rows, ["a", "b"], size=20)[-1]
    counts = np.bincount(part.stream.dataset.labels[:10].astype(int), minlength=3)
    assert sorted(counts.tolist()) == [3, 3, 4]


def test_herded_rows_are_those_of_the_start_models_features(images):
    model, parts, _ = images
    part = _sequence(images, ["a"], size=6, choose="herding")[0]
    out, _ = model.apply(model.params, model.stats, dict(parts["a"].parts[0]))
    pooled = np.asarray(out["pooled"])
    pooled = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    label = parts["a"].labels
    for row, kind in zip(_rows(images, part.stream.dataset)[0][:3], range(3), strict=True):
        mine = np.flatnonzero(label == kind)
        far = np.linalg.norm(pooled[mine] - pooled[mine].mean(axis=0), axis=1)
        assert row == mine[far.argmin()]


def test_one_head_shared_by_all_tasks(images):
    model, parts, made = images
    part = None
    for number, name in enumerate(("a", "b", "a"), 1):
        start = terms.Start(
            *(model, ("a",), frozenset(), {"a": parts[name]}, jax.random.key(number)),
            previous=part,
            tasks={"a": made["a"]},
        )
        part = terms.replay(start, size=7)
    dataset = part.stream.dataset
    columns = dataset.columns(np.arange(7))
    assert columns["replay/head"].tolist() == [0] * 7
    assert columns["replay/task"].tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_a_memory_of_images_that_are_read_stays_small_and_in_memory(images):
    model, parts, made = images
    source = tiny.digits(train=60)["train"]
    lazy = jdata.encode(source, model.backbone.inputs, memory_bytes=0)
    start = _start(images, ["a"])._replace(datasets={"a": lazy})
    dataset = terms.replay(start, size=6).stream.dataset
    assert lazy.read is not None and dataset.read is None
    assert dataset.parts[0]["pixel_values"].shape == (6, 16, 16, 3)


def test_data_that_are_given_need_no_task(images):
    model, _, _ = images
    data = {"train": tiny.digits(train=30)["train"]}
    start = terms.Start(model, ("a", "n"), frozenset(), {}, jax.random.key(0))
    part = terms.replay(start, data=data, head="a", rows=2)
    assert part.name == "replay_a" and part.stream.rows == 2 and part.stream.dataset.size == 30
    batch = _batch(part.stream.dataset, np.arange(4))
    out = {"a": jnp.zeros((4, 3)), "n": jnp.full((4, 1), jnp.nan)}
    assert _value(part, out, batch) == (pytest.approx(4 * np.log(3.0), rel=1e-5), 4.0)


def test_what_does_not_fit_is_refused(images):
    model, parts, _ = images
    data = {"train": tiny.digits(train=30)["train"]}
    start = terms.Start(model, ("a", "n"), frozenset(), {}, jax.random.key(0))
    with pytest.raises(ValueError, match="has 1 outputs, is given 3 classes"):
        terms.replay(start, data=data, head="n")
    with pytest.raises(ValueError, match="head=None is given"):
        terms.replay(start, data=data)
    with pytest.raises(ValueError, match="needs examples of the task of head 'a'"):
        terms.replay(start, head="a")
    with pytest.raises(ValueError, match="choose is 'newest'"):
        terms.replay(start, data=data, head="a", choose="newest")
    with pytest.raises(ValueError, match="shared by 3 tasks"):
        _sequence(images, ["a", "b", "n"], size=2)


def _ready(images, names, plan, rows=4, batch_size=16, **options):
    """Return the supply of one more task, "b", after those of the memory."""
    model, _, made = images
    data = tiny.digits(train=40)
    encoded = make_datasets(model, data)
    part = _sequence(images, names, rows=rows, **options)[-1]
    job = training.Job(model, "b", made["b"], encoded, plan, 0)
    settings = training.Settings(optax.sgd(0.1), batch_size=batch_size, columns_disk_mib=0)
    return supply.make_supply(job, settings, parallel.make_spread("jit"), [part]), part


@pytest.mark.parametrize("size", [1, 3, 20])
def test_shapes_are_the_same_whatever_the_size_of_the_memory(images, size):
    model = images[0]
    plan = [Phase("all", dict.fromkeys((*model.groups, "b"), 0.01), epochs=1)]
    ready, _ = _ready(images, ["a"], plan, size=size)
    feed = supply.feed(ready, plan[0].live, model.params, model.stats)
    made = feed.batches(0)
    shapes = {tuple((n, x.shape, str(x.dtype)) for n, x in next(made).items()) for _ in range(8)}
    assert len(shapes) == 1
    ahead = supply.ahead(ready, model).shapes(plan[0].live)
    assert [{(n, x.shape, str(x.dtype)) for n, x in b.items()} for b in ahead] == [
        set(next(iter(shapes)))
    ]
    assert feed.steps_per_epoch == 4  # 40 rows, 12 a batch


def test_a_head_only_phase_reads_derived_columns_of_the_memory_too(images):
    model = images[0]
    plan = [Phase("head", {"b": 0.1}, epochs=1)]
    ready, part = _ready(images, ["a", "n"], plan, size=8)
    feed = supply.feed(ready, plan[0].live, model.params, model.stats)
    batch = next(feed.batches(0))
    added = {"label", "label/1", "mask", "index", "stream", "replay/head", "replay/task"}
    assert set(batch) == {"pooled", *added}
    rows = batch["stream"] == 1
    assert batch["label/1"].dtype == np.float32 and not batch["label"][rows].any()
    # the loss of these rows is that of the raw rows of the memory
    batch = {name: jnp.asarray(column) for name, column in batch.items()}
    out, _ = model.apply(model.params, model.stats, batch)
    context = Context({}, out, batch, {}, jnp.int32(0), jax.random.key(0))
    total, weight = own_rows(part.term, 1)(context)
    assert float(weight) == 4.0 and np.isfinite(float(total))
    raw = jdata.mixed_batches(ready.train, [(part.stream.dataset, 4)], 16, seed=0)
    plain = {name: jnp.asarray(column) for name, column in next(raw).items()}
    out, _ = model.apply(model.params, model.stats, plain)
    other = own_rows(part.term, 1)(context._replace(out=out, batch=plain))
    assert float(total) == pytest.approx(float(other[0]), rel=1e-4)


def test_the_memory_has_rows_of_training_data_alone(images):
    """Validation and test rows are in no batch of the task or of the memory."""
    model = images[0]
    plan = [Phase("all", dict.fromkeys((*model.groups, "b"), 0.01), epochs=1)]
    ready, _ = _ready(images, ["a"], plan)
    made = supply.feed(ready, plan[0].live, model.params, model.stats).batches(0)
    met = {row.tobytes() for _ in range(20) for row in next(made)["pixel_values"]}
    kept = [ready.train, images[1]["a"]]
    known = {row.tobytes() for data in kept for row in data.parts[0]["pixel_values"]}
    held_out = {
        row.tobytes()
        for part in ("validation", "test")
        for row in ready.job.datasets[part].parts[0]["pixel_values"]
    }
    assert met == known and not met & held_out


@pytest.mark.slow
def test_one_head_forgets_old_classes_without_a_memory_and_not_with_one(tmp_path, one_device):
    """Two digits, then two others, in one head: what is plainly lost is kept by few examples."""
    names = ("0", "1", "2", "3")
    entries = []
    for low in (0, 2):
        sizes = {"train": 80, "validation": 16, "test": 40}
        data = sources.digits(classes=(low, low + 1), **sizes)
        parts = {
            p: tiny.with_labels(s, s.columns["label"] + np.int32(low), names)
            for p, s in data.items()
        }
        entries.append({"name": f"from_{low}", "data": parts})
    shape = {"image_size": 8, "num_channels": 3, "hidden_sizes": [32, 16]}
    options = {"rows": 0.5, "size": 20}
    result = continual(
        scratch.scratch("mlp", shape),
        entries,
        folder=tmp_path / "run",
        scenario="class",
        plan=functools.partial(phases.full, rate=1e-2, head_rate=1e-2, epochs=6),
        batch_size=16,
        checkpoints=False,
        ways={
            "plain": (),
            **{name: (functools.partial(p, **options),) for name, p in PENALTIES.items()},
        },
    )
    first = {way: run["matrix"][-1][0] for way, run in result["runs"].items()}
    assert first["replay"] > first["plain"] + 0.5
    assert first["agem"] > first["plain"] + 0.1
