"""Penalties as terms, by hand: a backbone that moved by a known step, logits that are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jtl.data import batches, encode
from jtl.models.heads import Linear
from jtl.models.model import add_head, attach
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
    model = add_head(start.model, "other", Linear(2), key=jax.random.key(2))
    two = start._replace(model=model, kept=("head", "other"))
    with pytest.raises(ValueError, match=r"head=None is given; .* brought \['head', 'other'\]"):
        terms.kl(two)
    assert terms.kl(two, head="other").name == "kl_other"
    with pytest.raises(ValueError, match="head='third' is given"):
        terms.kl(two, head="third")


@pytest.mark.parametrize("penalty", [terms.ewc, terms.replay])
def test_data_of_other_classes_than_the_heads_are_refused(start, penalty):
    named = start._replace(datasets={}, classes={"head": ("2", "1", "0")})
    with pytest.raises(ValueError, match=r"data of the classes \['0', '1', '2'\], and head 'head'"):
        penalty(named, data=tiny.digits())


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "penalty",
    [
        *(terms.l2_sp, terms.ewc, terms.mas, terms.si, terms.kl, terms.lwf),
        *(terms.delta, terms.features, terms.replay),
    ],
)
def test_a_weight_that_drives_away_is_refused(start, penalty, weight):
    with pytest.raises(ValueError, match=r"has weight .*; a penalty is added to the loss"):
        penalty(start, weight=weight)
