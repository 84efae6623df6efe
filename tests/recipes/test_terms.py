"""Penalties as terms, by hand: a backbone that moved by a known step, logits that are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jtl import masks
from jtl.data import batches, encode
from jtl.models.heads import Linear
from jtl.models.model import attach
from jtl.penalties import fisher
from jtl.recipes import terms
from jtl.train.state import Context

LIVE = frozenset({"block_1", "head"})


@pytest.fixture(scope="module")
def start():
    model = attach(tiny.resnet(), {"head": Linear(3)}, key=jax.random.key(0))
    dataset = encode(tiny.digits()["train"], model.backbone.inputs)
    return terms.Start(model, ("head",), LIVE, {"head": dataset}, jax.random.key(1))


def _context(params, refs=None, out=None, batch=None):
    return Context(params, out or {}, batch or {}, refs or {}, jnp.int32(0), jax.random.key(0))


def _moved(model, by):
    backbone = jax.tree.map(lambda leaf: leaf + by, model.params["backbone"])
    return {**model.params, "backbone": backbone}


def test_l2_sp_is_half_the_squared_way_from_the_start(start):
    part = terms.l2_sp(start, weight=3.0)
    backbone = start.model.params["backbone"]
    leaves = sum(leaf.size for leaf in jax.tree.leaves(backbone))
    value, weight = part.term(_context(_moved(start.model, 0.5), part.refs))
    assert float(weight) == 1.0
    assert float(value) == pytest.approx(3.0 * 0.5 * 0.25 * leaves, rel=1e-4)
    assert float(part.term(_context(start.model.params, part.refs))[0]) == 0.0


def test_ewc_weighs_live_leaves_by_the_fisher(start):
    part = terms.ewc(start, weight=10.0, examples=6, chunk=3)
    assert part.name == "ewc_head"
    importance = part.refs["fisher/head"]
    labels = start.model.labels["backbone"]
    live, held = masks.split(importance, masks.mask(labels, LIVE & set(start.model.groups)))
    total = sum(float(leaf.sum()) for leaf in jax.tree.leaves(live))
    assert total > 0 and all(not np.any(leaf) for leaf in jax.tree.leaves(held))
    value, _ = part.term(_context(_moved(start.model, 0.1), part.refs))
    assert float(value) == pytest.approx(10.0 * 0.5 * 0.01 * total, rel=1e-3)
    assert float(part.term(_context(start.model.params, part.refs))[0]) == 0.0


def test_ewc_takes_as_many_examples_as_it_says(start, monkeypatch):
    seen = []

    def counted(log_prob, params, given, **options):
        seen.append(sum(len(labels) for _, labels in given))
        return jax.tree.map(jnp.zeros_like, params)

    monkeypatch.setattr(fisher, "fisher_diagonal", counted)
    for examples in (5, 33, 1000):
        terms.ewc(start, examples=examples)
    assert seen == [5, 33, 40]  # there are no more than 40


def test_kl_is_a_mean_over_real_rows(start):
    part = terms.kl(start, weight=2.0, temperature=1.0)
    reference = jnp.log(jnp.array([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [0.9, 0.05, 0.05]]))
    even = jnp.zeros((3, 3))
    batch = {"mask": jnp.array([True, True, False]), part.column_names[0]: reference}
    total, rows = part.term(_context({}, out={"head": even}, batch=batch))
    first = 0.5 * np.log(1.5) + 0.5 * np.log(0.75)  # KL of (1/2, 1/4, 1/4) to thirds; row 2 is 0
    assert float(rows) == 2.0
    assert float(total) == pytest.approx(2.0 * first, rel=1e-5)


def test_the_reference_column_is_what_the_start_model_gives(start):
    part = terms.kl(start)
    assert part.columns is not None
    batch = next(iter(batches(start.datasets["head"], 8, shuffle=False, stop=1)))
    given = jax.jit(part.columns)(batch)
    model = start.model
    out, _ = jax.jit(functools.partial(model.apply))(model.params, model.stats, batch)
    assert set(given) == set(part.column_names)
    np.testing.assert_allclose(given[part.column_names[0]], out["head"], rtol=1e-5, atol=1e-6)


def test_a_head_must_be_named_where_two_are_kept(start):
    two = start._replace(kept=("head", "other"))
    with pytest.raises(ValueError, match=r"head=None is given; .* brought \['head', 'other'\]"):
        terms.kl(two)
    assert terms.kl(two, head="other").name == "kl_other"
    with pytest.raises(ValueError, match="head='third' is given"):
        terms.kl(two, head="third")
