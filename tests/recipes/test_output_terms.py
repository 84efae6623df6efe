"""Penalties on outputs and features as terms, on a toy by hand and on a tiny BERT and MLP."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jtl.data import batches, derive, encode
from jtl.models.heads import Linear, MaskedLM
from jtl.models.model import attach
from jtl.penalties import delta as delta_formula
from jtl.penalties import kl as kl_formula
from jtl.recipes import probe, terms
from jtl.recipes.views import make_view
from jtl.train import parallel
from jtl.train.state import Context, create
from jtl.train.step import make_step

DIM, CLASSES, POSITIONS = 4, 5, 3


def toy_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = {"body": (DIM, DIM), "one": (DIM, 3), "two": (DIM, 2), "lm": (DIM, CLASSES)}
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def toy_apply(params, stats, batch, *, key=None, live=frozenset()):
    tokens = jnp.tanh(jnp.asarray(batch["x"]) @ params["body"])
    real = jnp.asarray(batch["attention_mask"], jnp.float32)[..., None]
    pooled = jnp.sum(tokens * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1.0)
    heads = {"one": pooled @ params["one"], "two": pooled @ params["two"]}
    return {"tokens": tokens, "pooled": pooled, **heads, "lm": tokens @ params["lm"]}, stats


def toy_batch(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    length = rng.integers(1, POSITIONS + 1, rows)
    return {
        "x": rng.normal(size=(rows, POSITIONS, DIM)).astype(np.float32),
        "attention_mask": (np.arange(POSITIONS) < length[:, None]).astype(np.int32),
        "mask": np.arange(rows) % 4 != 3,
    }


def toy_start(kept, **fields):
    family = types.SimpleNamespace(example=lambda config: toy_batch(1))
    model = types.SimpleNamespace(
        params=toy_params(),
        stats={},
        apply=toy_apply,
        heads=dict.fromkeys(("one", "two", "lm")),
        backbone=types.SimpleNamespace(family=family, config={}),
    )
    return terms.Start(model, kept, frozenset({"body"}), {}, jax.random.key(1), **fields)


def context(params, batch, refs=None, apply=toy_apply):
    out, _ = apply(params, {}, batch)
    return Context(params, out, batch, refs or {}, jnp.int32(0), jax.random.key(0))


def taking(part):
    """Return `(params, batch) -> (mean, weight)`, compiled, with the columns of the start model."""

    @jax.jit
    def taken(params, batch):
        return part.term(context(params, {**batch, **part.columns(batch)}, part.refs))

    def mean(params, batch):
        total, weight = map(float, taken(params, batch))
        return total / max(weight, 1.0), weight

    return mean


MAKE = {
    "kl": (functools.partial(terms.kl, head="one"), 6),
    "kl_reverse": (functools.partial(terms.kl, head="two", direction="reverse"), 6),
    "kl_tokens": (functools.partial(terms.kl, head="lm", direction="js", keep=2), "tokens"),
    "lwf": (terms.lwf, 6),
    "features": (terms.features, 6),
    "features_cosine": (functools.partial(terms.features, at="tokens", kind="cosine"), "tokens"),
    "delta": (terms.delta, "tokens"),
}


def made(name, **fields):
    kept = ("one", "two") if name == "lwf" else ("one", "two", "lm")
    return MAKE[name][0](toy_start(kept, **fields))


@pytest.mark.parametrize("name", MAKE)
def test_zero_at_the_start_and_above_it_after_a_move_in_real_rows_alone(name):
    part, batch, start, moved = made(name), toy_batch(), toy_params(), toy_params(1)
    value = taking(part)
    mean, weight = value(start, batch)
    real = batch["attention_mask"].astype(bool) & batch["mask"][:, None]
    assert weight == (real.sum() if MAKE[name][1] == "tokens" else MAKE[name][1])
    assert abs(mean) < 1e-6
    mean, _ = value(moved, batch)
    assert mean > 1e-3
    noisy = {**batch, "x": np.where(real[..., None], batch["x"], np.float32(7.0))}
    assert value(moved, noisy) == (pytest.approx(mean, rel=1e-5), weight)
    assert value(moved, {**batch, "mask": np.zeros(8, bool)}) == (0.0, 0.0)
    assert set(jax.eval_shape(part.columns, batch)) == set(part.column_names)
    assert made(name, first=True) is None, "nothing is to be kept before the first task"


def test_rows_of_the_task_have_no_columns_of_a_stream():
    # There are zeros in their place; they are masked, and give neither loss nor NaN.
    part, batch = made("kl_tokens"), toy_batch()
    columns, moved = jax.jit(part.columns)(batch), toy_params(1)
    term = jax.jit(lambda batch: part.term(context(moved, batch)))
    clean = term({**batch, **columns})
    rows = {n: np.where(batch["mask"][:, None, None], v, 0) for n, v in columns.items()}
    zeroed = term({**batch, **rows})
    np.testing.assert_allclose(zeroed, clean, rtol=1e-6)


def stepped(part, accumulate=1, spread=None):
    """Return parameters and loss after one step on a batch with unequal real rows and tokens."""
    batch = toy_batch(16)
    columns = jax.jit(part.columns)(batch)
    batch |= {name: np.asarray(column) for name, column in columns.items()}
    labels = {name: "body" if name == "body" else "heads" for name in toy_params()}
    step = make_step(
        *(toy_apply, {part.name: part.term}, optax.sgd(1.0), labels, {"body": 0.1}),
        accumulate=accumulate,
    )
    state = create(toy_params(1), {}, optax.sgd(1.0), refs=part.refs, key=jax.random.key(0))
    if spread is None:
        state, metrics = jax.jit(step)(state, batch, jnp.int32(0))
    else:
        call = parallel.compiled(spread, step)
        state, metrics = call(parallel.place(spread, state), parallel.put(spread, batch), 0)
    return jax.device_get((state.params, metrics["loss"], metrics["grad_norm"]))


@pytest.mark.parametrize("name", ["kl_tokens", "lwf"])
def test_microbatches_and_devices_are_one_batch(name):
    part = made(name)
    whole = stepped(part)
    assert float(whole[2]) > 1e-3
    for options in ({"accumulate": 2}, {"accumulate": 2, "spread": parallel.make_spread("data")}):
        found = stepped(part, **options)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, whole
        )


def test_lwf_keeps_every_head():
    # avalanche#1121: tasks were numbers here and strings there, and the loss was 0 in all heads.
    batch, moved = toy_batch(), toy_params(1)
    alone = [
        taking(terms.lwf(toy_start((head,), seen=seen)))(moved, batch)[0]
        for head, seen in (("one", {"one": None}), ("two", {"two": (0, 1)}))
    ]
    assert min(alone) > 1e-3
    both = terms.lwf(toy_start(("one", "two"), seen={"one": None, "two": None}))
    assert both.name == "lwf" and both.column_names == ("lwf/one", "lwf/two")
    assert taking(both)(moved, batch)[0] == pytest.approx(sum(alone), rel=1e-5)
    with pytest.raises(
        ValueError, match=r"classes that head 'two' .* given for \[\"'one'\", '2'\]"
    ):
        terms.lwf(toy_start(("one", "two"), seen={"one": None, 2: (0, 1)}))


def test_lwf_by_hand_with_temperature_squared():
    part = terms.lwf(toy_start(("two",)), weight=3.0)
    reference, ours = jnp.log(jnp.array([[0.5, 0.5]] * 2)), jnp.log(jnp.array([[0.8, 0.2]] * 2))
    batch = {"mask": jnp.array([True, False]), "lwf/two": reference}
    c = Context({}, {"two": ours}, batch, {}, jnp.int32(0), jax.random.key(0))
    # at T = 2 the probabilities are 2/3 and 1/3
    expected = 3 * 4 * (0.5 * np.log(0.5 / (2 / 3)) + 0.5 * np.log(0.5 / (1 / 3)))
    total, rows = jax.jit(part.term)(c)
    assert float(total) == pytest.approx(expected, rel=1e-5) and float(rows) == 1.0


@pytest.mark.parametrize("penalty", [terms.lwf, functools.partial(terms.kl, head="one")])
def test_a_shared_head_is_compared_on_the_old_classes_alone(penalty):
    part, batch = penalty(toy_start(("one",), seen={"one": (2, 0)})), toy_batch()
    columns = jax.jit(part.columns)(batch)
    assert [column.shape for column in columns.values()] == [(8, 2)]
    apply, first, moved = jax.jit(toy_apply), toy_params(), toy_params(1)
    c = context(moved, {**batch, **columns}, apply=apply)
    old = [
        value[:, np.array([2, 0])] for value in (c.out["one"], apply(first, {}, batch)[0]["one"])
    ]
    mask = jnp.asarray(batch["mask"])
    expected = jax.jit(lambda ours, theirs: kl_formula.kl(ours, theirs, temperature=2.0, mask=mask))
    expected = expected(*old)
    call = lambda logits: part.term(c._replace(out={"one": logits}))[0]  # noqa: E731
    total, gradient = jax.jit(jax.value_and_grad(call))(c.out["one"])
    assert float(total) == pytest.approx(6 * float(expected), rel=1e-5)
    assert np.all(gradient[:, 1] == 0) and np.any(gradient[:, 0] != 0)


def test_heads_that_cannot_be_compared_are_errors():
    regression = types.SimpleNamespace(kind="regression")
    for penalty in (terms.lwf, functools.partial(terms.kl, head="two")):
        with pytest.raises(
            ValueError, match="head 'two' has 2 outputs, of a task of kind regression"
        ):
            penalty(toy_start(("two",), tasks={"two": regression}))
        with pytest.raises(ValueError, match="head 'two' has 1 outputs"):
            penalty(toy_start(("two",), seen={"two": (1,)}))
    with pytest.raises(
        ValueError, match=r"heads \['lm'\] of \['lm', 'one'\] give outputs for each"
    ):
        terms.lwf(toy_start(("one", "lm")))
    with pytest.raises(ValueError, match="lwf keeps to a trained head"):
        terms.lwf(toy_start(()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (functools.partial(terms.kl, head="lm", keep=9), "k=9 classes .* there are 5"),
        (functools.partial(terms.kl, head="lm", direction="up"), "direction 'up' is not known"),
        (functools.partial(terms.kl, head="lm", temperature=0.0), "take T > 0"),
        (functools.partial(terms.features, kind="l1"), "kind 'l1' of feature distance"),
        (functools.partial(terms.features, at="hidden_2"), r"take one of \['pooled', 'tokens'\]"),
        (functools.partial(terms.delta, at="one"), "at='one' is not among the features"),
    ],
)
def test_options_are_checked_when_the_part_is_made(call, message):
    with pytest.raises(ValueError, match=message):
        call(toy_start(("one", "lm")))
    with pytest.raises(ValueError, match="take T > 0"):
        terms.lwf(toy_start(("one",)), temperature=-1.0)


def test_features_and_delta_by_hand():
    part, uniform = made("features"), made("delta")
    batch = {"mask": jnp.array([True, True, False])}
    pooled = jnp.zeros((3, DIM)).at[0].set(2.0).at[2].set(jnp.nan)
    batch |= {part.column_names[0]: jnp.zeros((3, DIM))}
    c = Context({}, {"pooled": pooled}, batch, {}, jnp.int32(0), jax.random.key(0))
    assert float(part.term(c)[0]) == 0.5 * DIM * 4 and float(part.term(c)[1]) == 2.0
    tokens = jnp.zeros((1, 2, DIM)).at[0, 0, 1].set(2.0)
    batch = {"mask": jnp.array([True]), uniform.column_names[0]: jnp.zeros((1, 2, DIM))}
    c = Context({}, {"tokens": tokens}, batch, uniform.refs, jnp.int32(0), jax.random.key(0))
    assert float(uniform.term(c)[0]) == 4 / DIM and float(uniform.term(c)[1]) == 2.0


@pytest.fixture(scope="module")
def images():
    model = attach(tiny.mlp(), {"head": Linear(3)}, key=jax.random.key(0))
    return terms.Start(model, (), frozenset({"block_1", "head"}), {}, jax.random.key(1))


def test_delta_weighs_a_channel_by_what_the_probe_loses_without_it(images):
    data = tiny.digits()
    part = terms.delta(images, at="pooled", data=data, examples=40, strength=0.01)
    dataset = encode(data["train"], images.model.backbone.inputs)
    batch = next(iter(batches(dataset, 40, shuffle=False, stop=1)))
    out, _ = jax.jit(images.model.apply)(images.model.params, images.model.stats, batch)
    pooled, labels = np.asarray(out["pooled"]), batch["label"]
    fitted = probe.fit_probe(
        *(pooled, labels),
        outputs=3,
        choose=lambda logits: 0.0,
        validation=pooled,
        strengths=(0.01,),
    )

    def loss(features):
        scores = jax.nn.log_softmax(jnp.asarray(fitted(features)))
        return -float(np.mean(np.asarray(scores)[np.arange(40), labels]))

    gone = [loss(np.where(np.arange(pooled.shape[1]) == c, 0, pooled)) for c in range(8)]
    expected = delta_formula.channel_weights(jnp.array(gone), jnp.float32(loss(pooled)), spread=0.2)
    assert pooled.shape[1] == 8 and np.ptp(gone) > 1e-3
    np.testing.assert_allclose(part.refs["delta_pooled"], expected, rtol=1e-3)
    uniform = terms.delta(images, at="pooled").refs["delta_pooled"]
    np.testing.assert_allclose(uniform, 1 / 8)
    assert np.ptp(part.refs["delta_pooled"]) > 0.01


def test_a_phase_whose_prefix_is_held_still_has_the_columns(images):
    parts = [terms.features(images, at="pooled"), terms.delta(images, at="tokens")]
    dataset = encode(tiny.digits()["train"], images.model.backbone.inputs)
    both = jax.jit(lambda batch: {**parts[0].columns(batch), **parts[1].columns(batch)})
    names = [name for part in parts for name in part.column_names]
    dataset = derive(dataset, 40, both, names=names)
    model, head = images.model, frozenset({"head"})
    held = make_view(model, dataset, [head], batch_size=40)(head, model.params, model.stats)
    batch = jax.tree.map(jnp.asarray, next(iter(batches(held, 8, stop=1))))
    assert "pixels" not in batch and "pooled" in batch
    out, _ = model.apply(model.params, model.stats, batch)
    for part in parts:
        c = Context(model.params, out, batch, part.refs, jnp.int32(0), jax.random.key(0))
        assert float(part.term(c)[0]) == pytest.approx(0.0, abs=1e-9)
        assert float(part.term(c)[1]) == 8.0


@pytest.fixture(scope="module")
def reviews():
    return tiny.reviews(train=12)


@pytest.fixture(scope="module")
def language(tmp_path_factory, reviews):
    backbone = tiny.bert(tmp_path_factory.mktemp("words"), reviews, num_hidden_layers=1)
    head = MaskedLM(backbone.dim, backbone.config["vocab_size"])
    model = attach(backbone, {"lm": head, "label": Linear(2)}, key=jax.random.key(0))
    return terms.Start(model, ("lm",), frozenset({"block_0"}), {}, jax.random.key(1))


def test_kl_of_a_language_model_over_the_likeliest_words(language, reviews):
    model = language.model
    dataset = encode(reviews["train"], model.backbone.inputs)
    batch = next(iter(batches(dataset, 8, shuffle=False, stop=1)))
    tokens = batch["attention_mask"].astype(bool) & batch["mask"][:, None]
    words = model.backbone.config["vocab_size"]
    assert 0 < tokens.sum() < tokens.size and words > 100
    body = jax.tree.map(lambda leaf: 1.1 * leaf, model.params["backbone"])
    apply = jax.jit(model.apply)
    start, out = (
        apply({**model.params, "backbone": part}, {}, batch)[0]
        for part in (model.params["backbone"], body)
    )
    full = jax.jit(kl_formula.kl)(out["lm"], start["lm"], mask=jnp.asarray(tokens))
    found, size = {}, {}
    for keep in (8, words):
        part = terms.kl(language, temperature=1.0, keep=keep)
        columns, term = jax.jit(part.columns)(batch), jax.jit(part.term)
        size[keep] = sum(column.nbytes for column in columns.values())
        c = Context({}, start, {**batch, **columns}, {}, jnp.int32(0), jax.random.key(0))
        assert float(term(c)[0]) == pytest.approx(0.0, abs=1e-3)
        total, weight = term(c._replace(out=out))
        assert float(weight) == tokens.sum()
        found[keep] = float(total) / float(weight)
    assert found[words] == pytest.approx(float(full), rel=1e-3)
    assert 1e-4 < found[8] < found[words]
    assert size[8] == 4 * tokens.size * 17, "9 log-probabilities and 8 words in place of all words"


def test_kl_on_other_data_brings_a_stream(language, reviews):
    own = terms.kl(language, keep=4)
    part = terms.kl(language, keep=4, data={"train": reviews["validation"]}, rows=3)
    assert own.stream is None and own.name == "kl_lm" and part.name == "kl_lm_stream"
    assert part.stream.rows == 3 and part.stream.dataset.size == reviews["validation"].size
    assert not set(own.column_names) & set(part.column_names)
    batch = next(iter(batches(part.stream.dataset, 4, shuffle=False, stop=1)))
    assert set(jax.eval_shape(part.columns, batch)) == set(part.column_names)
