import json
import pathlib
import shutil
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import trees
from jtl.train import checkpoint

CONFIG = {"config": {"rate": 0.1, "plan": ("a", "b")}}


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: object
    key: jax.Array


def make_state(seed=0, rows=3):
    key = jax.random.key(seed)
    params = {
        "body": {"kernel": jax.random.normal(key, (rows, 4)), "none": jnp.zeros((0, 2))},
        "half": jnp.full((5,), 1.5 + seed, jnp.bfloat16),
    }
    labels = {"body": {"kernel": "live", "none": "held"}, "half": "live"}
    tx = optax.multi_transform({"live": optax.adam(0.1), "held": optax.set_to_zero()}, labels)
    return State(jnp.int32(seed), params, tx.init(params), key)


def bits(tree):
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    ]
    return [
        (name, np.asarray(x).tobytes()) for name, x in zip(trees.names(tree), leaves, strict=True)
    ]


def opened(folder, **fingerprint):
    return checkpoint.open_checkpoints(folder, fingerprint=fingerprint or CONFIG)


def test_a_state_comes_back_bit_for_bit_with_its_structure(tmp_path):
    state = make_state(1)
    saved = opened(tmp_path)
    checkpoint.save(saved, 7, {"state": state}, {"phase": 2, "metric": 0.1})
    checkpoint.close(saved)
    again = opened(tmp_path)
    assert checkpoint.latest(again) == {"phase": 2, "metric": 0.1}
    found = checkpoint.restore(again, {"state": make_state(0)})["state"]
    checkpoint.close(again)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert bits(found) == bits(state)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True)
    assert all(a.dtype == b.dtype and a.committed == b.committed for a, b in pairs)


def test_a_new_folder_has_nothing(tmp_path):
    new = opened(tmp_path / "new")
    assert checkpoint.latest(new) is None
    with pytest.raises(ValueError, match="holds no checkpoint; save one"):
        checkpoint.restore(new, {"state": make_state()})
    checkpoint.close(new)


def test_donating_what_was_just_saved_leaves_the_checkpoint_alone(tmp_path):
    move = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 1.5 + 1, x), donate_argnums=0)
    state = {"x": jnp.arange(2.0**20), "y": jnp.ones((512, 512))}
    kept = jax.tree.map(np.array, state)
    saved = opened(tmp_path)
    checkpoint.save(saved, 1, {"state": state}, {})
    for _ in range(5):
        state = move(state)
    found = checkpoint.restore(saved, {"state": state})["state"]
    checkpoint.close(saved)
    assert bits(found) == bits(kept)


def test_part_of_a_checkpoint_restores_without_the_rest(tmp_path):
    state, best = make_state(1), {"x": jnp.ones(3), "hole": None}
    saved = opened(tmp_path)
    checkpoint.save(saved, 1, {"state": state, "best": best}, {})
    found = checkpoint.restore(saved, {"best": {"x": jnp.zeros(3), "hole": None}})
    checkpoint.close(saved)
    assert list(found) == ["best"] and bits(found["best"]) == bits(best)


def test_saves_of_one_step_follow_each_other(tmp_path):
    saved = opened(tmp_path)
    for value in (1.0, 2.0, 3.0):
        checkpoint.save(saved, 5, {"x": jnp.full(2, value)}, {"value": value})
    assert checkpoint.latest(saved) == {"value": 3.0}
    assert bits(checkpoint.restore(saved, {"x": jnp.zeros(2)})["x"]) == bits(jnp.full(2, 3.0))
    checkpoint.save(saved, 20, {"x": jnp.full(2, 9.0)}, {"value": 9.0})
    checkpoint.close(saved)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "7"], "two are kept"


def test_a_placed_array_comes_back_in_its_place(tmp_path):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(jnp.arange(8.0), spread)
    saved = opened(tmp_path)
    checkpoint.save(saved, 1, {"x": x}, {})
    found = checkpoint.restore(saved, {"x": x})["x"]
    alone = checkpoint.restore(saved, {"x": jnp.zeros(8)})["x"]
    checkpoint.close(saved)
    assert found.sharding == spread and not alone.committed
    assert bits(found) == bits(alone) == bits(x)


def test_another_config_is_refused_with_the_differences(tmp_path):
    saved = opened(tmp_path)
    checkpoint.save(saved, 1, {"x": jnp.ones(2)}, {})
    checkpoint.close(saved)
    other = {"rate": 0.2, "plan": ("a", "c"), "seed": 1}
    with pytest.raises(ValueError) as caught:
        opened(tmp_path, config=other)
    text = str(caught.value)
    for part in (
        "of another run",
        "config/rate: saved 0.1, now 0.2",
        "config/plan/1: saved 'b', now 'c'",
        "config/seed: saved nothing, now 1",
        "go on with the config",
    ):
        assert part in text
    assert "plan/0" not in text
    checkpoint.close(opened(tmp_path))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"x": jnp.ones(3)}, r"state/x: saved 'float32\[2\]', now 'float32\[3\]'"),
        ({"x": jnp.ones(2, jnp.bfloat16)}, r"state/x: saved 'float32\[2\]', now 'bfloat16\[2\]'"),
        ({"x": jnp.ones(2), "y": jnp.ones(1)}, r"state/y: saved nothing, now 'float32\[1\]'"),
        ({"y": jnp.ones(2)}, r"state/x: saved 'float32\[2\]', now nothing"),
    ],
)
def test_another_model_is_refused_with_the_differences(tmp_path, like, message):
    saved = opened(tmp_path)
    checkpoint.save(saved, 1, {"state": {"x": jnp.ones(2)}}, {})
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(saved, {"state": like})
    checkpoint.close(saved)


def test_a_damaged_checkpoint_says_so(tmp_path):
    saved = opened(tmp_path)
    checkpoint.save(saved, 1, {"x": jnp.arange(1000.0)}, {})
    checkpoint.close(saved)
    for file in (tmp_path / "1" / "x").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:40])
    again = opened(tmp_path)
    with pytest.raises(ValueError, match="checkpoint 1 in .* cannot be read.*remove the folder 1"):
        checkpoint.restore(again, {"x": jnp.zeros(1000)})
    checkpoint.close(again)


def test_an_unfinished_save_is_ignored_and_removed(tmp_path):
    saved = opened(tmp_path)
    checkpoint.save(saved, 1, {"x": jnp.ones(2)}, {"step": 1})
    checkpoint.close(saved)
    half = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", half)
    again = opened(tmp_path)
    assert checkpoint.latest(again) == {"step": 1}
    checkpoint.close(again)
    for _ in range(100):  # Orbax removes it in a thread of its own
        if not half.exists():
            return
        time.sleep(0.1)
    pytest.fail(f"{half} is still there")


def test_the_record_is_plain_json_on_disk(tmp_path):
    saved = opened(tmp_path)
    checkpoint.save(saved, 3, {"x": jnp.ones(2)}, {"folder": pathlib.Path("a")})
    checkpoint.close(saved)
    entry = json.loads((tmp_path / "3" / "record" / "metadata").read_text())
    assert entry["record"] == {"folder": "a"}
    assert entry["arrays"] == {"x": {"": "float32[2]"}}


def test_orbax_v1_reads_what_we_wrote(tmp_path):
    from orbax.checkpoint import v1

    saved = opened(tmp_path)
    checkpoint.save(saved, 3, {"state": {"a": {"b": jnp.arange(3.0)}}}, {})
    checkpoint.close(saved)
    found = v1.load_checkpointables(tmp_path / "3", {"state": {"a/b": np.zeros(3, np.float32)}})
    np.testing.assert_array_equal(found["state"]["a/b"], np.arange(3.0))
