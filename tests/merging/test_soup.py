import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.merging import soup
from jtl.train.evaluate import make_predict


def numbers(*values):
    return {f"run{i}": {"w": jnp.array([value])} for i, value in enumerate(values)}


def near(goal):
    return lambda tree: -abs(float(tree["w"][0]) - goal)


def test_the_mean_by_hand_and_of_one():
    found = soup.uniform(list(numbers(1.0, 2.0, 6.0).values()))
    assert found["w"].tolist() == [3.0]
    alone = {"w": jnp.array([0.1])}
    assert soup.uniform([alone]) is alone


def test_numbers_that_all_share_keep_their_bits():
    shared = jax.random.normal(jax.random.key(0), (2000,))
    found = soup.uniform([{"w": shared}] * 3)
    assert np.array_equal(found["w"], shared)
    assert not np.array_equal((shared + shared + shared) / 3, shared)  # the plain mean moves some


def test_half_precision_is_added_in_float32():
    drawn = [{"w": jnp.array([x], jnp.bfloat16)} for x in (1.0, 256.0, 256.0, 256.0)]
    found = soup.uniform(drawn)["w"]
    assert found.dtype == jnp.bfloat16
    assert found[0] == jnp.asarray((1 + 3 * 256) / 4, jnp.bfloat16)


def test_greedy_takes_the_best_first_and_refuses_what_lowers_the_score():
    found = soup.greedy(numbers(9.0, 1.0, 3.5), near(2.0))
    assert found.scores == {"run0": -7.0, "run1": -1.0, "run2": -1.5}
    # 1 and 3.5 give 2.25, nearer to 2 than 1; with 9 the mean is 4.5
    assert found.kept == ("run1", "run2")
    assert found.tried == (("run1", -1.0), ("run2", -0.25), ("run0", -2.5))
    assert found.score == -0.25 and found.params["w"].tolist() == [2.25]


def test_greedy_goes_on_after_a_refusal_from_the_soup_without_it():
    found = soup.greedy(numbers(2.0, -1.0, 4.5, 2.4), near(2.0))
    # order 2, 2.4, 4.5, -1: 2.2 is refused, so are 3.25 and 0.5
    assert found.kept == ("run0",) and found.params["w"].tolist() == [2.0]
    assert [round(score, 3) for _, score in found.tried] == [0.0, -0.2, -1.25, -1.5]


def test_an_equal_score_is_kept():
    assert soup.greedy(numbers(1.0, 2.0), lambda tree: 0.5).kept == ("run0", "run1")


def test_greedy_never_scores_worse_than_the_best_alone():
    for seed in range(5):
        drawn = np.random.default_rng(seed).normal(size=6).tolist()
        found = soup.greedy(numbers(*drawn), near(0.3))
        assert found.score >= max(found.scores.values())


def test_trees_are_loaded_on_demand_twice_each():
    read = []

    class Folders(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    soup.greedy(Folders(numbers(1.0, 2.0, 3.0)), near(2.0))
    assert read.count("run1") == read.count("run2") == 2  # the type check looks at the first too


def test_nothing_and_a_nan_are_refused():
    with pytest.raises(ValueError, match="0 ingredients"):
        soup.uniform([])
    with pytest.raises(ValueError, match="0 ingredients"):
        soup.greedy({}, near(0.0))
    with pytest.raises(ValueError, match="run0 is nan"):
        soup.greedy(numbers(1.0), lambda tree: float("nan"))
    with pytest.raises(ValueError, match="shapes"):
        soup.uniform([{"w": jnp.zeros(2)}, {"w": jnp.zeros(3)}])
    with pytest.raises(ValueError, match="floating point"):
        soup.uniform([{"w": jnp.array(2)}, {"w": jnp.array(3)}])


def test_greedy_with_the_predictions_of_a_model():
    """The README's lines: `make_predict` once, and the accuracy on validation data as score."""
    x = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 2.0]], np.float32)
    labels = np.array([0, 1, 0, 1])
    batch = {"x": x, "mask": np.ones(4, bool), "index": np.arange(4)}

    def apply(params, stats, batch, *, key, live):
        return {"head": batch["x"] @ params["kernel"]}, stats

    predict = make_predict(apply, heads=("head",))

    def score(params):
        logits = predict(params, {}, [batch])["head"]
        return float((logits.argmax(-1) == labels).mean())

    tuned = {
        "low": {"kernel": jnp.eye(2)[::-1]},
        "half": {"kernel": jnp.array([[1.0, 0.0], [2.5, 0.0]])},
        "good": {"kernel": jnp.eye(2)},
    }
    found = soup.greedy(tuned, score)
    assert found.scores == {"low": 0.0, "half": 0.5, "good": 1.0}
    assert found.kept[0] == "good" and found.score == 1.0
    assert score(found.params) == 1.0
