"""Every config runs by its own command with `smoke=True`, on small real data, and leaves a run."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from jtl import config

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
FILES = {
    "fine_tune": {"config.json", "metrics.jsonl", "result.json", "report.html", "checkpoints"},
    "continual": {"config.json", "result.json", "report.html", "plain"},
    "find_rate": {"config.json", "result.json", "report.html"},
    "interpolate": {"config.json", "metrics.jsonl", "result.json", "report.html", "tuned"},
    "pareto": {"config.json", "result.json", "report.html", "strength_0", "strength_1"},
}
UNTRAINED = {"find_rate"}


def _get(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def _check(folder, recipe):
    there = {path.name for path in folder.iterdir()}
    assert FILES[recipe] <= there
    assert (folder / "model" / "model.safetensors").is_file() == (recipe not in UNTRAINED)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "quickstart"])
def test_a_config_runs_on_small_data(name, tmp_path, one_device):
    fields = _get(name)
    fields.smoke, fields.folder = True, str(tmp_path / "run")
    result = config.run(fields)
    written = _check(tmp_path / "run", fields.recipe)
    if fields.recipe == "fine_tune":
        assert written["held_bit_equal"] is True
        assert result["target"] == written["target"]
        assert set(written["baselines"]) == {"majority", "linear_probe"}
    elif fields.recipe == "find_rate":
        assert set(written["scales"]) == {"minimum/10", "slide", "steepest", "valley"}
    elif fields.recipe == "interpolate":
        assert [row["alpha"] for row in written["curve"]] == [0.0, 0.5, 1.0]
        assert set(written["retain"]) == {"imdb"}
    elif fields.recipe == "pareto":
        assert [point["strength"] for point in written["points"]] == [0.0, 1.0]
        assert written["taken"] in (0.0, 1.0)
    else:
        assert set(written["runs"]) >= {"plain"} and len(written["runs"]) > 1


@pytest.mark.slow
def test_the_command_line_runs_a_config(tmp_path):
    command = [sys.executable, "-m", "jtl", "--config=configs/quickstart.py"]
    flags = ["--config.smoke=True", f"--config.folder={tmp_path / 'run'}"]
    one_device = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    env = {**os.environ, "XLA_FLAGS": one_device}
    ended = subprocess.run([*command, *flags], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "linear probe" in ended.stdout and "report.html" in ended.stdout
    assert _check(tmp_path / "run", "fine_tune")["seed"] == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_sections_name_known_kinds_and_fields(name):
    fields = config.plain(_get(name))
    for chosen in (fields, {**fields, **fields["smoke_with"]}):
        for section in set(chosen) & set(config.TABLES) - {"recipe", *config.MANY}:
            config.bind(section, chosen[section])
        for many in config.MANY:
            for section in chosen.get(many, ()):
                config.bind(many, section)
        for sections in chosen.get("ways", {}).values():
            for section in sections:
                config.bind("penalties", section)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_short_and_says_its_command(name):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"python -m jtl --config=configs/{name}.py" in text
    assert len(text.splitlines()) <= 85
