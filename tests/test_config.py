"""Sections become calls; what is not known is an error that lists what is."""

import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from jtl import config


def test_every_kind_of_every_table_resolves_to_a_function():
    for section, table in config.TABLES.items():
        for kind in table:
            assert callable(config.resolve(section, kind)), (section, kind)


def test_build_passes_fields_and_given_arguments():
    tx = config.build("optimizer", {"kind": "sgd", "momentum": 0.5})
    assert hasattr(tx, "update")


def test_unknown_kind_lists_the_known_ones_and_the_nearest():
    with pytest.raises(ValueError, match=r"no kind 'adamv'; it has \[.*'sgd'.*mean 'adam"):
        config.build("optimizer", {"kind": "adamv"})


def test_unknown_field_lists_the_known_ones_and_the_nearest():
    with pytest.raises(ValueError, match=r"no field 'wieght_decay'.*did you mean 'weight_decay'"):
        config.build("optimizer", {"kind": "adamw", "wieght_decay": 0.1})


def test_a_lacking_field_and_a_section_that_is_none_are_named():
    with pytest.raises(ValueError, match=r"data of kind 'tfds' lacks \['name'\]"):
        config.build("data", {"kind": "tfds"})
    with pytest.raises(ValueError, match=r"section penalties is 'l2_sp'; write .*'ewc'"):
        config._one_of("penalties", "l2_sp")
    with pytest.raises(ValueError, match=r"recipe 'fine_tune' lacks \['data', 'folder'\]"):
        config.run({"backbone": {"kind": "pretrained", "name": "x"}})


def test_smoke_does_not_hide_a_bad_field_of_the_section_that_it_replaces():
    sections = {"plan": {"kind": "full", "epoks": 1}, "smoke_with": {"plan": {"kind": "full"}}}
    with pytest.raises(ValueError, match="'epoks'.*did you mean 'epochs'"):
        config.run({"smoke": True, **sections})


def test_a_section_without_kind_says_so():
    with pytest.raises(ValueError, match="no kind"):
        config.build("optimizer", {"weight_decay": 0.1})


def test_unknown_top_level_field_is_an_error():
    fields = ConfigDict({"recipe": "fine_tune", "foldre": "x"})
    with pytest.raises(ValueError, match="'foldre'.*did you mean 'folder'"):
        config.run(fields)


def test_phases_by_hand_and_schedules_with_options_come_through_a_config():
    written = {
        "kind": "phases",
        "phases": (
            {"name": "b", "rates": {"block_*": (1.0, 4.0), "head": 8.0}, "steps": 5},
            {"name": "a", "rates": {"head": {"kind": "one_cycle", "peak": 2.0}}, "epochs": 1},
        ),
    }
    plan = config.plain(ConfigDict({"plan": written}))["plan"]
    first, second = config.bind("plan", plan)(("block_0", "block_1"), ("head",))
    assert first.rates == {"block_0": 1.0, "block_1": 4.0, "head": 8.0}
    assert (first.name, second.name, second.rates["head"].kind) == ("b", "a", "one_cycle")
    shape = {"kind": "flat_cosine", "flat": 0.5}
    full = config.plain(ConfigDict({"kind": "full", "schedule": shape, "warmup": "9 steps"}))
    (phase,) = config.bind("plan", full)(("stem",), ("head",))
    assert phase.rates["stem"][:3] == ("flat_cosine", 5e-5, "9 steps")


def test_smoke_replaces_the_named_entries_and_leaves_nothing_behind():
    given = {"batch_size": 32, "seed": 1, "smoke": True, "smoke_with": {"batch_size": 8}}
    assert config._smoked(given) == {"batch_size": 8, "seed": 1}
    off = {"batch_size": 32, "smoke": False, "smoke_with": {"batch_size": 8}}
    assert config._smoked(off) == {"batch_size": 32}


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_help_answers_without_loading_jax():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['jtl', '--help']\n"
        "try:\n    runpy.run_module('jtl', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules, 'jax was loaded'\n"
    )
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout
    assert "python -m jtl --config=configs/quickstart.py" in done.stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config=configs/none.py"], "configs/none.py"),
        (["--config=configs/quickstart.py", "--config.paln.rate=1"], "paln"),
        (["--config=configs/quickstart.py", "--config.plan.rte=1"], "did you mean 'rate'"),
        (["--config=configs/quickstart.py", "--config.paralel=pmap"], "did you mean 'parallel'"),
        ([], "config"),
    ],
)
def test_bad_flags_end_in_one_line(flags, says):
    done = _python("-m", "jtl", *flags)
    assert done.returncode != 0
    assert says in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_masks_load_neither_flax_nor_transformers_nor_orbax():
    code = (
        "import sys\nfrom jtl import masks\n"
        "bad = {'flax', 'transformers', 'orbax', 'tensorflow', 'torch'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr
