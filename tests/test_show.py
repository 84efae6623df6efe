import dataclasses
import io
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

from jtl import show
from jtl.models.load import new_backbone
from jtl.report import layout
from jtl.weights.report import LoadReport

BERT = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
}
RESNET = {
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "depths": [2, 1],
    "layer_type": "basic",
}


@pytest.fixture(scope="module")
def bert():
    made = new_backbone("bert", BERT, key=jax.random.key(0), pooling="mean")
    report = LoadReport(loaded=("a",) * 53, unexpected=("position_ids",))
    return dataclasses.replace(made, source="some/bert", report=report)


def printed(backbone, **options):
    out = Console(file=io.StringIO(), width=120)
    show.show(backbone, out=out, **options)
    return out.file.getvalue()


def test_what_it_is_and_where_from(bert):
    shown = printed(bert)
    assert "source    some/bert\n" in shown
    assert "family    bert, 3 blocks\n" in shown
    assert "weights   53 loaded, 0 fresh, 1 unexpected, 0 of wrong shape\n" in shown
    assert "features  mean, width 8; also pooler, cls\n" in shown


def test_groups_stand_in_depth_order_and_add_up(bert):
    lines = [line.split() for line in printed(bert).splitlines()]
    names = [line[0] for line in lines if len(line) == 5 and line[-1] == "%"]
    assert names == ["stem", "block_0", "block_1", "block_2", "unused", "all"]
    total = sum(leaf.size for leaf in jax.tree.leaves(bert.params))
    assert ["all", "55", f"{total:,}", "100.0", "%"] in lines


def test_blocks_that_are_alike_stand_once(bert):
    shown = printed(bert)
    assert "encoder/layer/(0 .. 2)   block_0..2" in shown
    assert shown.count("kernel (8, 16)  bias (16,)") == 1
    full = printed(bert, full=True)
    assert full.count("kernel (8, 16)  bias (16,)") == 3
    assert "(0 .. 2)" not in full


def test_one_group_has_all_its_leaves(bert):
    shown = printed(bert, group="block_1")
    assert shown.count("encoder/layer/1/") == 16
    assert "encoder/layer/0/" not in shown


def test_an_unknown_group_lists_the_known_ones(bert):
    with pytest.raises(ValueError, match=r"'blok'; there are .*'block_0'.*'stem'"):
        printed(bert, group="blok")


def test_a_network_with_statistics_says_so():
    shown = printed(new_backbone("resnet", RESNET, key=jax.random.key(0)))
    assert "weights   random" in shown
    assert "running statistics" in shown


def test_branches_of_another_shape_stay_apart():
    def block(size):
        return {"dense": {"kernel": np.zeros((size, 2), "f4")}}

    params = {"0": block(1), "1": block(2), "2": block(2), "10": block(2)}
    labels = {name: {"dense": {"kernel": f"block_{name}"}} for name in params}
    found = [(line.name, line.label) for line in layout.tree_lines(params, labels)]
    assert found == [
        ("0/dense", "block_0"),
        ("(1 .. 10)/dense", "block_1, block_2, block_10"),
    ]


def test_leaves_beside_branches_are_shown_with_their_type():
    params = {"scale": np.zeros(3, "f2"), "dense": {"bias": np.zeros(2, "f4")}}
    lines = layout.tree_lines(params, {"scale": "top", "dense": {"bias": "stem"}})
    assert lines == [
        layout.Line(0, ".", "scale (3,) float16", ""),
        layout.Line(0, "dense", "bias (2,)", "stem"),
    ]


def test_inputs_are_described_by_their_fields():
    class Processor:
        image_mean = [0.5]

    @dataclasses.dataclass
    class Inputs:
        processor: object
        size: tuple

    described = show.describe(Inputs(Processor(), (32, 32)))
    assert described == "Inputs: processor Processor, size (32, 32), image_mean [0.5]"


def test_a_missing_folder_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit) as ended:
        show.main([str(tmp_path / "nothing" / "here" / "at" / "all")])
    assert str(ended.value.code).startswith("jtl: ")


def test_help_loads_no_jax():
    code = "import sys, jtl.show\ntry: jtl.show.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'jax' not in sys.modules, 'jax'"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "--group" in ran.stdout
