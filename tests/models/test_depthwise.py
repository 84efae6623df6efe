"""Depthwise convolution: the sum of shifted copies is XLA's convolution, and so are its slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.models.layers.depthwise import depthwise


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [(3, 1, "SAME"), (3, 2, "SAME"), (5, 2, ((1, 2), (1, 2))), (7, 1, ((3, 3), (3, 3)))],
)
@pytest.mark.parametrize("side", [8, 11])
def test_shifted_is_the_convolution(size, stride, padding, side):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(2, side, 9, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 1, 3)), jnp.float32)

    @jax.jit
    def both(images, kernel):
        made = {}
        for shifted in (True, False):

            def loss(images, kernel, shifted=shifted):
                options = dict(stride=stride, padding=padding, shifted=shifted)
                out = depthwise(images, kernel, **options)
                return jnp.sum(jnp.sin(out)), out

            made[shifted] = jax.value_and_grad(loss, (0, 1), has_aux=True)(images, kernel)
        return made

    made = both(images, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), made[True], made[False])


def test_half_precision_is_added_up_in_float32():
    # 1 + 8 times 2^-9 is 1.015625; bfloat16 would lose each 2^-9 beside the 1.
    kernel = jnp.full((3, 3, 1, 1), 2.0**-9, jnp.bfloat16).at[0, 0].set(1.0)
    got = depthwise(jnp.ones((1, 3, 3, 1), jnp.bfloat16), kernel, padding="VALID", shifted=True)
    assert got.dtype == jnp.bfloat16 and float(got.ravel()[0]) == 1.015625
