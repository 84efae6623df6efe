"""Rows of several streams in one batch: each term over its own."""

import jax
import jax.numpy as jnp
import numpy as np

from jtl.recipes.streams import own_rows
from jtl.train.state import Context


def test_without_a_stream_the_term_sees_the_batch_as_it_is():
    batch = {"mask": jnp.array([True, False])}
    context = Context({}, {}, batch, {}, jnp.int32(0), None)
    seen = own_rows(lambda c: (c.batch, 1.0), 0)(context)[0]
    assert seen is batch


def test_padding_rows_belong_to_no_stream():
    batch = {"mask": jnp.array([True, False, True]), "stream": jnp.array([1, 1, 0])}
    context = Context({}, {}, batch, {}, jnp.int32(0), jax.random.key(0))
    masks = [own_rows(lambda c: (c.batch["mask"], 1.0), k)(context)[0] for k in (0, 1)]
    np.testing.assert_array_equal(masks, [[False, False, True], [True, False, False]])
