import jax
import jax.numpy as jnp
import network
import numpy as np
import pytest

from jtl.train.evaluate import make_evaluate, make_predict

STATS = {"mean": jnp.array([np.nan, -0.0])}


def double(params, stats, batch, *, key, live):
    assert key is None and live == frozenset()
    return {"a": batch["x"] * params["w"], "b": batch["x"].astype(jnp.bfloat16)}, stats


def rows(index, *, mask=None):
    index = np.asarray(index, np.int32)
    mask = np.ones(len(index), bool) if mask is None else np.asarray(mask)
    return {"x": index[:, None].astype(np.float32), "mask": mask, "index": index}


PARAMS = {"w": jnp.float32(2.0)}


def test_predictions_come_in_the_order_of_the_data():
    batches = [rows([4, 0]), rows([2, 3, 0], mask=[True, True, False]), rows([1, 5])]
    batches[1]["index"][2] = -1
    found = make_predict(double, heads=("a", "b"))(PARAMS, STATS, batches)
    np.testing.assert_array_equal(found["a"][:, 0], [0, 2, 4, 6, 8, 10])
    np.testing.assert_array_equal(found["b"][:, 0], [0, 1, 2, 3, 4, 5])
    assert found["a"].dtype == found["b"].dtype == np.float32


def test_sums_add_up_over_batches():
    def sums(out, batch):
        real = batch["mask"]
        return {"total": jnp.sum(jnp.where(real[:, None], out["a"], 0.0)), "count": jnp.sum(real)}

    batches = [rows([4, 0]), rows([2, 3, 9], mask=[True, True, False])]
    found = make_evaluate(double, sums)(PARAMS, STATS, iter(batches))
    assert found == {"total": 18.0, "count": 4.0}


def test_many_small_numbers_add_up_in_float64():
    big = {"x": np.array([[2.0**24]], np.float32), "mask": np.ones(1, bool)}
    small = {"x": np.array([[1.0]], np.float32), "mask": np.ones(1, bool)}
    evaluate = make_evaluate(double, lambda out, batch: jnp.sum(out["a"]))
    assert float(evaluate({"w": jnp.float32(1.0)}, STATS, [big, small])) == 2.0**24 + 1


def test_dropout_is_off_and_the_result_repeats():
    predict = make_predict(network.make_apply(dropout=0.5), heads=("head",))
    params, batch = network.parameters(), network.batch(8)
    first = predict(params, {}, [batch])["head"]
    np.testing.assert_array_equal(first, predict(params, {}, [batch])["head"])
    plain = network.make_apply()(params, {}, batch, key=None, live=frozenset())[0]["head"]
    np.testing.assert_allclose(first, plain, atol=1e-6)


def test_one_compilation_for_each_shape():
    traces = []

    def apply(params, stats, batch, *, key, live):
        traces.append(batch["x"].shape)
        return double(params, stats, batch, key=key, live=live)

    predict = make_predict(apply, heads=("a",))
    for _ in range(3):
        predict(PARAMS, STATS, [rows([0, 1]), rows([2, 3, 4]), rows([5, 6])])
    assert sorted(traces) == [(2, 1), (3, 1)]


def test_an_evaluation_that_moves_statistics_is_an_error():
    def drifting(params, stats, batch, *, key, live):
        return {"a": batch["x"]}, {"mean": stats["mean"] + 1.0}

    with pytest.raises(ValueError, match="1 of 1 held leaves changed: 'mean"):
        make_predict(drifting, heads=("a",))(PARAMS, {"mean": jnp.zeros(2)}, [rows([0])])


def test_errors():
    predict = make_predict(double, heads=("a", "c"))
    with pytest.raises(ValueError, match=r"heads \['c'\] are asked for; the model gives \['a'"):
        predict(PARAMS, STATS, [rows([0])])
    predict = make_predict(double, heads=("a",))
    with pytest.raises(ValueError, match="no batches"):
        predict(PARAMS, STATS, [])
    with pytest.raises(ValueError, match=r"1 rows of 4 come twice, first \[1\]"):
        predict(PARAMS, STATS, [rows([0, 1]), rows([1, 2])])


def test_parameters_may_be_anywhere():
    from jtl.train.mesh import make_mesh, replicate

    predict = make_predict(double, heads=("a",))
    placed = replicate(PARAMS, make_mesh())
    np.testing.assert_array_equal(predict(placed, STATS, [rows([0, 1])])["a"][:, 0], [0.0, 2.0])
    assert jax.tree.leaves(placed)[0].sharding.num_devices == 8
