"""Penalties that need the step: what they are made from, and how a run takes them."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jtl import masks, trees
from jtl.models.heads import Linear
from jtl.models.model import attach
from jtl.penalties.si import PathIntegral
from jtl.recipes import tasks, terms
from jtl.recipes.datasets import make_datasets
from jtl.recipes.optimizers import adamw
from jtl.recipes.training import Job, Settings, make_engine
from jtl.train.state import Context

LIVE = frozenset({"block_1", "old", "new"})


@pytest.fixture(scope="module")
def model():
    heads = {"old": Linear(3), "new": Linear(3)}
    return attach(tiny.mlp(), heads, key=jax.random.key(0))


def start_of(model, **changes):
    return terms.Start(model, ("old",), LIVE, {}, jax.random.key(1), **changes)


def context(params, refs):
    return Context(params, {}, {}, refs, jnp.int32(0), jax.random.key(0))


def watched(model, live, value):
    chosen, _ = masks.split(model.params, masks.mask(model.labels, live))
    return PathIntegral(jax.tree.map(lambda p: jnp.full(p.shape, value), chosen))


def lowered(model, by):
    return jax.tree.map(lambda p: p - by, model.params)


def test_before_the_first_task_it_only_watches(model):
    part = terms.si(start_of(model, first=True))
    assert part.term is None and part.refs == {} and part.watch is not None


def test_without_a_path_it_says_where_one_is(model):
    with pytest.raises(ValueError, match="needs the path of the steps.*continual.*ewc"):
        terms.si(start_of(model))


def test_the_value_by_hand(model):
    # omega 0.3 over a way of 0.5 with damping 0.05: importance 1. Then 0.1 from the anchor.
    first = start_of(model, watched=watched(model, LIVE, 0.3), began=lowered(model, 0.5))
    part = terms.si(first, weight=2.0, damping=0.05)
    assert part.term is not None
    assert float(part.term(context(model.params, part.refs))[0]) == 0.0
    moved = jax.tree.map(lambda p: p + 0.1, model.params)
    value, weight = part.term(context(moved, part.refs))
    labels = model.labels
    own = masks.mask(labels, {"block_1", "old"})  # not the fresh head's, which has no past
    numbers = sum(leaf.size for leaf in jax.tree.leaves(masks.split(model.params, own)[0]))
    assert float(weight) == 1.0
    assert float(value) == pytest.approx(2.0 * 0.01 * numbers, rel=1e-4)


def test_importance_adds_up_and_the_anchor_moves_on(model):
    ways = {"damping": 0.05}
    first = start_of(model, watched=watched(model, LIVE, 0.3), began=lowered(model, 0.5))
    one = terms.si(first, **ways)
    # The second task moved another block and the head: what it did not touch keeps the first's.
    later = start_of(
        model, watched=watched(model, {"block_0", "old"}, 0.6), began=lowered(model, 0.5)
    )._replace(previous=one)
    two = terms.si(later, **ways)
    found = masks.count(two.refs["si/importance"], _like(two.refs["si/importance"], model.labels))
    assert set(found) == {"block_0", "block_1", "old", "new"}
    mean = _means(two.refs["si/importance"], model.labels)
    assert mean == pytest.approx({"block_0": 2.0, "block_1": 1.0, "old": 3.0, "new": 1.0}, rel=1e-5)
    anchored = _means(two.refs["si/anchor"], model.labels)
    assert set(anchored) == {"block_1", "old"}, "what moves now and was there before"
    trees.check_structure(model.params, two.refs["si/anchor"], "anchor")


def _like(tree, labels):
    return jax.tree.map(
        lambda leaf, label: None if leaf is None else label,
        *(tree, labels),
        is_leaf=lambda x: x is None,
    )


def _means(tree, labels):
    found = {}
    names, leaves = jax.tree.leaves(_like(tree, labels)), jax.tree.leaves(tree)
    for label, leaf in zip(names, leaves, strict=True):
        found.setdefault(label, []).append(np.asarray(leaf).reshape(-1))
    return {label: float(np.concatenate(parts).mean()) for label, parts in found.items()}


# In a run


@pytest.fixture(scope="module")
def job(model):
    data = tiny.digits()
    task = tasks.classification(data["train"])
    datasets = make_datasets(model, data)
    return Job(model, "new", task, datasets, tiny.everything(model.groups, ("new",)), 0)


def events(job, parts, **changes):
    settings = Settings(adamw(), **{"batch_size": 8, **changes})
    return list(make_engine(job, settings, parts=parts).events)


def test_a_run_hands_on_what_it_watched(job, model):
    begin = start_of(model, first=True)
    last = events(job, [terms.si(begin)])[-1].state
    moved = {label for label, mean in _means(last.watch.omega, model.labels).items() if mean}
    assert moved == set(model.groups) | {"new"}, "the kept head is held, and not watched"
    live = frozenset({*model.groups, "new"})
    after = terms.Start(model, ("new",), live, {}, begin.key, began=model.params)
    params = jax.tree.map(np.asarray, last.params)
    after = after._replace(model=_with(model, params), watched=last.watch)
    part = terms.si(after, weight=10.0)
    second = events(job._replace(model=after.model), [part], shares_every=2)
    kinds = [event.kind for event in second]
    assert kinds.count("shares") == 3  # of 5 steps: the first, third and fifth
    steps = [event.metrics for event in second if event.kind == "step"]
    assert steps[0]["loss/si"] == 0.0 and steps[-1]["loss/si"] > 0.0
    shares = [event.metrics for event in second if event.kind == "shares"]
    assert shares[0]["share/si"] == 0.0 and 0.0 < shares[-1]["share/si"] < 1.0


def _with(model, params):

    return dataclasses.replace(model, params=params)


def against(c):
    """A term that is the task's with the opposite sign: their gradients disagree."""
    logits = c.out["new"]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), c.batch["label"][:, None], 1)[:, 0]
    rows = c.batch["mask"].astype(jnp.float32)
    return jnp.sum(rows * picked), jnp.sum(rows)


def test_a_reference_part_projects_and_is_no_part_of_the_loss(job):
    part = terms.Part("memory", against, {}, project=True)
    found = events(job, [part], shares_every=2)
    steps = [dict(event.metrics) for event in found if event.kind == "step"]
    for row in steps:
        assert row["loss"] == row["loss/classification"] and row["loss/memory"] < 0
        assert row["grad_norm"] < 1e-4, "the opposite of the reference is all projected away"
    shares = next(event.metrics for event in found if event.kind == "shares")
    assert shares["share/classification"] == 1.0 and shares["grad_norm/memory"] > 0.1


def test_two_that_watch_or_project_or_bear_one_name_are_refused(job, model):
    watches = terms.si(start_of(model, first=True))
    with pytest.raises(ValueError, match=r"\['si', 'other'\] all watch the updates"):
        make_engine(job, Settings(adamw(), 8), parts=[watches, watches._replace(name="other")])
    memory = terms.Part("memory", against, {}, project=True)
    with pytest.raises(ValueError, match=r"\['memory', 'other'\] all project the gradient"):
        make_engine(job, Settings(adamw(), 8), parts=[memory, memory._replace(name="other")])
    with pytest.raises(ValueError, match=r"\['memory'\] come twice"):
        make_engine(job, Settings(adamw(), 8), parts=[memory._replace(project=False)] * 2)


def test_under_pmap_the_shares_are_those_of_one_program(job, model):
    part = terms.l2_sp(start_of(model)._replace(live=frozenset({*model.groups, "new"})))
    found = {
        kind: next(e.metrics for e in each_event(job, part, kind) if e.kind == "shares")
        for kind in ("data", "pmap")
    }
    assert found["pmap"]["grad_norm/classification"] > 0
    assert dict(found["pmap"]) == pytest.approx(dict(found["data"]), rel=1e-4)


def each_event(job, part, kind):
    settings = Settings(adamw(), 8, parallel=kind, shares_every=100)
    engine = make_engine(job, settings, parts=[part])
    with contextlib.closing(engine.events):
        yield from engine.events
