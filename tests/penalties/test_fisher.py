import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.penalties.fisher import fisher_diagonal

# Logistic regression: p = sigmoid(w x + b), d log p(y) / d (w, b) = (y - p) (x, 1).
X = np.array([[0.5, -1.0], [2.0, 0.25], [-1.5, 1.0], [0.0, 3.0], [1.0, 1.0]], np.float32)
Y = np.array([1, 0, 1, 1, 0])
W, B = np.array([0.7, -0.4], np.float32), np.float32(0.2)
PARAMS = {"w": jnp.asarray(W), "b": jnp.asarray(B)}
P = 1 / (1 + np.exp(-(X @ W + B)))


def log_prob(params, example, label):
    score = jnp.dot(params["w"], example) + params["b"]
    return jax.nn.log_sigmoid(jnp.where(label == 1, score, -score))


def cut(size, labels=True):
    rows = range(0, len(X), size)
    return [(X[i : i + size], Y[i : i + size] if labels else None) for i in rows]


def by_hand(squared_residual):
    """Return the mean over examples of a squared residual times (x^2, 1)."""
    return (squared_residual[:, None] * X**2).mean(0), squared_residual.mean()


def check(fisher, expected, rtol=1e-5):
    np.testing.assert_allclose(fisher["w"], expected[0], rtol=rtol)
    np.testing.assert_allclose(fisher["b"], expected[1], rtol=rtol)


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 50])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_labels_of_the_data_by_hand_for_every_batch_and_chunk(size, chunk):
    fisher = fisher_diagonal(log_prob, PARAMS, cut(size), labels="data", chunk=chunk)
    check(fisher, by_hand((Y - P) ** 2))


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_exact_expectation_by_hand_for_every_batch_and_chunk(size, chunk):
    batches = cut(size, labels=False)
    fisher = fisher_diagonal(log_prob, PARAMS, batches, labels="exact", classes=2, chunk=chunk)
    # p (1 - p)^2 + (1 - p) p^2 = p (1 - p)
    check(fisher, by_hand(P * (1 - P)))


def test_sampled_labels_have_the_exact_value_as_expectation():
    many = [(np.tile(X, (400, 1)), None)] * 10
    fisher = fisher_diagonal(log_prob, PARAMS, many, classes=2, key=jax.random.key(0), chunk=500)
    check(fisher, by_hand(P * (1 - P)), rtol=0.03)


def test_sampled_labels_belong_to_the_example_not_to_the_batch():
    key = jax.random.key(3)
    whole = fisher_diagonal(log_prob, PARAMS, cut(5), classes=2, key=key)
    for size, chunk in ((1, None), (2, None), (3, 2), (5, 2)):
        parts = fisher_diagonal(log_prob, PARAMS, cut(size), classes=2, key=key, chunk=chunk)
        check(parts, (whole["w"], whole["b"]), rtol=1e-6)
    other = fisher_diagonal(log_prob, PARAMS, cut(5), classes=2, key=jax.random.key(4))
    assert not np.allclose(other["w"], whole["w"])


def test_sampled_value_is_that_of_some_labels():
    one = fisher_diagonal(log_prob, PARAMS, [(X[:1], None)], classes=2, key=jax.random.key(0))
    possible = [((label - P[0]) ** 2 * X[0] ** 2) for label in (0, 1)]
    assert any(np.allclose(one["w"], value, rtol=1e-5) for value in possible)


def test_it_is_not_the_square_of_the_mean_gradient():
    # at p = 1/2 the two gradients are x / 2 and -x / 2: their mean is 0, the mean square x^2 / 4
    origin = jax.tree.map(jnp.zeros_like, PARAMS)
    batch = np.array([[2.0, 6.0], [2.0, 6.0]], np.float32), np.array([0, 1])
    fisher = fisher_diagonal(log_prob, origin, [batch], labels="data")
    np.testing.assert_allclose(fisher["w"], [1.0, 9.0], rtol=1e-6)


def test_three_classes_exact_by_hand():
    # softmax regression on one feature: d log p(y) / d w_c = (1[y = c] - p_c) x
    w = np.array([0.3, -0.2, 0.5], np.float32)
    p = np.exp(w * 2.0) / np.exp(w * 2.0).sum()
    expected = sum(p[y] * ((np.arange(3) == y) - p) ** 2 * 4.0 for y in range(3))
    fisher = fisher_diagonal(
        lambda w, x, y: jax.nn.log_softmax(w * x)[y],
        jnp.asarray(w),
        [(jnp.array([2.0]), None)],
        labels="exact",
        classes=3,
    )
    np.testing.assert_allclose(fisher, expected, rtol=1e-5)
    np.testing.assert_allclose(fisher, p * (1 - p) * 4.0, rtol=1e-5)


@jax.custom_vjp
def untouchable(x):
    return x


def _refuse(*_):
    raise AssertionError("a held leaf was differentiated")


untouchable.defvjp(_refuse, _refuse)


@pytest.mark.parametrize("labels", ["data", "sampled", "exact"])
def test_held_leaves_are_not_differentiated_and_are_holes(labels):
    def guarded(params, example, label):
        return log_prob({"w": untouchable(params["w"]), "b": params["b"]}, example, label)

    options = {"labels": labels, "classes": 2, "key": jax.random.key(0)}
    mask = {"w": False, "b": True}
    fisher = fisher_diagonal(guarded, PARAMS, cut(2), mask=mask, **options)
    full = fisher_diagonal(log_prob, PARAMS, cut(2), **options)
    assert fisher["w"] is None
    np.testing.assert_allclose(fisher["b"], full["b"], rtol=1e-6)
    with pytest.raises(AssertionError, match="was differentiated"):
        fisher_diagonal(guarded, PARAMS, cut(2), **options)


@pytest.mark.parametrize("labels", ["data", "sampled", "exact"])
def test_sums_are_in_float32_for_bfloat16_params(labels):
    # In bfloat16 a sum of ones stops at 256.
    fisher = fisher_diagonal(
        lambda w, x, y: -jnp.log(2.0) + 0 * y + 2 * x * (w - jax.lax.stop_gradient(w)),
        jnp.bfloat16(1.0),
        [(jnp.ones(300, jnp.bfloat16), jnp.zeros(300, jnp.int32))] * 3,
        labels=labels,
        classes=2,
        key=jax.random.key(0),
        chunk=1,
    )
    assert fisher.dtype == jnp.float32
    assert float(fisher) == 4.0


def test_examples_may_be_a_tree_and_batches_a_generator():
    def of_tree(params, example, label):
        return log_prob(params, jnp.stack([example["left"], example["right"]]), label)

    batches = (({"left": x[:, 0], "right": x[:, 1]}, y) for x, y in cut(2))
    check(fisher_diagonal(of_tree, PARAMS, batches, labels="data"), by_hand((Y - P) ** 2))


def test_one_compilation_for_each_batch_shape():
    traced = []

    def counted(params, example, label):
        traced.append(example.shape)
        return log_prob(params, example, label)

    fisher_diagonal(counted, PARAMS, cut(2)[:2] * 5, labels="data")
    assert len(traced) == 1
    fisher_diagonal(counted, PARAMS, cut(2), labels="data")
    assert len(traced) == 2  # the short last batch; the others are compiled already
    fisher_diagonal(counted, PARAMS, cut(2), labels="exact", classes=2)
    assert len(traced) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": "true"}, "labels='true' is not known; take one of"),
        ({"labels": "exact"}, "classes=None is given; give classes="),
        ({"classes": 2}, "key=None is given; give key="),
        ({"labels": "data", "chunk": 0}, "take 1 or more"),
        ({"labels": "data", "batches": []}, "batches gave no examples"),
        ({"labels": "data", "batches": [(X, None)]}, "batch 0 has None"),
        ({"labels": "data", "batches": [(X, Y[:2])]}, r"shapes \[\(5, 2\), \(2,\)\]"),
        ({"labels": "data", "mask": {"w": True}}, "mask has not the structure"),
        ({"labels": "data", "mask": {"w": False, "b": False}}, "of 0 included leaves"),
        ({"labels": "data", "params": PARAMS | {"b": 1}}, "these are none: 'b: int32'"),
        ({"labels": "data", "params": PARAMS | {"b": jnp.nan}}, "not finite in 'b', 'w'"),
        (
            {"labels": "data", "log_prob": lambda p, x, y: p["w"] * x},
            r"log_prob gives float32\[2\] for one example",
        ),
    ],
)
def test_bad_input(options, words):
    given = {"log_prob": log_prob, "params": PARAMS, "batches": cut(2)} | options
    function = fisher_diagonal if options.get("labels") != "true" else _unchecked(fisher_diagonal)
    with pytest.raises(ValueError, match=words):
        function(**given)


def _unchecked(function):
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
