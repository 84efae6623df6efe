"""Activations by value, attention by hand and against `jax.nn`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.models import layers


def _qkv(n=2, queries=3, keys=5, heads=2, size=4, dtype=jnp.float32):
    split = jax.random.split(jax.random.key(0), 3)
    shapes = [(n, queries, heads, size), (n, keys, heads, size), (n, keys, heads, size)]
    pairs = zip(split, shapes, strict=True)
    return [jax.random.normal(key, shape, dtype) for key, shape in pairs]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gelu", 0.5 * (1 + math.erf(1 / math.sqrt(2)))),
        ("gelu_new", 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715))),
        ("gelu_pytorch_tanh", 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715))),
        ("quick_gelu", 1 / (1 + math.exp(-1.702))),
        ("relu", 1.0),
        ("silu", 1 / (1 + math.exp(-1))),
        ("swish", 1 / (1 + math.exp(-1))),
        ("tanh", math.tanh(1)),
        ("sigmoid", 1 / (1 + math.exp(-1))),
    ],
)
def test_activation_at_one(name, value):
    assert float(layers.activation(name)(jnp.array(1.0))) == pytest.approx(value, abs=1e-6)


def test_relus_are_cut():
    x = jnp.array([-1.0, 3.0, 7.0])
    assert layers.activation("relu")(x).tolist() == [0.0, 3.0, 7.0]
    assert layers.activation("relu6")(x).tolist() == [0.0, 3.0, 6.0]


def test_unknown_activation_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'gleu' is not known; there are \['gelu', 'gelu_new'"):
        layers.activation("gleu")


def test_attention_by_hand():
    # One head of size 1, keys 0 and ln 3: the softmax of (0, ln 3) is (1/4, 3/4).
    query = jnp.ones((1, 1, 1, 1))
    key = jnp.array([0.0, math.log(3.0)]).reshape(1, 2, 1, 1)
    value = jnp.array([4.0, 8.0]).reshape(1, 2, 1, 1)
    assert float(layers.attention(query, key, value)[0, 0, 0, 0]) == pytest.approx(7.0)


def test_attention_divides_by_the_root_of_the_size():
    # Size 4 and scores of 2 ln 3, which become ln 3 after the division by 2.
    query = jnp.ones((1, 1, 1, 4))
    key = jnp.stack([jnp.zeros(4), jnp.full(4, math.log(3.0) / 2)]).reshape(1, 2, 1, 4)
    value = jnp.array([[4.0] * 4, [8.0] * 4]).reshape(1, 2, 1, 4)
    np.testing.assert_allclose(layers.attention(query, key, value).ravel(), 7.0, rtol=1e-6)


def test_masked_keys_do_not_count():
    query, key, value = _qkv()
    mask = jnp.array([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]])
    got = layers.attention(query, key, value, mask=mask)
    poisoned = jnp.where(mask[:, :, None, None] == 1, value, 1e9)
    np.testing.assert_array_equal(got, layers.attention(query, key, poisoned, mask=mask))
    short = layers.attention(query[:1], key[:1, :3], value[:1, :3])
    np.testing.assert_allclose(got[:1], short, atol=1e-6)
    np.testing.assert_array_equal(got, layers.attention(query, key, value, mask=mask == 1))


def test_a_row_with_no_key_is_finite_and_so_is_its_gradient():
    query, key, value = _qkv()

    def total(query, key, value):
        return layers.attention(query, key, value, mask=jnp.zeros((2, 5), jnp.int32)).sum()

    gradients = jax.grad(total, argnums=(0, 1, 2))(query, key, value)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in gradients)
    np.testing.assert_allclose(total(query, key, value), value.mean(1).sum() * 3, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "gap"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_attention_equals_jax_nn(masked, dtype, gap):
    query, key, value = _qkv(dtype=dtype)
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]) if masked else None
    got = layers.attention(query, key, value, mask=mask, implementation="einsum")
    other = layers.attention(query, key, value, mask=mask, implementation="xla")
    assert got.dtype == other.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), other.astype(jnp.float32), atol=gap)


def test_attention_takes_the_implementation_that_the_device_allows(monkeypatch):
    calls = []
    plain = jax.nn.dot_product_attention

    def recorded(*args, implementation, **options):
        calls.append(implementation)
        return plain(*args, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    query, key, value = _qkv(queries=4, keys=4, size=8, dtype=jnp.bfloat16)
    layers.attention(query, key, value)
    assert calls == []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    layers.attention(query, key, value)
    assert calls == ["xla"], "this machine has no compute capability 8"
    layers.attention(query, key, value, dropout=lambda p: p)
    assert calls == ["xla"], "dropout of probabilities needs the einsum"

    class Ampere:
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "devices", lambda: [Ampere()])
    ones = jnp.ones((2, 4), jnp.int32)
    layers.attention(query, key, value, mask=ones)
    layers.attention(*(x.astype(jnp.float32) for x in (query, key, value)), mask=ones)
    layers.attention(query[:, :3], key, value, mask=ones)
    layers.attention(query[:, :3], key, value)
    layers.attention(query[..., :7], key[..., :7], value[..., :7])
    assert calls[1:] == ["cudnn", "xla", "xla", "cudnn", "xla"]


def test_dropout_of_probabilities_needs_the_einsum():
    query, key, value = _qkv()
    with pytest.raises(ValueError, match="'xla' has no dropout"):
        layers.attention(query, key, value, dropout=lambda p: p, implementation="xla")


def test_self_attention_drops_probabilities_only_where_live():
    module = layers.SelfAttention(8, 2, dropout=0.5)
    hidden = jax.random.normal(jax.random.key(1), (2, 3, 8))
    variables = module.init(jax.random.key(0), hidden)
    held = module.apply(variables, hidden)
    keys = [{"dropout": jax.random.key(k)} for k in (1, 2)]
    np.testing.assert_array_equal(held, module.apply(variables, hidden, None, False, rngs=keys[0]))
    one, two = (module.apply(variables, hidden, None, True, rngs=key) for key in keys)
    assert not np.array_equal(one, two) and not np.array_equal(one, held)
    np.testing.assert_array_equal(one, module.apply(variables, hidden, None, True, rngs=keys[0]))


def test_self_attention_without_bias_has_kernels_alone():
    module = layers.SelfAttention(8, 2, bias=False)
    params = module.init(jax.random.key(0), jnp.zeros((1, 2, 8)))["params"]
    assert {name: sorted(leaves) for name, leaves in params.items()} == {
        "query": ["kernel"],
        "key": ["kernel"],
        "value": ["kernel"],
    }


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="3 attention heads do not divide the width 8"):
        layers.SelfAttention(8, 3).init(jax.random.key(0), jnp.zeros((1, 2, 8)))


# Dropout


@pytest.mark.parametrize("shape", [(64, 32, 48), (64, 32, 47), (4096, 1)])
def test_dropout_keeps_its_share_and_the_mean(shape):
    module = layers.Dropout(0.25)
    inputs = jnp.ones(shape)
    out = np.asarray(module.apply({}, inputs, rngs={"dropout": jax.random.key(0)}))
    assert set(np.unique(out)) == {0.0, np.float32(4 / 3)}
    count = out.size
    spread = 5 * math.sqrt(0.25 * 0.75 / count)
    assert abs(float((out > 0).mean()) - 0.75) < spread
    if shape[-1] > 1:  # the two halves of a word are independent
        pairs = (out[..., :-1] > 0) & (out[..., 1:] > 0)
        assert abs(pairs.mean() - 0.75**2) < 6 / math.sqrt(count)
    again = module.apply({}, inputs, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(out, again)
    other = module.apply({}, inputs, rngs={"dropout": jax.random.key(1)})
    assert np.any(out != np.asarray(other))


def test_dropout_in_evaluation_and_at_rate_0_is_nothing():
    inputs = jnp.arange(6.0).reshape(2, 3)
    assert layers.Dropout(0.5, deterministic=True).apply({}, inputs) is inputs
    assert layers.Dropout(0.0).apply({}, inputs) is inputs
    with pytest.raises(ValueError, match=r"dropout is 1.0; a rate is in"):
        layers.Dropout(1.0).apply({}, inputs, rngs={"dropout": jax.random.key(0)})


def test_dropout_gives_its_gradient_to_what_it_keeps():
    def total(x):
        return jnp.sum(layers.Dropout(0.5).apply({}, x, rngs={"dropout": jax.random.key(3)}) ** 2)

    x = jnp.arange(1.0, 9.0).reshape(2, 4)
    out = layers.Dropout(0.5).apply({}, x, rngs={"dropout": jax.random.key(3)})
    np.testing.assert_allclose(jax.grad(total)(x), 4.0 * out, rtol=1e-6)


def test_attention_laid_out_for_a_cpu_has_the_numbers_and_gradients_of_einsum():
    rng = np.random.default_rng(0)
    query, key, value, weight = (
        jnp.asarray(rng.normal(size=(2, 5, 3, 4)), jnp.float32) for _ in range(4)
    )
    mask = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def loss(chosen):
        def one(query, key, value):
            out = layers.attention(query, key, value, mask=mask, implementation=chosen)
            return jnp.sum(out * weight), out

        return jax.grad(one, argnums=(0, 1, 2), has_aux=True)(query, key, value)

    grads, out = loss("matmul")
    expected, there = loss("einsum")
    np.testing.assert_allclose(out, there, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected)
