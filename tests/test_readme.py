"""The README's Python runs as it is written, in an empty folder, on fewer rows."""

import pathlib
import re
import sys
import types

import jax
import numpy as np
import pytest

from jtl import config
from jtl.models import families, load
from jtl.models.export import export
from jtl.models.heads import Linear
from jtl.models.model import attach

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def _run(code, **given):
    module = types.ModuleType("readme")
    vars(module).update(given)
    exec(compile(code, "README.md", "exec"), vars(module))
    return vars(module)


def test_there_are_five_blocks():
    assert len(BLOCKS) == 5


def test_the_plan_by_hand_is_a_plan():
    given = dict(_run(BLOCKS[4])["plan"])
    plan = config.build("plan", given, [f"block_{i}" for i in range(6)], ("head",))
    assert [sorted(phase.live) for phase in plan] == [["head"], ["block_4", "block_5", "head"]]
    assert plan[1].rates["block_5"] == pytest.approx(1e-4) and plan[1].until.patience == 1


@pytest.mark.slow
def test_fine_tuning_in_python(tmp_path, monkeypatch, capsys, one_device):
    monkeypatch.chdir(tmp_path)
    small = BLOCKS[0].replace(
        "train=200, validation=100, test=100", "train=32, validation=16, test=16"
    )
    small = small.replace("per_phase=2", "per_phase=8, final_epochs=1").replace(
        "max_length=64", "max_length=16"
    )
    assert small != BLOCKS[0]
    named = _run(small)
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    shown = capsys.readouterr().out
    assert "'test_interval'" in shown and "Prediction(label=" in shown
    assert named["result"]["held_bit_equal"] is True


def test_a_family_of_your_own(tmp_path, monkeypatch):
    module = types.SimpleNamespace(**_run(BLOCKS[2]))
    monkeypatch.setitem(sys.modules, "jtl.models.families.plain", module)
    monkeypatch.setitem(families.TABLE, "plain", "plain:PLAIN")
    config = dict(vocab_size=9, hidden_size=8, num_hidden_layers=2)
    backbone = load.new_backbone("plain", config, key=jax.random.key(0))
    model = attach(backbone, {"head": Linear(2)}, key=jax.random.key(1))
    assert model.groups == ("stem", "block_0", "block_1")
    batch = {"input_ids": np.arange(12).reshape(3, 4) % 9}
    whole, _ = model.apply(model.params, {}, batch)
    column = model.prefix(model.params, {}, batch, 2)
    out, _ = model.apply(model.params, {}, column)
    np.testing.assert_allclose(out["head"], whole["head"], atol=1e-6)
    export(tmp_path / "x", model)
    again = load.load_backbone(tmp_path / "x")
    jax.tree.map(np.testing.assert_array_equal, backbone.params, again.params)


def test_the_table_of_families_has_them_all():
    from benchmarks.families import ROWS

    files = {place.split(":")[0] for place in families.TABLE.values()}
    assert files == set(ROWS)
    shown = re.search("<!-- families.*?<!-- /families -->", README, re.DOTALL)
    rows = re.findall(r"^[|] (\w+) [|]", shown.group(), re.MULTILINE)
    assert set(rows) - {"family"} == files


def test_only_the_masks():
    named = _run(BLOCKS[1])
    grads = named["grads"]
    assert jax.tree.leaves(grads["encoder"]) == []
    np.testing.assert_array_equal(grads["head"]["kernel"], 2 * np.ones((4, 2)))
    state = named["tx"].init(named["params"])
    assert {np.shape(leaf) for leaf in jax.tree.leaves(state)} == {(), (2,), (4, 2)}


def test_only_a_penalty():
    named = _run(BLOCKS[3])
    kernel = named["anchor"]["kernel"]
    assert float(named["penalty"]({"kernel": kernel})) == 0.0
    # At equal logits each class has probability 1/3: every entry's information is 1/3 * 2/3.
    np.testing.assert_allclose(named["information"]["kernel"], 2 / 9 * np.ones((3, 3)), rtol=1e-5)
    assert float(named["penalty"]({"kernel": kernel + 1.0})) == pytest.approx(1.0, rel=1e-5)
