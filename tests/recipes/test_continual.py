"""Tasks in order: what penalties are handed, scenarios, seeds, borders, and the run folder."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl.recipes import scenario, scratch, sources, tasks, terms
from jtl.recipes.continual import continual
from jtl.recipes.datasets import make_datasets
from jtl.recipes.terms import Part
from jtl.recipes.views import make_view
from jtl.report import record
from jtl.train import phases
from jtl.train.state import Context

SIZES = {"train": 24, "validation": 16, "test": 24}
TEN = tuple(str(digit) for digit in range(10))
SHAPE = {"image_size": 8, "num_channels": 3, "hidden_sizes": [16, 12]}
PLAN = functools.partial(phases.full, rate=1e-2, head_rate=1e-2)
OPTIONS = {
    "plan": functools.partial(PLAN, epochs=1),
    "task": functools.partial(tasks.classification, dropout=0.0),
    "batch_size": 8,
}


@functools.cache
def _backbone():
    return scratch.scratch("mlp", SHAPE)


def _pairs(names=None):
    """Return digits in three tasks of two classes each, with labels 0, 1 or those of `names`."""
    entries = []
    for low in (0, 2, 4):
        data = sources.digits(classes=(low, low + 1), **SIZES)
        if names:
            data = {part: _named(source, low, names) for part, source in data.items()}
        entries.append({"name": f"from_{low}", "data": data})
    return entries


def _named(source, low, names):
    columns = {**source.columns, "label": source.columns["label"] + np.int32(low)}
    return type(source)(columns, names, source.name)


def _watcher(seen, *, weight=0.0):
    """Return a penalty that writes down what it is handed, and pulls all weights to zero."""

    def penalty(start):
        seen.append(start)
        if start.first:
            return None
        number = 0 if start.previous is None else start.previous.refs["number"]

        def term(c):
            moving = sum(jnp.sum(x**2) for x in jax.tree.leaves(c.params["backbone"]))
            return weight * moving, jnp.float32(1.0)

        return Part("watcher", term, {"number": jnp.int32(number + 1)})

    return penalty


def _same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_head_for_each_task_in_two_ways_from_two_seeds(tmp_path, one_device):
    seen, entries = [], _pairs()[:2]
    ways = {"plain": (), "held": (_watcher(seen, weight=10.0),)}
    given = (_backbone(), entries)
    options = {**OPTIONS, "ways": ways, "seeds": (3, 4), "joint": True, "checkpoints": False}
    options["plan"] = functools.partial(PLAN, epochs=2)
    result = continual(*given, folder=tmp_path / "run", **options)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["tasks"] == ["from_0", "from_2"] and result["seeds"] == [3, 4]
    _check_entries(result)
    assert len(seen) == 4 and seen[2].first  # the second seed begins anew
    assert seen[1].kept == ("from_0",) and seen[1].live == {"stem", "block_0", "from_2"}
    assert seen[1].seen == {"from_0": None} and list(seen[1].tasks) == ["from_0"]
    # The first seed starts from the weights that were given, the second draws its own.
    _same(seen[0].model.params["backbone"], _backbone().params)
    kernels = [start.model.params["backbone"]["dense_0"]["kernel"] for start in (seen[0], seen[2])]
    assert not np.array_equal(*kernels)
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(words in page for words in ("held", "from_2", "backward transfer", "all at once"))
    assert not list((tmp_path / "run").rglob("checkpoints"))
    # The head of another task is held, bit for bit.
    predictor = jtl.load(tmp_path / "run")
    assert predictor.classes == {f"from_{low}": (str(low), str(low + 1)) for low in (0, 2)}
    # The model is that of the last way from the first seed.
    heads = [model.params["heads"]["from_0"] for model in (seen[1].model, predictor.model)]
    _same(*heads)
    image = entries[1]["data"]["test"].columns["image"][0]
    (answer,) = predictor.predict([image], head="from_2")
    assert answer.label in ("2", "3")
    assert continual(*given, folder=tmp_path / "run", **options) == result
    with pytest.raises(ValueError, match="another config; seeds: .3, 4. there, .3. asked for"):
        continual(*given, folder=tmp_path / "run", **{**options, "seeds": (3,)})


def _check_entries(result):
    for entry in result["runs"].values():
        tables = [np.array(row["test"], float) for row in entry["seeds"]]
        np.testing.assert_allclose(np.array(entry["matrix"], float), np.mean(tables, axis=0))
        own = [table[-1].mean() for table in tables]
        assert entry["values"]["average"] == pytest.approx(own)
        assert entry["average"] == pytest.approx(np.mean(own))
        assert entry["spread"]["average"] == pytest.approx(np.std(own, ddof=1))
        transfer = [t[1, 0] - t[0, 0] for t in tables]
        assert entry["values"]["backward_transfer"] == pytest.approx(transfer)
        fresh = [row["fresh"]["test"] for row in entry["seeds"]]
        forward = [t[0, 1] - start[1] for t, start in zip(tables, fresh, strict=True)]
        assert entry["values"]["forward_transfer"] == pytest.approx(forward)
        assert all(row["test"] != row["validation"] for row in entry["seeds"])
        assert set(entry["validation"]) == set(entry) - {"validation", "seeds"}
    plain, held = (result["runs"][way]["seeds"][0]["test"] for way in ("plain", "held"))
    assert plain[0] == held[0]  # nothing comes before the first task
    assert plain[1:] != held[1:]
    joint = result["joint"]
    assert joint["average"] == pytest.approx(np.mean([row["test"] for row in joint["seeds"]]))
    assert joint["average"] > 0.8  # all three heads are trained


def _lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_one_head_over_the_classes_of_all_tasks(tmp_path, one_device):
    seen = []
    ways = {"held": (_watcher(seen),)}
    plan = functools.partial(PLAN, epochs=10)
    options = {**OPTIONS, "plan": plan, "scenario": "class", "ways": ways, "checkpoints": False}
    result = continual(_backbone(), _pairs(TEN[:6]), folder=tmp_path / "run", **options)
    _check_starts(seen, tmp_path / "run")
    (row,) = result["runs"]["held"]["seeds"]
    for part in ("test", "validation"):  # of the tasks so far and of the one to come
        scored = np.isfinite(np.array(row[part], float))
        np.testing.assert_array_equal(scored, np.tri(3, 3, 1, bool))
    table = np.array(result["runs"]["held"]["matrix"], float)
    # One head learns the last classes and gives no others: what came before is gone.
    assert table[0, 0] > 0.8 and table[2, :2].max() < 0.1 < table[2, 2]
    assert result["runs"]["held"]["spread"]["average"] is None  # of one seed
    assert jtl.load(tmp_path / "run").classes == {"head": TEN[:6]}


def _check_starts(starts, folder):
    first, second, third = starts
    assert first.first and first.kept == () and first.datasets == {} and first.seen == {}
    assert first.previous is None and first.began is None and first.watched is None
    assert not second.first and second.kept == ("head",) and second.previous is None
    _same(second.began, first.model.params)
    _same(third.began, second.model.params)
    assert int(third.previous.refs["number"]) == 1  # the part before, which this one replaces
    assert [start.seen.get("head") for start in starts] == [None, (0, 1), (0, 1, 2, 3)]
    assert third.kept == ("head",) and list(third.tasks) == ["head"]
    assert set(np.unique(third.datasets["head"].labels)) == {2, 3}  # of the last task alone
    assert third.live == {"stem", "block_0", "head"}
    assert third.model.params["heads"]["head"]["classifier"]["bias"].shape == (6,)
    assert not np.array_equal(jax.random.key_data(second.key), jax.random.key_data(third.key))
    rows = [json.loads(line) for line in _lines(folder / "held" / "seed_0" / "from_2")]
    ended = [row for row in rows if row["kind"] == "phase_end"]
    assert [row["held_bit_equal"] for row in ended] == [True]


def test_tasks_that_share_a_head_share_their_classes(tmp_path):
    for name in ("domain", "class"):
        with pytest.raises(ValueError, match="all tasks share one head; task 'from_0' has .*give"):
            continual(_backbone(), _pairs(), folder=tmp_path / "run", scenario=name)
    with pytest.raises(ValueError, match="scenario 'online' is not known; give one of 'task' "):
        continual(_backbone(), _pairs(), folder=tmp_path / "run", scenario="online")
    twice = [{**entry, "name": "same"} for entry in _pairs()]
    with pytest.raises(ValueError, match="named .*'same', 'same'.*; give at least two"):
        continual(_backbone(), twice, folder=tmp_path / "run")
    with pytest.raises(ValueError, match="penalties are given and ways too"):
        ways = {"plain": ()}
        continual(_backbone(), _pairs(), folder=tmp_path / "x", penalties=(terms.si,), ways=ways)
    with pytest.raises(ValueError, match="ways are .'model'.; .* not 'joint', 'model'"):
        continual(_backbone(), _pairs(), folder=tmp_path / "x", ways={"model": ()})
    with pytest.raises(ValueError, match="seeds are .0, 0.; give at least one, each once"):
        continual(_backbone(), _pairs(), folder=tmp_path / "x", seeds=(0, 0))
    assert not (tmp_path / "run").exists() and not (tmp_path / "x").exists()


def _only(steps):
    """Return plain gradient descent that stops after a number of steps of its own count."""
    return optax.scale_by_schedule(lambda count: jnp.where(count < steps, -1.0, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("carry", [False, True])
def test_the_optimizer_starts_afresh_at_a_border_unless_it_is_carried(tmp_path, carry, one_device):
    # Peers carry Adam's moments and count over the border by accident.
    seen = []
    continual(
        _backbone(),
        _pairs(TEN[:4])[:2],
        folder=tmp_path / "run",
        scenario="class",
        optimizer=_only(3),  # as many as the first task takes
        ways={"way": (_watcher(seen),)},
        carry_optimizer=carry,
        checkpoints=False,
        **OPTIONS,
    )
    after_one = seen[1].model.params["backbone"]
    after_two = jtl.load(tmp_path / "run").model.params["backbone"]
    pairs = zip(jax.tree.leaves(after_one), jax.tree.leaves(after_two), strict=True)
    same = all(np.array_equal(a, b) for a, b in pairs)
    assert same == carry  # a count that was carried has no steps left


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_cut_off(tmp_path, one_device):
    def failing(start):
        if len(start.kept) == 2:
            raise RuntimeError("cut off")
        return penalty(start)

    penalty = functools.partial(terms.si, weight=1.0)
    given = {"ways": {"si": (penalty,)}, "checkpoints": False}
    whole = continual(_backbone(), _pairs(), folder=tmp_path / "whole", **given, **OPTIONS)
    options = {**OPTIONS, "config": {"same": 1}}
    with pytest.raises(RuntimeError, match="cut off"):
        given = {"ways": {"si": (failing,)}}
        continual(_backbone(), _pairs(), folder=tmp_path / "cut", **given, **options)
    cut = tmp_path / "cut" / "si" / "seed_0"
    rows = [len(_lines(cut / name)) for name in ("from_0", "from_2")]
    assert not (cut / "from_4").exists()
    result = continual(
        _backbone(), _pairs(), folder=tmp_path / "cut", ways={"si": (penalty,)}, **options
    )
    own, again = (run["runs"]["si"]["seeds"][0] for run in (whole, result))
    assert own["test"] == again["test"] and own["validation"] == again["validation"]
    models = [jtl.load(tmp_path / name).model.params for name in ("whole", "cut")]
    _same(*models)
    # What was done was not done again: the last row alone may come twice.
    for name, before in zip(("from_0", "from_2"), rows, strict=True):
        assert len(_lines(cut / name)) <= before + 1


def test_all_tasks_at_once_take_each_row_for_its_own_head():
    entries = _pairs()[:2]
    learned = scenario.lessons(entries, "task", tasks.classification)
    model = _model(learned)
    datasets = [make_datasets(model, lesson.sources) for lesson in learned]
    whole = scenario.union([parts["train"] for parts in datasets])
    assert whole.size == 48
    columns = whole.columns(np.array([47, 0, 24]))  # in this order, from both
    assert columns["task"].tolist() == [1, 0, 1]
    for place, (number, row) in enumerate([(1, 23), (0, 0), (1, 0)]):
        one = datasets[number]["train"].columns(np.array([row]))["pixel_values"][0]
        np.testing.assert_array_equal(columns["pixel_values"][place], one)
        assert whole.labels[[47, 0, 24][place]] == datasets[number]["train"].labels[row]
    view = make_view(model, whole, [frozenset(model.heads)], batch_size=16)
    features = view(frozenset(model.heads), model.params, model.stats)
    assert features.columns(np.array([47, 0, 24]))["task"].tolist() == [1, 0, 1]
    assert features is not whole  # a phase of the heads alone reads features
    joint, head, parts = scenario.all_at_once(learned, datasets)
    assert head == "from_0" and parts["validation"].size == 16
    out = {"from_0": jnp.zeros((4, 2)), "from_2": jnp.array([[0.0, jnp.log(3.0)]] * 4)}
    batch = {
        "label": jnp.array([0, 1, 1, 0]),
        "task": jnp.array([0, 1, 1, 1]),
        "mask": jnp.array([True, True, True, False]),
    }
    context = Context({}, out, batch, {}, jnp.int32(0), jax.random.key(0))
    total, weight = joint.term("any")(context)
    # One row of the first head, ln 2; two rows of the second, -ln 3/4 each; one is padding.
    assert float(total) == pytest.approx(np.log(2) + 2 * np.log(4 / 3), rel=1e-6)
    assert float(weight) == 3.0


def _model(learned):
    from jtl.models.model import attach

    heads = {lesson.head: lesson.task.head for lesson in learned}
    return attach(_backbone(), heads, key=jax.random.key(0))


@pytest.mark.slow
def test_a_penalty_changes_what_comes_after_the_first_task(tmp_path):
    penalty = functools.partial(terms.ewc, weight=1e5, examples=24)
    given = (_backbone(), _pairs()[:2])
    options = {**OPTIONS, "penalties": (penalty,), "checkpoints": False}
    options["plan"] = functools.partial(PLAN, epochs=2)
    result = continual(*given, folder=tmp_path / "run", **options)
    plain, held = (np.array(result["runs"][way]["matrix"], float) for way in ("plain", "penalised"))
    np.testing.assert_array_equal(plain[0], held[0])
    assert not np.array_equal(plain[1], held[1])


def test_a_penalty_with_no_share_in_the_gradient_is_named_with_its_way_and_task(
    tmp_path, one_device
):
    seen = []
    ways = {"held": (_watcher(seen, weight=1e-9),)}
    options = {**OPTIONS, "ways": ways, "shares_every": 1, "checkpoints": False}
    result = continual(_backbone(), _pairs()[:2], folder=tmp_path / "run", **options)
    (row,) = result["runs"]["held"]["seeds"]
    assert list(row["penalties"]) == ["from_2"]  # the first task has none
    share = row["penalties"]["from_2"]["penalties"]["watcher"]["share"]
    assert 0 < share["greatest"] < 0.01
    (warning,) = result["warnings"]
    assert warning.startswith("way 'held', task 'from_2': penalty 'watcher' never had more than")


def test_each_task_computes_and_lies_as_it_is_told(tmp_path):
    given = (_backbone(), _pairs()[:2])
    options = {**OPTIONS, "checkpoints": False, "columns_disk_mib": 0}

    def losses(name, **how):
        continual(*given, folder=tmp_path / name, **how, **options)
        rows = record.read_rows(tmp_path / name / "plain" / "seed_0" / "from_2")
        return np.array([row["loss"] for row in rows if row["kind"] == "evaluation"])

    whole = losses("jit")
    assert len(whole)
    np.testing.assert_allclose(losses("fsdp", parallel="fsdp", remat=True), whole, rtol=1e-5)
    for name, how in {"bf16": {"dtype": "bfloat16"}, "ema": {"ema": 0.5}}.items():
        assert 1e-5 < np.abs(losses(name, **how) / whole - 1).max() < 0.3
    with pytest.raises(ValueError, match="batch of 8 rows does not divide over 8 devices in 2"):
        losses("pmap", accumulate=2, parallel="pmap")
