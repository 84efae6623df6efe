import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import network
import numpy as np
import pytest
import worker

from jtl.train import checkpoint, parallel


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def in_two_processes(folder):
    """Run the worker twice, side by side; return what each printed."""
    script, root = pathlib.Path(worker.__file__), pathlib.Path(__file__).parents[2]
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": f"{root}:{script.parent}"}
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(process), "2", str(port), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        printed = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], [
        err[-2000:] for _, err in printed
    ]
    lines = (out.splitlines() for out, _ in printed)
    return [json.loads(next(line for line in out if line.startswith("{"))) for out in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process for four steps; and one for two, then two processes for two."""
    folder = tmp_path_factory.mktemp("checkpoints")
    alone = parallel.make_spread("data", jax.devices()[:1])
    _, _, held = worker.train(folder / "two", alone, (0, 1))
    both = in_two_processes(folder / "two")
    worker.train(folder / "one", alone, (0, 1))
    state, losses, _ = worker.train(folder / "one", alone, (2, 3))
    return folder, both, held, state, losses


def test_two_processes_have_the_losses_of_one(runs):
    _, both, _, _, losses = runs
    assert both[0]["losses"] == both[1]["losses"]
    np.testing.assert_allclose(both[0]["losses"], losses, rtol=1e-5)
    assert [one["rows"] for one in both] == [[0, 6], [6, 12]]


def test_the_held_proof_holds_across_processes(runs):
    _, both, held, _, _ = runs
    assert both[0]["held"] == both[1]["held"] == held
    assert "params/body/block_0/kernel" in held
    assert any(name.startswith("opt_state/block_0") for name in held)


def test_each_process_keeps_half(runs):
    for one in runs[1]:
        assert one["shares"][0] == 0.5 and 0.5 in one["shares"][1:]


def test_a_checkpoint_of_two_processes_is_read_by_one(runs):
    folder, _, _, state, losses = runs
    saved = checkpoint.open_checkpoints(folder / "two", fingerprint={})
    record = checkpoint.latest(saved)
    assert record is not None
    np.testing.assert_allclose(record["losses"], losses, rtol=1e-5)
    like, _, _ = worker.ready(seed=5)
    found = checkpoint.restore(saved, {"state": like})["state"]
    spread = parallel.make_spread("fsdp", threshold=1024)
    eight = checkpoint.restore(saved, {"state": parallel.place(spread, like)})["state"]
    checkpoint.close(saved)
    for part in ("params", "opt_state", "step"):
        network.close(getattr(found, part), getattr(state, part), 1e-5)
        jax.tree.map(np.testing.assert_array_equal, getattr(found, part), getattr(eight, part))
    assert (jax.random.key_data(found.key) == jax.random.key_data(state.key)).all()
    assert not found.params["head"]["kernel"].committed


def test_processes_that_begin_apart_are_refused(runs):
    for one in runs[1]:
        assert "the 2 processes begin with different arrays; load the same" in one["refused"]
