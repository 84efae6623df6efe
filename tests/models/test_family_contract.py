"""The contract that every row of the table keeps: labels, borders, live sets, folders, the page."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, backbone, batch_of

from jtl import masks, show
from jtl.models import backbone as stages
from jtl.models import export, load
from jtl.models.families import TABLE, family
from jtl.models.heads import Linear
from jtl.models.model import attach
from jtl.report import screen
from jtl.train import phases

_BUILDERS = (
    *(phases.feature_extraction, phases.full, phases.gradual_unfreeze),
    *(phases.linear_probe_then_finetune, phases.progressive),
)


@pytest.fixture(scope="module", params=sorted(TABLE))
def made(request):
    return backbone(request.param)


@pytest.fixture(scope="module")
def model(made):
    return attach(made, {"head": Linear(3, start="normal")}, key=jax.random.key(1))


@pytest.fixture(scope="module")
def batch(made):
    return batch_of(made)


def test_every_family_has_a_case():
    assert sorted(CASES) == sorted(TABLE)
    for model_type in TABLE:
        row = family(model_type)
        assert row.model_type == model_type
        assert row.modality in ("text", "image", "audio", "image_text")


def test_labels_cover_every_leaf_in_order_of_depth(made):
    optional = [rule for rule, label in made.groups if label == stages.UNUSED]
    labels = masks.label(made.params, made.groups, optional=optional)
    found = set(jax.tree.leaves(labels)) - {stages.UNUSED}
    order = stages.stage_labels(made.module.blocks)
    assert found == set(made.labels) <= set(order)
    blocks = [f"block_{i}" for i in range(made.module.blocks)]
    assert set(blocks) <= found and "stem" in found, "each block owns a leaf"


def test_the_forward_pass_stops_and_starts_at_every_border(model, made, batch):
    blocks = made.module.blocks
    borders = range(1, blocks + 3)

    @jax.jit
    def passes(params, stats, batch):
        whole, _ = model.apply(params, stats, batch)
        columns = model.prefix(params, stats, batch, *borders)
        beside = {name: batch[name] for name in stages.beside(made.module) if name in batch}
        found = {}
        for border in borders:
            name = stages.column(border, blocks)
            start = {name: columns[name], **(beside if border < blocks + 2 else {})}
            found[name] = model.apply(params, stats, start)[0]["head"]
        return whole, found

    whole, found = passes(model.params, model.stats, batch)
    for name, logits in found.items():
        np.testing.assert_allclose(logits, whole["head"], atol=2e-5, err_msg=name)
    assert whole["pooled"].shape == (len(whole["head"]), made.dim)
    assert bool(jnp.isfinite(whole["pooled"]).all())


def test_every_phase_builder_opens_labels_of_it(made):
    plans = [builder(made.labels, ("head",)) for builder in _BUILDERS]
    for plan in (*plans, phases.last_groups(made.labels, ("head",), n=1)):
        assert all("head" in phase.live for phase in plan)
        assert set().union(*(phase.live for phase in plan)) <= {*made.labels, "head"}


def test_every_label_gets_a_gradient_where_all_is_live(model, made, batch):
    live = frozenset({*made.labels, "head"})
    mask = masks.mask(model.labels, live)
    moving, held = masks.split(model.params, mask)
    labels = jax.tree.leaves(masks.split(model.labels, mask)[0])

    def loss(moving):
        params = masks.merge(moving, held)
        out, _ = model.apply(params, model.stats, batch, key=jax.random.key(2), live=live)
        return jnp.sum(jnp.square(out["head"] - 1.0))

    value, gradient = jax.jit(jax.value_and_grad(loss))(moving)
    assert bool(jnp.isfinite(value))
    sizes = dict.fromkeys(live, 0.0)
    for label, leaf in zip(labels, jax.tree.leaves(gradient), strict=True):
        sizes[label] += float(np.abs(np.asarray(leaf)).sum())
    assert all(np.isfinite(size) and size > 0 for size in sizes.values()), sizes


def test_a_folder_gives_back_what_was_written(tmp_path, model, made, batch):
    export.export(tmp_path / "x", model)
    again = load.load_backbone(tmp_path / "x", family=made.family.model_type)
    assert again.report.fresh == again.report.wrong_shape == ()
    jax.tree.map(np.testing.assert_array_equal, made.params, again.params)
    jax.tree.map(np.testing.assert_array_equal, made.stats, again.stats)
    assert again.groups == made.groups and again.pooling == made.pooling
    np.testing.assert_array_equal(made(batch)["pooled"], again(batch)["pooled"])


def test_the_page_shows_it(made, capsys):
    show.show(made, out=screen.make_console())
    printed = capsys.readouterr().out
    assert made.family.model_type in printed and "stem" in printed and "block_0" in printed
