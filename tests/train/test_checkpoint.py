import json
import pathlib
import shutil
import subprocess
import sys
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


def layers(count):
    return {f"layer_{i}": {"kernel": jnp.full((2, 3), float(i))} for i in range(count)}


@pytest.mark.parametrize(("wrote", "reads"), [(12, 16), (16, 12)])
@pytest.mark.parametrize("include", [None, "model/*"])
def test_more_or_fewer_layers_are_an_error(tmp_path, wrote, reads, include):
    # Orbax itself restores 12 layers into 16 without a word: orbax#2972.
    saved = opened(tmp_path)
    checkpoint.save(saved, 1, {"model": layers(wrote)}, {})
    with pytest.raises(
        ValueError, match="of another model: .model/layer_12/kernel: saved"
    ) as caught:
        checkpoint.restore(saved, {"model": layers(reads)}, include=include)
    assert ("saved nothing" in str(caught.value)) == (wrote < reads)
    stacked = {"kernel": jnp.zeros((reads, 2, 3))}
    checkpoint.save(saved, 2, {"model": {"kernel": jnp.zeros((wrote, 2, 3))}}, {})
    with pytest.raises(ValueError, match="model/kernel: saved 'float32"):
        checkpoint.restore(saved, {"model": stacked}, include=include)
    checkpoint.close(saved)


def test_a_part_is_restored_and_the_rest_stays(tmp_path):
    saved = opened(tmp_path)
    checkpoint.save(saved, 1, {"state": make_state(1), "best": {"x": jnp.ones(2)}}, {})
    like = {"state": make_state(5, rows=3), "best": {"x": jnp.zeros(2)}}
    found = checkpoint.restore(saved, like, include=["state/params/body/*", "state/key"])
    checkpoint.close(saved)
    expected = make_state(5)._replace(
        params={"body": make_state(1).params["body"], "half": make_state(5).params["half"]},
        key=make_state(1).key,
    )
    assert bits(found) == bits({"state": expected, "best": {"x": jnp.zeros(2)}})


def test_only_the_part_is_compared_and_read(tmp_path):
    rng = np.random.default_rng(0)
    body = {f"w{i}": rng.normal(size=(2**18,)).astype(np.float32) for i in range(12)}
    saved = opened(tmp_path)
    checkpoint.save(saved, 1, {"params": {"body": body, "head": np.ones((4, 10))}}, {}, wait=True)

    def read_bytes():
        return int(pathlib.Path("/proc/self/io").read_text().split()[1])

    before = read_bytes()
    like = {"body": {"w3": np.zeros(2**18, np.float32)}, "head": np.zeros((4, 3))}
    found = checkpoint.restore(saved, {"params": like}, include="params/body/w3")
    assert read_bytes() - before < 3 * 2**20, "one array is 1 MiB, all are 12"
    np.testing.assert_array_equal(found["params"]["body"]["w3"], body["w3"])
    np.testing.assert_array_equal(found["params"]["head"], like["head"])
    checkpoint.close(saved)


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path):
    saved = opened(tmp_path)
    checkpoint.save(saved, 1, {"state": {"params": {"body": jnp.ones(2)}}}, {})
    like = {"state": {"params": {"body": jnp.zeros(2)}}}
    with pytest.raises(ValueError, match=r"'state/parms/\*'.*nearest is 'state/params/body'"):
        checkpoint.restore(saved, like, include=["state/params/*", "state/parms/*"])
    more = {"state": {"params": {"body": jnp.zeros(2), "head": jnp.zeros(2)}}}
    with pytest.raises(ValueError, match="state/params/head: saved nothing"):
        checkpoint.restore(saved, more, include="*head")
    with pytest.raises(ValueError, match="state/params/body: saved .* now nothing"):
        checkpoint.restore(saved, {"state": {"params": {}}}, include="*body")
    checkpoint.close(saved)


def test_what_orbax_s_standard_save_wrote_is_read(tmp_path):
    import orbax.checkpoint as ocp

    saved = opened(tmp_path)
    entry = {
        "fingerprint": saved.fingerprint,
        "arrays": {"s": {"a/b": "float32[3]", "c": "int32[]"}},
        "record": {"old": True},
    }
    tree = ocp.args.StandardSave({"a/b": jnp.arange(3.0), "c": jnp.int32(7)})
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(4, args=ocp.args.Composite(s=tree, record=ocp.args.JsonSave(entry)))
        manager.wait_until_finished()
    again = opened(tmp_path)
    assert checkpoint.latest(again) == {"old": True}
    like = {"a": {"b": jnp.zeros(3)}, "c": jnp.int32(0)}
    whole = checkpoint.restore(again, {"s": like})["s"]
    part = checkpoint.restore(again, {"s": like}, include="s/c")["s"]
    checkpoint.close(again)
    assert bits(whole) == bits({"a": {"b": jnp.arange(3.0)}, "c": jnp.int32(7)})
    assert bits(part) == bits({"a": {"b": jnp.zeros(3)}, "c": jnp.int32(7)})


def test_a_full_disk_says_so_and_the_last_checkpoint_stands(tmp_path):
    code = f"""
import resource, sys
import jax.numpy as jnp, numpy as np
from jtl.train import checkpoint

saved = checkpoint.open_checkpoints({str(tmp_path)!r}, fingerprint={{}}, keep=1)
x = np.random.default_rng(0).normal(size=2**18).astype(np.float32)
checkpoint.save(saved, 1, {{"x": x}}, {{"n": 1}}, wait=True)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, most))
for wait in (True, False):
    try:
        checkpoint.save(saved, 2, {{"x": x + 1}}, {{"n": 2}}, wait=wait)
        checkpoint.latest(saved)
    except OSError as error:
        print("refused" if "the last whole one is 1; make room" in str(error) else error)
    else:
        print("written")
    print(checkpoint.latest(saved), np.array_equal(checkpoint.restore(saved, {{"x": x}})["x"], x))
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
checkpoint.save(saved, 3, {{"x": x + 3}}, {{"n": 3}})
print(checkpoint.latest(saved))
checkpoint.close(saved)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    stood = ["refused", "{'n': 1} True"]
    assert done.stdout.splitlines() == [*stood, *stood, "{'n': 3}"], done.stderr[-2000:]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", pathlib.Path("/proc/nothing")):
        with pytest.raises(OSError, match="cannot be written in .*; give a folder that can"):
            opened(folder)


MOMENTS = ("tmp", "bytes", "record", "whole")
KILLED = """
import os, pathlib, signal, sys, threading, time
import numpy as np
import orbax.checkpoint
from jtl.train import checkpoint

PATTERNS = {
    "tmp": "2.*tmp*",
    "bytes": "2.*tmp*/x*/ocdbt*/d/*",
    "record": "2.*tmp*/record/metadata",
    "whole": "2/x/_METADATA",
}

def watch(folder, pattern):
    while not any(folder.glob(pattern)):
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)

def save_until_killed(folder, pattern):
    saved = checkpoint.open_checkpoints(folder, fingerprint={})
    x = np.random.default_rng(0).normal(size=2**23).astype(np.float32)
    checkpoint.save(saved, 1, {"x": x + 1}, {"n": 1}, wait=True)
    threading.Thread(target=watch, args=(folder, pattern), daemon=True).start()
    checkpoint.save(saved, 2, {"x": x + 2}, {"n": 2})
    checkpoint.close(saved)
    time.sleep(20)
    os._exit(0)

for moment in sys.argv[2:]:
    child = os.fork()  # nothing has run in jax yet: one import serves all
    if not child:
        save_until_killed(pathlib.Path(sys.argv[1]) / moment, PATTERNS[moment])
    print(moment, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_kill_in_mid_save_leaves_one_whole_checkpoint(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), *MOMENTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [word for m in MOMENTS for word in (m, "-9")], done.stderr[-2000:]
    x = np.random.default_rng(0).normal(size=2**23).astype(np.float32)
    stands = {}
    for moment in MOMENTS:
        again = checkpoint.open_checkpoints(tmp_path / moment, fingerprint={})
        stands[moment] = checkpoint.latest(again)["n"]
        found = checkpoint.restore(again, {"x": x})["x"]
        np.testing.assert_array_equal(found, x + stands[moment])
        checkpoint.save(again, 2, {"x": x}, {"n": 9}, wait=True)
        checkpoint.close(again)
        gone(tmp_path / moment, "*tmp*")
    assert stands["tmp"] == 1 and stands["whole"] == 2


def test_an_unfinished_save_is_ignored_and_removed(tmp_path):
    saved = opened(tmp_path)
    checkpoint.save(saved, 1, {"x": jnp.ones(2)}, {"step": 1})
    checkpoint.close(saved)
    half = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", half)
    again = opened(tmp_path)
    assert checkpoint.latest(again) == {"step": 1}
    checkpoint.close(again)
    gone(tmp_path, half.name)


def gone(folder, pattern):
    for _ in range(100):  # Orbax removes it in a thread of its own
        if not list(folder.glob(pattern)):
            return
        time.sleep(0.1)
    pytest.fail(f"{list(folder.glob(pattern))} are still there")


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
