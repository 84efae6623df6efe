"""Dense maps: the grid of the tokens, values by hand, a decoder, running statistics; parity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.models.export import export, import_model
from jtl.models.heads import DenseMap
from jtl.models.load import new_backbone
from jtl.models.model import attach

TINY = dict(
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=8,
    image_size=8,
    patch_size=4,
    initializer_range=0.3,
)


@functools.cache
def _backbone():
    return new_backbone("vit", TINY, key=jax.random.key(0))


def _params(dim, outputs, kernel, bias=0.0):
    return {"classifier": {"kernel": kernel, "bias": jnp.full(outputs, bias)}}


def test_logits_are_those_of_each_token_and_grow_bilinearly():
    # Two tokens side by side, of 0 and 4: at twice the size 0, 1, 3, 4 by half-pixel centres.
    out = {"tokens": jnp.array([0.0, 4.0]).reshape(1, 2, 1)}
    head = DenseMap(1, scale=2, rows=1)
    params = _params(1, 1, jnp.ones((1, 1)), bias=10.0)
    made = head.apply({"params": params}, out, {})
    assert made.shape == (1, 2, 4, 1)
    assert made[0, :, :, 0].tolist() == [[10.0, 11.0, 13.0, 14.0]] * 2


def test_the_grid_is_of_the_map_or_of_the_tokens_behind_the_prefix():
    maps = jnp.arange(6.0).reshape(1, 2, 3, 1)
    params = {"params": _params(1, 1, jnp.ones((1, 1)))}
    whole = DenseMap(1, scale=1).apply(params, {"map": maps, "tokens": maps}, {})
    np.testing.assert_array_equal(whole, maps)
    tokens = jnp.concatenate([jnp.full((1, 2, 1), 9.0), maps.reshape(1, 6, 1)], axis=1)
    again = DenseMap(1, scale=1, prefix=2, rows=2).apply(params, {"tokens": tokens}, {})
    np.testing.assert_array_equal(again, maps)
    square = DenseMap(1, scale=1, prefix=4).apply(params, {"tokens": tokens}, {})
    assert square.shape == (1, 2, 2, 1)


def test_errors():
    out = {"tokens": jnp.zeros((1, 7, 1))}
    with pytest.raises(ValueError, match=r"7 tokens, 1 of them.*no grid of as many rows"):
        DenseMap(1, prefix=1).apply({}, out, {})
    with pytest.raises(ValueError, match=r"7 tokens, 1 of them.*no grid of 4;"):
        DenseMap(1, prefix=1, rows=4).apply({}, out, {})
    with pytest.raises(ValueError, match=r"makes the grid 4 times larger and scale is 2"):
        DenseMap(1, scale=2, widths=(3, 3)).apply({}, out, {})


def _model():
    heads = {
        "probe": DenseMap(3, scale=4, prefix=1, batch_norm=True),
        "decoder": DenseMap(2, scale=4, prefix=1, widths=(6, 5)),
    }
    return attach(_backbone(), heads, key=jax.random.key(1))


def _batch():
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3))
    mask = jnp.array([True, True, True, False])
    return {"pixel_values": jnp.asarray(images, jnp.float32), "mask": mask}


def test_statistics_of_heads_move_where_the_head_is_live_and_go_with_the_folder(tmp_path):
    model, batch = _model(), _batch()
    assert list(model.stats) == ["heads"] and list(model.stats["heads"]) == ["probe"]
    assert model.border(frozenset({"probe"})) == 3

    @functools.partial(jax.jit, static_argnums=1)
    def run(stats, live):
        return model.apply(model.params, stats, batch, live=live)

    out, held = run(model.stats, frozenset({"decoder"}))
    assert out["probe"].shape == (4, 8, 8, 3) and out["decoder"].shape == (4, 8, 8, 2)
    jax.tree.map(np.testing.assert_array_equal, held, model.stats)
    live_out, moved = run(model.stats, frozenset({"probe"}))
    features = np.asarray(out["tokens"])[:3, 1:].reshape(-1, 8)
    own = moved["heads"]["probe"]["batch_norm"]
    np.testing.assert_allclose(own["mean"], 0.1 * features.mean(0), atol=1e-6)
    np.testing.assert_allclose(own["var"], 0.9 + 0.1 * features.var(0, ddof=1), atol=1e-6)
    assert not np.array_equal(live_out["probe"], out["probe"])
    import dataclasses

    model = dataclasses.replace(model, stats=moved)
    export(tmp_path / "x", model)
    again = import_model(tmp_path / "x")
    jax.tree.map(np.testing.assert_array_equal, again.stats, moved)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.heads == model.heads


def test_every_leaf_of_the_decoder_has_a_gradient():
    model, batch = _model(), _batch()

    @jax.jit
    def gradient(heads):
        def loss(heads):
            params = {**model.params, "heads": heads}
            live = frozenset({"probe", "decoder"})
            out, _ = model.apply(params, model.stats, batch, live=live)
            return jnp.sum((out["decoder"] - 1) ** 2) + jnp.sum((out["probe"] - 1) ** 2)

        return jax.grad(loss)(heads)

    found = gradient(model.params["heads"])
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found))


@pytest.mark.parity
@pytest.mark.parametrize("scale", [1, 3, 14])
def test_growing_is_pytorchs(scale):
    import torch

    maps = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    params = {"params": _params(4, 4, jnp.eye(4))}
    made = DenseMap(4, scale=scale).apply(params, {"map": jnp.asarray(maps)}, {})
    theirs = torch.nn.functional.interpolate(
        torch.tensor(maps).permute(0, 3, 1, 2),
        scale_factor=scale,
        mode="bilinear",
        align_corners=False,
    )
    np.testing.assert_allclose(made, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-5)
