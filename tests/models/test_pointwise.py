"""Convolutions of one place as products."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.models.layers.pointwise import pointwise

CASES = {
    "one place": dict(kernel_size=(1, 1)),
    "one place, strided": dict(kernel_size=(1, 1), strides=(2, 3)),
    "one place of a sequence": dict(kernel_size=(1,), strides=(2,)),
    "one place without padding": dict(kernel_size=(1, 1), padding="VALID", strides=2),
    "one place, padded": dict(kernel_size=(1, 1), padding=1),
    "one place, grouped": dict(kernel_size=(1, 1), feature_group_count=2),
    "one place, dilated input": dict(kernel_size=(1, 1), input_dilation=2, padding=0),
    "several places": dict(kernel_size=(3, 3), padding=1, strides=2),
    "several places of a sequence": dict(kernel_size=(3,)),
}
PRODUCTS = [name for name in CASES if name in list(CASES)[:4]]


def _convolved(name, **options):
    rank = len(CASES[name]["kernel_size"])
    images = jax.random.normal(jax.random.key(0), (2, *(7, 5)[:rank], 4))
    conv = nn.Conv(6, **CASES[name], **options)
    params = conv.init(jax.random.key(1), images)

    def loss(params, images):
        out = conv.apply(params, images)
        return jnp.sum(jnp.sin(out)), out

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), params, images


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_convolution(name):
    plain, params, images = _convolved(name)
    product, _, _ = _convolved(name, conv_general_dilated=pointwise)
    for want, got in zip(
        jax.tree.leaves(plain(params, images)),
        jax.tree.leaves(product(params, images)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_of_one_place_is_no_convolution(name):
    product, params, images = _convolved(name, conv_general_dilated=pointwise)
    program = str(jax.make_jaxpr(product)(params, images))
    assert ("conv_general_dilated" in program) == (name not in PRODUCTS)
    assert ("dot_general" in program) == (name in PRODUCTS)
