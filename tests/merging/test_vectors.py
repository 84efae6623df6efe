"""Task vectors, and what trims, thins and merges them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import masks
from jtl.merging import dare, task_vectors, ties

START = {"body": jnp.array([1.0, 2.0]), "head": jnp.array([5.0])}
TUNED = {"body": jnp.array([1.5, -2.0]), "head": jnp.array([9.0])}
BODY = {"body": True, "head": False}


def test_difference_addition_negation_and_scaling_by_hand():
    vector = task_vectors.difference(TUNED, START)
    assert vector["body"].tolist() == [0.5, -4.0] and vector["head"].tolist() == [4.0]
    assert task_vectors.add(START, vector)["body"].tolist() == [1.5, -2.0]
    forgot = task_vectors.add(START, task_vectors.negate(vector))
    assert forgot["body"].tolist() == [0.5, 6.0]
    half = task_vectors.scale(vector, 0.5)
    assert task_vectors.add(START, half, half)["body"].tolist() == [1.5, -2.0]


def test_outside_the_mask_nothing_is_read_or_moved():
    vector = task_vectors.difference(TUNED, {**START, "head": None}, mask=BODY)
    assert vector["head"] is None
    moved = task_vectors.add(START, vector, task_vectors.scale(vector, 1))
    assert moved["body"].tolist() == [2.0, -6.0]
    assert moved["head"] is START["head"]
    with pytest.raises(ValueError, match=r"'head' has the shapes \[\(1,\), None\]"):
        task_vectors.difference(TUNED, {**START, "head": None})


def test_vectors_of_different_masks_add_up():
    body = task_vectors.difference(TUNED, START, mask=BODY)
    head = task_vectors.difference(TUNED, START, mask={"body": False, "head": True})
    both = task_vectors.add(START, body, head)
    assert all(np.array_equal(both[name], TUNED[name]) for name in TUNED)
    assert task_vectors.add(START) is START


def test_bfloat16_comes_back_bit_for_bit():
    drawn = [jax.random.normal(jax.random.key(i), (500,)).astype(jnp.bfloat16) for i in (0, 1)]
    vector = task_vectors.difference({"w": drawn[1]}, {"w": drawn[0]})
    assert vector["w"].dtype == jnp.float32
    found = task_vectors.add({"w": drawn[0]}, vector)["w"]
    assert found.dtype == jnp.bfloat16 and bool((found == drawn[1]).all())
    rounded = vector["w"].astype(jnp.bfloat16)
    assert not bool((drawn[0] + rounded == drawn[1]).all())  # why vectors are float32


@pytest.mark.parametrize(
    "made",
    [
        lambda tree: task_vectors.difference(tree, tree),
        lambda tree: task_vectors.add(tree, tree),
        task_vectors.negate,
        lambda tree: ties.ties([tree]),
        lambda tree: dare.dare(tree, 0.5, key=jax.random.key(0)),
    ],
)
def test_integers_are_refused_by_name(made):
    with pytest.raises(ValueError, match="'steps' is of .*int32"):
        made({"steps": jnp.array([1, 2])})


def test_trim_counts_over_the_whole_vector():
    vector = {"a": jnp.array([1.0, -4.0, 0.1]), "b": jnp.array([0.2, 3.0])}
    found = ties.trim(vector, keep=0.4)
    assert found["a"].tolist() == [0.0, -4.0, 0.0] and found["b"].tolist() == [0.0, 3.0]
    assert ties.trim(vector, keep=1.0)["a"].tolist() == vector["a"].tolist()
    assert ties.trim({"a": jnp.array([1.0, 1.0, 2.0])}, keep=0.6)["a"].tolist() == [1.0, 1.0, 2.0]


def test_ties_by_hand():
    one = {"w": jnp.array([6.0, -1.0, 3.0, 0.5])}
    two = {"w": jnp.array([2.0, 4.0, -5.0, 0.1])}
    three = {"w": jnp.array([-1.0, 2.0, 0.2, -3.0])}
    # half is kept: (6, 0, 3, 0), (0, 4, -5, 0), (0, 2, 0, -3); signs +, +, -, -
    assert ties.ties([one, two, three], keep=0.5)["w"].tolist() == [6.0, 3.0, -5.0, -3.0]
    plain = np.mean([[6, 0, 3, 0], [0, 4, -5, 0], [0, 2, 0, -3]], axis=0)
    assert plain.tolist() != [6.0, 3.0, -5.0, -3.0]


def test_ties_of_one_is_its_trimmed_self_and_of_equals_the_same():
    vector = {"w": jax.random.normal(jax.random.key(0), (100,)), "head": None}
    alone = ties.ties([vector], keep=0.3)
    assert np.array_equal(alone["w"], ties.trim(vector, keep=0.3)["w"])
    assert int((alone["w"] != 0).sum()) == 30 and alone["head"] is None
    assert np.array_equal(ties.ties([vector, vector], keep=0.3)["w"], alone["w"])


def test_signs_that_cancel_give_zero():
    assert ties.ties([{"w": jnp.array([2.0])}, {"w": jnp.array([-2.0])}])["w"].tolist() == [0.0]


def test_held_leaves_do_not_thin_the_mean():
    moved, held = jnp.array([4.0, 2.0]), jnp.zeros(8)
    found = ties.ties([{"a": moved, "b": held}, {"a": jnp.zeros(2), "b": held + 1.0}], keep=1.0)
    assert found["a"].tolist() == [4.0, 2.0] and found["b"].tolist() == [1.0] * 8


def test_dare_keeps_or_drops_and_rescales():
    vector = {"w": jnp.full((4000,), 3.0), "b": jnp.full((4000,), 3.0), "head": None}
    found = dare.dare(vector, 0.75, key=jax.random.key(1))
    assert set(found["w"].tolist()) == {0.0, 12.0} and found["head"] is None
    assert abs(float((found["w"] == 0).mean()) - 0.75) < 0.03
    assert not np.array_equal(found["w"], found["b"])  # each leaf draws for itself
    again = dare.dare(vector, 0.75, key=jax.random.key(1))
    assert np.array_equal(found["w"], again["w"])


def test_the_mean_of_dare_over_keys_is_the_vector():
    vector = {"w": jnp.array([1.0, -2.0, 5.0])}
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: dare.dare(vector, 0.5, key=key)["w"])(keys)
    # the standard error of a mean of x is |x| / sqrt(4000)
    np.testing.assert_allclose(drawn.mean(0), vector["w"], rtol=0.08)


def test_dare_without_dropping_is_the_vector():
    vector = {"w": jnp.array([0.1, 0.7], jnp.bfloat16)}
    found = dare.dare(vector, 0, key=jax.random.key(0))["w"]
    assert found.dtype == jnp.bfloat16 and np.array_equal(found, vector["w"])


def test_shares_outside_their_range_are_refused():
    vector = {"w": jnp.ones(2)}
    for drop in (1.0, -0.1):
        with pytest.raises(ValueError, match="below 1"):
            dare.dare(vector, drop, key=jax.random.key(0))
    for keep in (0.0, 1.1):
        with pytest.raises(ValueError, match="survives"):
            ties.ties([vector], keep=keep)
    with pytest.raises(ValueError, match="0 task vectors"):
        ties.ties([])


def test_a_mask_from_labels_does():
    labels = masks.label(TUNED, [("head", "head"), (".*", "body")])
    vector = task_vectors.difference(TUNED, START, mask=masks.mask(labels, "body"))
    assert vector["head"] is None and vector["body"].tolist() == [0.5, -4.0]
