import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import masks
from jtl.merging import wise_ft

START = {"body": {"kernel": jnp.array([[1.0, -2.0], [0.5, 0.1]]), "bias": jnp.array([0.1, -0.0])}}
TUNED = {"body": {"kernel": jnp.array([[3.0, -2.0], [0.7, 0.2]]), "bias": jnp.array([0.3, 0.0])}}


def line(*args, **options):
    return dict(wise_ft.wise_ft(*args, **options))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_quarter_of_the_way_by_hand():
    found = line(START, TUNED, (0.25,))[0.25]["body"]
    np.testing.assert_allclose(found["kernel"], [[1.5, -2.0], [0.55, 0.125]], rtol=1e-6)
    np.testing.assert_allclose(found["bias"], [0.15, 0.0], rtol=1e-6)


def test_the_ends_are_start_and_tuned_bit_for_bit():
    found = line(START, TUNED, (0, 1))
    assert bits(found[0.0]) == bits(START)
    assert bits(found[1.0]) == bits(TUNED)
    assert bits(START) != bits(TUNED)


def test_what_training_held_keeps_its_bits_at_every_alpha():
    held = jax.random.normal(jax.random.key(0), (2000,)) * 1e-3
    for tree in line({"w": held}, {"w": held}, np.linspace(0, 1, 11).tolist()).values():
        assert bits(tree) == bits({"w": held})


def test_a_new_head_is_the_tuned_one_at_every_alpha():
    head = {"head": {"kernel": jnp.array([7.0])}}
    tuned = {**TUNED, **head}
    mask = masks.mask(masks.label(tuned, [("head/.*", "head"), (".*", "body")]), "body")
    for start in (START, {**START, "head": {"kernel": None}}, {**START, "head": {"kernel": 0}}):
        for alpha, tree in line(start, tuned, (0, 0.5, 1), mask=mask).items():
            assert bits(tree["head"]) == bits(head)
            assert bits(tree["body"]) == bits(line(START, TUNED, (alpha,))[alpha]["body"])


def test_a_head_without_a_start_is_refused_by_its_name():
    tuned = {**TUNED, "head": {"kernel": jnp.array([7.0])}}
    with pytest.raises(ValueError, match=r"no leaf 'head/kernel'.*head that is new.*mask="):
        line(START, tuned, (0.5,))
    with pytest.raises(ValueError, match="'head/kernel' that the tuned tree has not"):
        line(tuned, TUNED, (0.5,))


def test_errors_come_before_the_first_tree():
    with pytest.raises(ValueError, match="each from 0 to 1"):
        wise_ft.wise_ft(START, TUNED, (0.5, 1.5))
    with pytest.raises(ValueError, match="alphas are"):
        wise_ft.wise_ft(START, TUNED, ())
    with pytest.raises(ValueError, match="floating point alone"):
        wise_ft.wise_ft({"n": jnp.array(1)}, {"n": jnp.array(2)}, (0.0,))
    with pytest.raises(ValueError, match="shapes"):
        wise_ft.wise_ft({"n": jnp.zeros(2)}, {"n": jnp.zeros(1)}, (0.0,))


def test_half_precision_is_mixed_in_float32_and_kept():
    start, tuned = ({"w": jnp.array([x], jnp.bfloat16)} for x in (1.0, 256.0))
    found = line(start, tuned, (0.3,))[0.3]["w"]
    assert found.dtype == jnp.bfloat16
    assert found[0] == jnp.asarray(0.7 * 1.0 + 0.3 * 256.0, jnp.bfloat16)


def test_trees_are_made_one_at_a_time():
    endless = wise_ft.wise_ft(START, TUNED, [0.5] * 10)
    first = [alpha for alpha, _ in itertools.islice(endless, 2)]
    assert first == [0.5, 0.5] and len(list(endless)) == 8
