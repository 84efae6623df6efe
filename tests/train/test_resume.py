import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
import run_toy as toy

from jtl import trees
from jtl.train import checkpoint
from jtl.train.plan import EarlyStop, Phase, Plateau

BODY_AND_HEAD = {"head": 0.05, "body": 0.01}


def plan():
    """Three phases of 4, up to 8 and 6 steps; the second ends early and restores step 8."""
    return [
        Phase("head", {"head": 0.05}, epochs=1),
        Phase("open", BODY_AND_HEAD, epochs=3, until=Plateau(), series="opening"),
        Phase("all", {"norm": 0.01, **BODY_AND_HEAD}, epochs=1.5, until=EarlyStop()),
    ]


FIGURES = {0: 0.1, 4: 0.2, 8: 0.4, 12: 0.3, 16: 0.5, 18: 0.45}


class Falling:
    """An `evaluate` whose figures are a matter of the step alone, so that it can start anywhere."""

    def __init__(self):
        self.step = 0

    def __call__(self, params, stats, live):
        return {"score": FIGURES[self.step]}


def follow(folder, *, save_every=None, at=None, **changes):
    """Run until `at(event)` is true, take a copy of the folder as a kill would leave it; or run on.

    Returns the last state, the rows of the history, and the kinds and steps of the events.
    """
    saved = None if folder is None else checkpoint.open_checkpoints(folder, fingerprint={})
    evaluate = Falling()
    done = None if saved is None else checkpoint.latest(saved)
    evaluate.step = 0 if done is None else done["step"]
    options = {"evaluate": evaluate, "checkpoints": saved, "save_every": save_every, **changes}
    seen, stream = [], toy.start(plan(), **options)
    for event in stream:
        evaluate.step = event.progress.step
        seen.append((event.kind, event.step))
        last = event.progress.history, toy.copied(event.state)
        if at is not None and at(event):
            killed = folder.with_name(folder.name + "_killed")
            saved.manager.wait_until_finished()
            shutil.copytree(folder, killed)
            stream.close()
            break
    if saved is not None:
        checkpoint.close(saved)
    return (*last, seen)


def same(a, b):
    return not trees.changes(a, b)


@pytest.fixture(scope="module")
def whole():
    history, state, seen = follow(None)
    assert [row["metric_after"] for row in history] == [0.2, 0.4, 0.5]
    return history, state, seen


def lasting(history):
    """Return the rows without times."""
    own = ("flops_per_step", "compilations")  # of the process
    return [
        {name: v for name, v in row.items() if name not in own and not name.endswith("seconds")}
        for row in history
    ]


KILLS = {
    "mid phase": lambda e: e.kind == "step" and e.step == 3,
    "mid phase, after the best": lambda e: e.kind == "step" and e.step == 11,
    "after an evaluation": lambda e: e.kind == "evaluation" and e.step == 8,
    "end of a phase": lambda e: e.kind == "phase_end" and e.step == 4,
    "start of a phase": lambda e: e.kind == "phase_start" and e.step == 12,
    "in the last phase": lambda e: e.kind == "step" and e.step == 17,
    "at the very end": lambda e: e.kind == "phase_end" and e.step == 18,
}


@pytest.mark.parametrize("save_every", [None, 3])
@pytest.mark.parametrize("when", KILLS)
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, whole, when, save_every):
    folder = tmp_path / "run"
    follow(folder, at=KILLS[when], save_every=save_every)
    history, state, seen = follow(tmp_path / "run_killed", save_every=save_every)
    assert same(state, whole[1])
    assert lasting(history) == lasting(whole[0])
    assert seen[-1] == whole[2][-1] == ("phase_end", 18)


def test_a_run_killed_at_every_border_goes_on_from_there(tmp_path):
    follow(tmp_path / "run", at=KILLS["end of a phase"])
    _, _, seen = follow(tmp_path / "run_killed")
    assert seen[:3] == [("phase_end", 4), ("phase_start", 4), ("step", 5)]


def test_a_run_killed_in_a_phase_goes_on_from_its_last_save(tmp_path):
    follow(tmp_path / "run", at=KILLS["mid phase, after the best"], save_every=3)
    _, _, seen = follow(tmp_path / "run_killed", save_every=3)
    assert seen[:3] == [("phase_start", 4), ("step", 10), ("step", 11)]


def test_a_finished_run_gives_its_last_event_and_trains_nothing(tmp_path, whole):
    follow(tmp_path / "run")
    history, state, seen = follow(tmp_path / "run")
    assert seen == [("phase_end", 18)] and same(state, whole[1])
    assert lasting(history) == lasting(whole[0])


def test_the_best_weights_survive_on_disk(tmp_path):
    """Killed after the best, at step 11: what step 12 restores was never in the second process."""
    best = []

    def at(event):
        if (event.kind, event.step) == ("evaluation", 8):
            best.append(toy.copied(event.state))
        return KILLS["mid phase, after the best"](event)

    follow(tmp_path / "run", at=at, save_every=1)
    killed = checkpoint.open_checkpoints(tmp_path / "run_killed", fingerprint={})
    record = checkpoint.latest(killed)
    checkpoint.close(killed)
    assert (record["best_step"], record["best_metric"]) == (8, 0.4) and record["step"] > 8
    stop = lambda e: e.kind == "phase_end" and e.step == 12  # noqa: E731
    _, state, _ = follow(tmp_path / "run_killed", at=stop)
    assert same(state.params, best[0].params) and same(state.stats, best[0].stats)


def test_seconds_add_up_over_interruptions(tmp_path):
    follow(tmp_path / "run", at=KILLS["mid phase"], save_every=1)
    saved = checkpoint.open_checkpoints(tmp_path / "run_killed", fingerprint={})
    before = checkpoint.latest(saved)["seconds"]
    checkpoint.close(saved)
    history, _, _ = follow(tmp_path / "run_killed")
    assert history[0]["seconds"] > before > 0


def test_checkpoints_of_another_plan_or_model_are_refused(tmp_path):
    follow(tmp_path / "run", at=KILLS["mid phase"], save_every=1)
    saved = checkpoint.open_checkpoints(tmp_path / "run_killed", fingerprint={})
    with pytest.raises(ValueError, match=r"phases \['head', 'open', 'all'\]; this one has \['a"):
        toy.start([Phase("a", {"head": 0.1}, epochs=1)], checkpoints=saved)
    wider = [Phase(p.name, {"head": 0.1}, epochs=1) for p in plan()]
    with pytest.raises(ValueError, match="another model.*state/opt_state/.*body.*now nothing"):
        toy.start(wider, checkpoints=saved)
    checkpoint.close(saved)


def interrupting(event_step, where):
    """Return an `evaluate` or `feed` that sends this process a Ctrl-C at a step."""

    def hit():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    if where == "evaluation":
        inner = Falling()

        def evaluate(params, stats, live):
            figures = inner(params, stats, live)
            inner.step += 4
            if inner.step - 4 == event_step:
                hit()
            return figures

        return {"evaluate": evaluate}

    def feed(live, params, stats):
        def batches(start):
            while True:
                if start == event_step:
                    hit()
                yield toy.batch_at(start)
                start += 1

        return toy.feed(live, params, stats)._replace(batches=batches)

    return {"feed": feed}


@pytest.mark.parametrize(
    ("where", "step", "saved_step"), [("batch", 2, 2), ("batch", 10, 10), ("evaluation", 8, 8)]
)
def test_ctrl_c_saves_where_it_is(tmp_path, whole, where, step, saved_step):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        follow(folder, **interrupting(step, where))
    saved = checkpoint.open_checkpoints(folder, fingerprint={})
    assert checkpoint.latest(saved)["step"] == saved_step
    checkpoint.close(saved)
    _, state, _ = follow(folder)
    assert same(state, whole[1])


SCRIPT = """
import sys, pathlib
sys.path.insert(0, {here!r})
import test_resume
folder = pathlib.Path(sys.argv[1])
_, state, _ = test_resume.follow(folder, save_every=2, at=test_resume.announced)
"""


def announced(event):
    """Print each step, slowly enough to be killed anywhere."""
    print(event.kind, event.step, flush=True)
    time.sleep(0.02)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("line", ["step 3", "step 7", "phase_end 12", "step 15"])
def test_kill_9_and_go_on(tmp_path, whole, line):
    here = pathlib.Path(__file__).parent
    folder = tmp_path / "run"
    command = [sys.executable, "-c", SCRIPT.format(here=str(here)), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(here.parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        for printed in child.stdout:
            if printed.strip() == line:
                os.kill(child.pid, signal.SIGKILL)
                break
        child.wait()
    assert child.returncode == -signal.SIGKILL
    _, state, seen = follow(folder, save_every=2)
    assert same(state, whole[1])
    assert len(jax.tree.leaves(state)) > 0 and seen[-1] == ("phase_end", 18)
