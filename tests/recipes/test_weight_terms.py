"""Penalties on weights as terms, by hand: a model that moved by a known step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jtl.data import encode, plan
from jtl.models.heads import Linear
from jtl.models.model import attach
from jtl.penalties import fisher
from jtl.penalties import mas as mas_formula
from jtl.recipes import terms
from jtl.train.state import Context

LIVE = frozenset({"block_1", "old", "new"})
PENALTIES = {"l2_sp": terms.l2_sp, "ewc": terms.ewc, "mas": terms.mas}


@pytest.fixture(scope="module")
def model():
    return attach(tiny.mlp(), {"old": Linear(3), "new": Linear(3)}, key=jax.random.key(0))


@pytest.fixture(scope="module")
def dataset(model):
    return encode(tiny.digits()["train"], model.backbone.inputs)


@pytest.fixture(scope="module")
def start(model, dataset):
    return terms.Start(model, ("old",), LIVE, {"old": dataset}, jax.random.key(1))


@pytest.fixture
def known(monkeypatch):
    """Let the importance be a constant, which the test may set, in place of what it costs."""
    constant = [2.0]

    def of(function, params, given, *, mask, **options):
        of.rows = [len(jax.tree.leaves(batch)[0]) for batch in given]
        of.options = options
        fill = lambda keep, leaf: jnp.full(leaf.shape, constant[0]) if keep else None  # noqa: E731
        return jax.tree.map(fill, mask, params)

    monkeypatch.setattr(fisher, "fisher_diagonal", of)
    monkeypatch.setattr(mas_formula, "output_importance", of)
    of.constant = constant
    return of


def _value(part, params):
    context = Context(params, {}, {}, part.refs, jnp.int32(0), jax.random.key(0))
    value, weight = part.term(context)
    assert float(weight) == 1.0
    return float(value)


def _moved(params, by):
    return jax.tree.map(lambda leaf: leaf + by, params)


def _size(model, labels):
    leaves = jax.tree.map(
        lambda leaf, label: leaf.size if label in labels else 0, model.params, model.labels
    )
    return sum(jax.tree.leaves(leaves))


def test_they_cover_what_moves_and_was_trained_before(start, known):
    size = _size(start.model, {"block_1", "old"})
    shared = _size(start.model, {"old"})
    assert 0 < shared < size
    # 1/2 of L2-SP and of EWC, none of MAS; the importance is 2
    factors = {"l2_sp": 3.0 * 0.5, "ewc": 3.0 * 0.5 * 2.0, "mas": 3.0 * 2.0}
    for name, penalty in PENALTIES.items():
        part = penalty(start, weight=3.0)
        assert part.name == name
        params = _moved(start.model.params, 0.5)
        assert _value(part, params) == pytest.approx(factors[name] * 0.25 * size, rel=1e-4)
        assert _value(part, start.model.params) == 0.0
        slopes = jax.grad(lambda p, part=part: _term(part, p))(params)
        touched = jax.tree.map(lambda g: bool(np.any(g)), slopes)
        assert touched == jax.tree.map(
            lambda label: label in {"block_1", "old"}, start.model.labels
        )


def _term(part, params):
    return part.term(Context(params, {}, {}, part.refs, jnp.int32(0), jax.random.key(0)))[0]


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_before_the_first_task_there_is_nothing_to_keep(start, penalty):
    assert penalty(start._replace(first=True, kept=(), datasets={})) is None


def test_what_a_term_reads_is_in_refs_in_float32_and_has_no_more_leaves_than_it_covers(
    start, known
):
    covered = sum(label in {"block_1", "old"} for label in jax.tree.leaves(start.model.labels))
    trees = {"l2_sp": 1, "ewc": 2, "mas": 2}
    for name, penalty in PENALTIES.items():
        leaves = jax.tree.leaves(penalty(start).refs)
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
        assert sum(1 for leaf in leaves if leaf.ndim) == trees[name] * covered


def test_importance_of_a_head_by_hand_in_evaluation_mode(start, dataset):
    # Softmax regression on the pooled features h: E (1[y = c] - p_c)^2 = p_c (1 - p_c), times h^2.
    model = attach(tiny.resnet(), {"old": Linear(3)}, key=jax.random.key(0))  # it has statistics
    stats = jax.tree.map(lambda leaf: leaf + 0.3, model.stats)
    begin = start._replace(model=dataclasses.replace(model, stats=stats))
    rows = np.concatenate([np.asarray(rows) for rows in plan(dataset, dataset.size)])
    out, _ = jax.jit(model.apply)(model.params, stats, dataset.columns(rows))
    logits, features = np.asarray(out["old"]), np.asarray(out["pooled"])
    p = np.asarray(jax.nn.softmax(logits))
    found = terms.ewc(begin, labels="exact", examples=1000).refs["ewc/fisher"]["heads"]["old"]
    np.testing.assert_allclose(found["classifier"]["bias"], (p * (1 - p)).mean(0), rtol=1e-4)
    expected = (features**2).T @ (p * (1 - p)) / len(rows)
    np.testing.assert_allclose(found["classifier"]["kernel"], expected, rtol=1e-4)
    found = terms.mas(begin, examples=1000).refs["mas/importance"]["heads"]["old"]["classifier"]
    np.testing.assert_allclose(found["bias"], np.abs(2 * logits).mean(0), rtol=1e-4)
    expected = np.abs(features).T @ np.abs(2 * logits) / len(rows)
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-4)


def test_they_take_as_many_examples_as_they_say(start, known):
    for examples, rows in ((5, 5), (33, 33), (1000, 40)):  # there are no more than 40
        terms.ewc(start, examples=examples)
        assert sum(known.rows) == rows
        terms.mas(start, examples=examples, chunk=7)
        assert sum(known.rows) == rows and known.options["chunk"] == 7


def _two_tasks(start, known, penalty, **options):
    """Return the part after two tasks that share a head: importance 2, then 6, 1 apart."""
    known.constant[0] = 2.0
    first = penalty(start, **options)
    params = _moved(start.model.params, 1.0)
    known.constant[0] = 6.0
    later = dataclasses.replace(start.model, params=params)
    return penalty(start._replace(model=later, previous=first), **options)


def test_separate_tasks_are_the_sum_of_their_penalties(start, known):
    size = _size(start.model, {"block_1", "old"})
    part = _two_tasks(start, known, terms.ewc, weight=1.0)
    for by in (0.0, 1.0, 3.0):
        expected = 0.5 * size * (2.0 * by**2 + 6.0 * (by - 1.0) ** 2)
        assert _value(part, _moved(start.model.params, by)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["ewc", "mas"])
def test_online_importance_decays_and_the_newest_anchor_holds(start, known, name):
    size = _size(start.model, {"block_1", "old"})
    options = {"form": "online"} if name == "ewc" else {}
    part = _two_tasks(start, known, PENALTIES[name], weight=1.0, decay=0.5, **options)
    factor = (0.5 if name == "ewc" else 1.0) * (0.5 * 2.0 + 6.0)
    moved = _moved(start.model.params, 3.0)
    assert _value(part, moved) == pytest.approx(factor * size * 4.0, rel=1e-4)
    assert _value(part, _moved(start.model.params, 1.0)) == pytest.approx(0.0, abs=1e-3)


def test_the_importance_of_a_second_task_is_of_its_own_head_alone(start, known, dataset):
    first = terms.ewc(start, weight=1.0)
    assert first is not None
    live = start.live - {"old", "new"}
    # both heads are held and kept; the recipe has the data of the last task
    both = start._replace(kept=("old", "new"), live=live, datasets={"new": dataset}, previous=first)
    refs = terms.ewc(both, weight=1.0).refs
    block = refs["ewc/fisher"]["backbone"]["dense_2"]
    assert {float(leaf.max()) for leaf in jax.tree.leaves(block)} == {4.0}  # 2 and 2
    known.constant[0] = 1.0
    heads = start._replace(kept=("old", "new"), datasets={"old": dataset, "new": dataset})
    part = terms.mas(heads, weight=1.0)
    assert float(part.refs["mas/importance"]["heads"]["new"]["classifier"]["bias"][0]) == 2.0


@pytest.mark.parametrize("name", ["ewc", "mas"])
def test_penalties_of_two_heads_in_one_run_read_their_own_importance(start, known, dataset, name):
    both = start._replace(kept=("old", "new"), datasets={"old": dataset, "new": dataset})
    parts = []
    for head, importance in {"old": 2.0, "new": 5.0}.items():
        known.constant[0] = importance
        parts.append(PENALTIES[name](both, weight=1.0, head=head))
    assert [part.name for part in parts] == [f"{name}_old", f"{name}_new"]
    refs = {key: value for part in parts for key, value in part.refs.items()}
    params = _moved(start.model.params, 1.0)
    values = [_value(part._replace(refs=refs), params) for part in parts]
    assert values[1] == pytest.approx(2.5 * values[0], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "options", "words"),
    [
        ("ewc", {}, {"form": "both"}, "form 'both' is not known"),
        ("ewc", {}, {"decay": 0.5}, "decay=0.5 is of the online form"),
        ("ewc", {}, {"form": "online", "decay": 0.0}, "take a number above 0"),
        ("mas", {}, {"decay": 1.5}, "and at most 1"),
        ("ewc", {"datasets": {}}, {}, "ewc needs examples of the task of head 'old'"),
        ("mas", {"kept": ()}, {}, r"mas keeps to a trained head, .* brought \[\]"),
        ("mas", {"kept": ("old", "new"), "datasets": {}}, {}, "head=None is given"),
        ("ewc", {}, {"head": "third"}, "head='third' is given"),
    ],
)
def test_bad_input(start, name, changes, options, words):
    with pytest.raises(ValueError, match=words):
        PENALTIES[name](start._replace(**changes), **options)


def test_a_head_of_one_number_has_no_classes(start, dataset):
    model = attach(tiny.mlp(), {"old": Linear(1)}, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"head 'old' gives \(1,\)"):
        terms.ewc(start._replace(model=model))
