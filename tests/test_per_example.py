"""Against gradients that are formed one example after the other, for every way to use a weight."""

import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import masks, per_example
from jtl.per_example import gradient_moment

RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((7, 6)).astype(np.float32)
SEQUENCES = RNG.standard_normal((7, 4, 6)).astype(np.float32)
IMAGES = RNG.standard_normal((7, 5, 5, 2)).astype(np.float32)
TOKENS = RNG.integers(0, 5, (7, 4))


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape).astype(np.float32))


def dense(p, x):
    return x @ p["kernel"] + jnp.broadcast_to(p["bias"], (*x.shape[:-1], len(p["bias"])))


def layer(rows, columns):
    return {"kernel": normal(rows, columns), "bias": normal(columns)}


def mlp(p, x):
    for name in ("first", "second"):
        x = jax.nn.gelu(dense(p[name], x))
    return dense(p["last"], x)


def batch_of_one(p, x):
    return mlp(p, x[None])[0]


def called(p, x):
    inner = jax.jit(dense)
    return inner(p["last"], jax.nn.relu(inner(p["first"], x)))


def shared(p, x):
    hidden = jnp.tanh(x @ p["square"])
    return dense(p["last"], hidden @ p["square"] + hidden)


def tied(p, x):
    return p["square"].T @ jnp.tanh(p["square"] @ x)


def scanned(p, x):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["square"]), None), x, None, length=3)[0]


def rematerialised(p, x):
    return dense(p["last"], jax.checkpoint(lambda p, x: jnp.tanh(dense(p, x)))(p["first"], x))


def conditional(p, x):
    return jax.lax.cond(x[0] > 0, lambda: dense(p["last"], x), lambda: x[:3] * 2.0)


def laid_out(p, x):
    heads = jnp.einsum("hdi,i->hd", p["heads"], x)
    return p["across"].T.reshape(3, 2, 4) @ heads.reshape(-1) @ jnp.ones(2)


def by_group(p, x):
    return jnp.einsum("gio,gi->go", p["groups"], x.reshape(2, 3)).reshape(-1)


def normed(p, x):
    x = (x - x.mean()) / jnp.sqrt(x.var() + 1e-6) * p["scale"] + p["shift"]
    return dense(p["last"], x)


def with_positions(p, x):
    return dense(p["last"], jax.nn.relu(dense(p["first"], x)).mean(0))


def embedded(p, ids):
    return dense(p["last"], jnp.take(p["table"], ids, axis=0).sum(0))


def convolved(p, x):
    out = jax.lax.conv_general_dilated(
        x[None], p["filter"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return dense(p["last"], jax.nn.relu(out).mean((0, 1, 2)))


def untrained_product(p, x):
    return x @ (p["first"]["kernel"] @ p["last"]["kernel"])


class _Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5)(x[None]))
        x = nn.MultiHeadDotProductAttention(num_heads=1, dtype=jnp.float32)(x)
        return nn.Dense(3)(nn.LayerNorm()(x))[0]


def linen(p, x):
    return _Linen().apply({"params": p}, x)


DEEP = {"first": layer(6, 4), "second": layer(4, 4), "last": layer(4, 3)}
TWO = {"first": layer(6, 4), "last": layer(4, 3)}
SQUARE = {"square": normal(6, 6) * 0.5}
CASES = {
    # name: (network, params, examples, leaves whose per-example gradients are never formed)
    "mlp": (mlp, DEEP, VECTORS, 3),
    "batch_of_one": (batch_of_one, DEEP, VECTORS, 3),
    "called": (called, TWO, VECTORS, 2),
    "shared": (shared, {**SQUARE, "last": layer(6, 3)}, VECTORS, 1),
    "tied": (tied, SQUARE, VECTORS, 0),
    "scanned": (scanned, SQUARE, VECTORS, 0),
    "rematerialised": (rematerialised, TWO, VECTORS, 1),
    "conditional": (conditional, {"last": layer(6, 3)}, VECTORS, 0),
    "laid_out": (laid_out, {"heads": normal(2, 2, 6), "across": normal(4, 6)}, VECTORS, 2),
    "by_group": (by_group, {"groups": normal(2, 3, 2)}, VECTORS, 1),
    "normed": (
        normed,
        {"scale": normal(6), "shift": normal(6), "last": layer(6, 3)},
        VECTORS,
        1,
    ),
    "with_positions": (with_positions, TWO, SEQUENCES, 1),
    "embedded": (embedded, {"table": normal(5, 6), "last": layer(6, 3)}, TOKENS, 1),
    "convolved": (convolved, {"filter": normal(3, 3, 2, 4), "last": layer(4, 3)}, IMAGES, 1),
    "untrained_product": (untrained_product, TWO, VECTORS, 0),
    "linen": (linen, _Linen().init(jax.random.key(0), VECTORS[0])["params"], VECTORS, 6),
}


def score_of(network):
    return lambda p, x: (jnp.sum(network(p, x) ** 2)[None], jnp.ones(1))


def two_scores(network):
    """Return two scalars of a network's output, and weights that depend on it."""

    def score(p, x):
        out = network(p, x)
        return jnp.stack([jnp.sum(out**2), jnp.sin(out).sum()]), jnp.array([0.25, 2.0]) + out[0]

    return score


def formed(score, params, examples, power=2):
    """Return the mean from the gradients of all examples, formed."""

    @jax.jit
    def every(examples):
        return jax.vmap(lambda x: (jax.jacrev(lambda p: score(p, x)[0])(params), score(params, x)))(
            examples
        )

    gradients, (_, weights) = every(examples)
    total = lambda g: np.tensordot(weights, np.abs(np.asarray(g)) ** power, 2)  # noqa: E731
    return jax.tree.map(lambda g: total(g) / len(examples), gradients)


def close(found, expected, rtol=2e-4):
    for name, a, b in zip(
        masks.names(expected), jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol, 1e-5 * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_every_use_of_a_weight_gives_what_single_gradients_give(name):
    network, params, examples, unformed = CASES[name]
    score = score_of(network)
    found = gradient_moment(score, params, [examples])
    close(found, formed(score, params, examples))
    plan = per_example._plan(score, params, jax.tree.map(lambda _: None, params), examples[0])
    assert len(plan.products) == unformed


@pytest.mark.parametrize("name", ["called", "with_positions"])
def test_absolute_values_and_several_weighted_scalars(name):
    network, params, examples, _ = CASES[name]
    score = two_scores(network)
    found = gradient_moment(score, params, [examples], power=1, chunk=3)
    close(found, formed(score, params, examples, 1))


@pytest.mark.parametrize(("size", "chunk"), [(1, None), (3, None), (3, 2), (7, 1), (7, 3)])
def test_no_batch_size_changes_the_answer_and_a_short_last_batch_counts_by_its_size(size, chunk):
    score = score_of(called)
    batches = [VECTORS[i : i + size] for i in range(0, len(VECTORS), size)]
    close(gradient_moment(score, TWO, batches, chunk=chunk), formed(score, TWO, VECTORS))


def test_by_hand_for_one_layer():
    # s = w . x summed over outputs: the gradient is x in every column
    score = lambda w, x: (jnp.sum(x @ w)[None], jnp.ones(1))  # noqa: E731
    x = np.array([[1.0, -3.0], [2.0, 1.0]], np.float32)
    squares = gradient_moment(score, jnp.zeros((2, 3)), [x])
    np.testing.assert_allclose(squares, np.tile([[2.5], [5.0]], 3))
    absolute = gradient_moment(score, jnp.zeros((2, 3)), [x], power=1)
    np.testing.assert_allclose(absolute, np.tile([[1.5], [2.0]], 3))


def test_masked_leaves_are_holes_and_the_others_do_not_change():
    score = score_of(called)
    mask = jax.tree.map(lambda _: True, TWO) | {"first": {"kernel": False, "bias": True}}
    found = gradient_moment(score, TWO, [VECTORS], mask=mask)
    whole = formed(score, TWO, VECTORS)
    assert found["first"]["kernel"] is None
    close(found, masks.split(whole, mask)[0])


def test_bfloat16_products_are_summed_in_float32():
    # In bfloat16 a sum of ones stops at 256; the weight is cast before its product.
    def score(w, x):
        return jnp.sum(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16))[None], jnp.ones(1)

    found = gradient_moment(score, jnp.zeros((2, 2)), [np.ones((300, 2), np.float32)] * 3, chunk=1)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, 1.0)


def test_a_width_fits_the_memory_for_gradients_that_must_be_formed(monkeypatch):
    seen = []
    monkeypatch.setattr(per_example, "_MEMORY", 3 * 4 * 36)  # three gradients of the shared weight
    sums = per_example._sums
    monkeypatch.setattr(per_example, "_sums", lambda *a: seen.append(a[4].shape) or sums(*a))
    score = score_of(scanned)
    found = gradient_moment(score, SQUARE, [VECTORS])
    assert set(seen) == {(3,)}
    close(found, formed(score, SQUARE, VECTORS))


def test_what_is_compiled_is_kept_while_the_function_lives_and_no_longer():
    traced = []

    def score(w, x):
        traced.append(x.shape)
        return jnp.sum(w * x)[None], jnp.ones(1)

    for _ in range(3):
        gradient_moment(score, jnp.ones(6), [VECTORS])
    assert traced == [(6,)]
    alive = weakref.ref(score)
    del score
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk": 0}, "take 1 or more"),
        ({"batches": []}, "batches gave no examples"),
        ({"batches": [(VECTORS, VECTORS[:2])]}, r"shapes \[\(7, 6\), \(2, 6\)\]"),
        ({"mask": jax.tree.map(lambda _: False, SQUARE)}, "of 0 included leaves"),
        ({"params": {"square": jnp.ones((6, 6), jnp.int32)}}, "these are none: 'square: int32'"),
        ({"params": {"square": jnp.full((6, 6), jnp.nan)}}, "not finite in 'square'"),
    ],
)
def test_bad_input(options, words):
    given = {"score": score_of(scanned), "params": SQUARE, "batches": [VECTORS]} | options
    with pytest.raises(ValueError, match=words):
        gradient_moment(**given)
