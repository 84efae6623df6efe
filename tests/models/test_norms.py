"""BatchNorm: values by hand with masks, running statistics, devices; parity with PyTorch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.models.layers.norms import BatchNorm, batch_moments, normalise


def _variables(dim, mean=None, var=None):
    mean = jnp.zeros(dim) if mean is None else jnp.asarray(mean, jnp.float32)
    var = jnp.ones(dim) if var is None else jnp.asarray(var, jnp.float32)
    params = {"scale": jnp.ones(dim), "bias": jnp.zeros(dim)}
    return {"params": params, "batch_stats": {"mean": mean, "var": var}}


def _apply(variables, x, mask=None, live=True, **fields):
    out, moved = BatchNorm(**fields).apply(variables, x, mask, live, mutable=["batch_stats"])
    return out, moved["batch_stats"]


def test_leaves():
    variables = BatchNorm(dtype=jnp.bfloat16).init(jax.random.key(0), jnp.ones((1, 2, 3)))
    got = jax.tree.map(lambda leaf: (leaf.tolist(), str(leaf.dtype)), variables)
    ones, zeros = ([1.0] * 3, "float32"), ([0.0] * 3, "float32")
    assert got == {
        "params": {"scale": ones, "bias": zeros},
        "batch_stats": {"mean": zeros, "var": ones},
    }


def test_live_values_by_hand():
    # Rows 1, 3, 5: mean 3, variance 8/3, unbiased 4. Row 100 is padding.
    x = jnp.array([[1.0], [3.0], [100.0], [5.0]])
    mask = jnp.array([True, True, False, True])
    out, stats = _apply(_variables(1, [10.0], [2.0]), x, mask, epsilon=0.0)
    np.testing.assert_allclose(out[:2, 0], [-2 / np.sqrt(8 / 3), 0.0], rtol=1e-6)
    np.testing.assert_allclose(stats["mean"], [0.9 * 10 + 0.1 * 3], rtol=1e-6)
    np.testing.assert_allclose(stats["var"], [0.9 * 2 + 0.1 * 4], rtol=1e-6)


def test_momentum_and_epsilon_and_affine():
    variables = _variables(1)
    variables["params"] = {"scale": jnp.array([2.0]), "bias": jnp.array([7.0])}
    out, stats = _apply(variables, jnp.array([[0.0], [2.0]]), momentum=0.25, epsilon=3.0)
    np.testing.assert_allclose(out[:, 0], [7 - 2 / 2, 7 + 2 / 2])  # variance 1, sqrt(1 + 3) = 2
    np.testing.assert_allclose([*stats["mean"], *stats["var"]], [0.25, 0.75 + 0.25 * 2])


def test_held_reads_the_running_statistics_and_keeps_their_bits():
    variables = _variables(2, [1.0, -0.0], [4.0, jnp.nan])
    x = jnp.array([[3.0, 1.0], [9.0, 1.0]])
    out, stats = _apply(variables, x, live=False, epsilon=0.0)
    assert out[:, 0].tolist() == [1.0, 4.0]
    before, after = (
        jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), tree)
        for tree in (variables["batch_stats"], stats)
    )
    assert before == after


def test_padding_rows_are_as_if_absent():
    x = jax.random.normal(jax.random.key(0), (5, 4, 3, 2)) * 3 + 50
    mask = jnp.array([True, False, True, True, False])
    x = x.at[1].set(1e6)
    out, stats = _apply(_variables(2), x, mask)
    alone, alone_stats = _apply(_variables(2), x[mask])
    np.testing.assert_allclose(out[mask], alone, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), stats, alone_stats)


def test_nan_in_padding_does_not_reach_the_statistics():
    mask = jnp.array([True, True, False])
    out, stats = _apply(_variables(1), jnp.array([[1.0], [3.0], [jnp.nan]]), mask)
    assert jnp.isfinite(out[:2]).all()
    np.testing.assert_allclose([*stats["mean"], *stats["var"]], [0.2, 0.9 + 0.1 * 2], rtol=1e-6)


def test_a_batch_of_padding_alone_moves_nothing():
    variables = _variables(1, [2.0], [9.0])
    x, mask = jnp.array([[5.0], [8.0]]), jnp.zeros(2, bool)
    out, stats = _apply(variables, x, mask, epsilon=0.0)
    assert out[:, 0].tolist() == [1.0, 2.0]
    assert (stats["mean"].tolist(), stats["var"].tolist()) == ([2.0], [9.0])


def test_one_real_value_is_finite():
    out, stats = _apply(_variables(1), jnp.array([[5.0], [8.0]]), jnp.array([True, False]))
    assert float(out[0, 0]) == 0.0
    np.testing.assert_allclose([*stats["mean"], *stats["var"]], [0.5, 0.9])


def test_one_value_a_channel_is_refused_when_live():
    x = jnp.ones((1, 1, 1, 4))
    with pytest.raises(ValueError, match=r"input \(1, 1, 1, 4\).*two rows or more"):
        _apply(_variables(4), x)
    _apply(_variables(4), x, live=False)


def test_variance_keeps_its_digits_where_the_mean_is_large():
    x = jax.random.normal(jax.random.key(0), (64, 1)) * 0.01 + 1000.0
    _, variance, _ = batch_moments(x)
    np.testing.assert_allclose(variance, np.var(np.asarray(x, np.float64), axis=0), rtol=1e-3)


def test_sixteen_bit_inputs_have_float32_moments():
    x = jnp.full((4096, 1), 1.0, jnp.bfloat16).at[0].set(3.0)
    mean, _, count = batch_moments(x)
    assert mean.dtype == jnp.float32 and float(count) == 4096.0
    np.testing.assert_allclose(mean, [1 + 2 / 4096], rtol=1e-7)
    out, stats = _apply(_variables(1), x, dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16 and stats["mean"].dtype == jnp.float32


def test_statistics_carry_no_gradient():
    def loss(x):
        return sum(jnp.sum(leaf) for leaf in _apply(_variables(1), x)[1].values())

    assert not jax.grad(loss)(jnp.array([[1.0], [4.0]])).any()


def test_eight_devices_with_unequal_masks_are_one():
    # One device has padding alone; a mean of the devices' means would be wrong.
    x = jax.random.normal(jax.random.key(0), (16, 3, 2)) + 5.0
    mask = jnp.array([True] * 9 + [False] * 5 + [True, False])
    weight = jax.random.normal(jax.random.key(1), x.shape)
    params = {"scale": jnp.array([2.0, 3.0]), "bias": jnp.array([0.5, 0.0])}

    def loss(params, x, mask, weight, axis_name):
        variables = {**_variables(2), "params": params}
        out, stats = _apply(variables, x, mask, axis_name=axis_name)
        return jnp.sum(jnp.where(mask[:, None, None], out * weight, 0.0)), (out, stats)

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, (out, stats)), (grads, dx) = grad(params, x, mask, weight, None)

    @functools.partial(jax.pmap, axis_name="devices", in_axes=(None, 0, 0, 0))
    def on_devices(params, x, mask, weight):
        (value, aux), (grads, dx) = grad(params, x, mask, weight, "devices")
        return jax.lax.psum((value, grads), "devices"), aux, dx

    cut = (leaf.reshape(8, 2, *leaf.shape[1:]) for leaf in (x, mask, weight))
    (values, many_grads), (many_out, many_stats), many_dx = on_devices(params, *cut)
    np.testing.assert_allclose(values[0], value, rtol=1e-5)
    np.testing.assert_allclose(many_out.reshape(x.shape), out, atol=1e-5)
    np.testing.assert_allclose(many_dx.reshape(x.shape), dx, atol=1e-5)
    for one, many in ((stats, many_stats), (grads, many_grads)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(b, np.broadcast_to(a, b.shape), rtol=1e-4),
            one,
            many,
        )


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 2, 5)])
def test_values_statistics_and_gradients_are_those_of_pytorch(shape):
    import torch

    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, shape).astype(np.float32)
    weight = rng.normal(size=shape).astype(np.float32)
    peer = (torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d)(5)
    with torch.no_grad():
        for leaf in (peer.weight, peer.bias, peer.running_mean):
            leaf.normal_()
    variables = _variables(5, peer.running_mean.numpy().copy())
    variables["params"] = {
        "scale": jnp.asarray(peer.weight.detach().numpy()),
        "bias": jnp.asarray(peer.bias.detach().numpy()),
    }

    def loss(params, x):
        out, stats = _apply({**variables, "params": params}, x)
        return jnp.sum(out * weight), (out, stats)

    last = (0, -1, *range(1, len(shape) - 1))
    theirs_x = torch.tensor(x.transpose(last), requires_grad=True)
    theirs = peer(theirs_x)
    (theirs * torch.tensor(weight.transpose(last))).sum().backward()
    (grads, dx), (out, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        variables["params"], jnp.asarray(x)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(out.transpose(last), theirs.detach().numpy())
    close(stats["mean"], peer.running_mean.numpy())
    close(stats["var"], peer.running_var.numpy())
    close(dx.transpose(last), theirs_x.grad.numpy(), atol=1e-4)
    close(grads["scale"], peer.weight.grad.numpy(), atol=1e-4)
    close(grads["bias"], peer.bias.grad.numpy(), atol=1e-4)


def test_a_live_norm_whose_statistics_may_not_move_normalises_by_those_stored():
    x = jnp.array([[1.0], [3.0]])
    stored = {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}
    own = {"params": {"scale": jnp.ones(1), "bias": jnp.zeros(1)}, "batch_stats": stored}
    out = BatchNorm(epsilon=0.0).apply(own, x, None, True)
    np.testing.assert_allclose(out, [[0.0], [1.0]], atol=1e-6)


def _by_the_formula(x, scale, bias, mask, otherwise, epsilon, axis_name, dtype):
    """Return what `normalise` does, without a gradient of its own."""
    mean, var, count = batch_moments(x, mask, axis_name=axis_name)
    mean, var = (jnp.where(count > 0, *pair) for pair in zip((mean, var), otherwise, strict=True))
    normal = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(var + epsilon)
    return (normal * scale + bias).astype(dtype), (mean, var, count)


MASKS = {"all": None, "some": [True, False, True, True], "none": [False] * 4}


def _case(mask, shape=(4, 3, 2, 5), dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 6)
    x = (jax.random.normal(keys[0], shape) * 2 + 1).astype(dtype)
    scale, bias, mean = (jax.random.normal(key, shape[-1:]) for key in keys[1:4])
    otherwise = (mean, jnp.square(jax.random.normal(keys[4], shape[-1:])) + 0.5)
    slope = jax.random.normal(keys[5], shape)  # of padding rows too
    mask = None if MASKS[mask] is None else jnp.array(MASKS[mask])
    return x, scale, bias, mask, otherwise, slope


def _pulled(function, case, axis_name=None, dtype=jnp.float32):
    x, scale, bias, mask, otherwise, slope = case

    def value(x, scale, bias):
        y, _ = function(x, scale, bias, mask, otherwise, 1e-3, axis_name, dtype)
        return y

    return jax.vjp(value, x, scale, bias)[1](slope.astype(dtype))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (4, 5)])
def test_the_gradient_is_that_of_the_formula(mask, shape):
    with jax.numpy_rank_promotion("allow"):
        want = _pulled(_by_the_formula, _case(mask, shape))
    for a, b in zip(_pulled(normalise, _case(mask, shape)), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_gradient_in_bfloat16_has_the_dtypes_of_what_it_is_of():
    case = _case("some", dtype=jnp.bfloat16)
    got = _pulled(normalise, case, dtype=jnp.bfloat16)
    assert [str(leaf.dtype) for leaf in got] == ["bfloat16", "float32", "float32"]
    with jax.numpy_rank_promotion("allow"):
        want = _pulled(_by_the_formula, case, dtype=jnp.bfloat16)
    for a, b in zip(got, want, strict=True):
        gap = np.asarray(a, np.float32) - np.asarray(b, np.float32)
        assert np.abs(gap).max() < 0.05


def test_the_gradient_over_devices_is_that_of_the_whole_batch():
    # As in a step: each device has the loss of its rows, and sums what it is of over the devices.
    whole = _case("some")
    x, scale, bias, mask, otherwise, slope = whole
    parts = [leaf.reshape(2, 2, *leaf.shape[1:]) for leaf in (x, mask, slope)]

    def own(x, mask, slope):
        return _pulled(normalise, (x, scale, bias, mask, otherwise, slope), "devices")

    by_x, by_scale, by_bias = jax.vmap(own, axis_name="devices")(*parts)
    got = by_x.reshape(x.shape), by_scale.sum(0), by_bias.sum(0)
    for a, b in zip(got, _pulled(normalise, whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_gradient_is_that_of_the_formula():
    case = _case("some")

    def twice(function):
        def length(x):
            by_x, by_scale, _ = _pulled(function, (x, *case[1:]))
            return jnp.sum(jnp.sin(by_x)) + jnp.sum(by_scale**2)

        return jax.grad(length)(case[0])

    with jax.numpy_rank_promotion("allow"):
        want = twice(_by_the_formula)
    np.testing.assert_allclose(twice(normalise), want, rtol=1e-3, atol=1e-4)
