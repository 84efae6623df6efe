"""Blocks computed again: the same numbers, less memory, one more forward pass of live blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import masks
from jtl.models.heads import Linear
from jtl.models.load import new_backbone
from jtl.models.model import attach
from jtl.models.remat import again

WIDE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
DROP = dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
CASES = {
    "bert": (
        dict(WIDE, **DROP, vocab_size=31, max_position_embeddings=32),
        {"input_ids": (8, 32), "attention_mask": (8, 32)},
    ),
    "vit": (
        dict(WIDE, **DROP, drop_path_rate=0.3, image_size=24, patch_size=4),
        {"pixel_values": (8, 24, 24, 3)},
    ),
    "resnet": (
        dict(embedding_size=4, hidden_sizes=[16], depths=[3], layer_type="basic", num_channels=3),
        {"pixel_values": (8, 64, 64, 3)},
    ),
}


@functools.cache
def _case(name):
    config, columns = CASES[name]
    backbone = new_backbone(name, config, key=jax.random.key(0))
    model = attach(backbone, {"head": Linear(3, dropout=0.1)}, key=jax.random.key(1))
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": lambda shape: rng.integers(1, 31, shape).astype(np.int32),
        "attention_mask": lambda shape: (np.arange(shape[1])[None] < 20).repeat(shape[0], 0) * 1,
        "pixel_values": lambda shape: rng.normal(size=shape).astype(np.float32),
    }
    made = {column: jnp.asarray(batch[column](shape)) for column, shape in columns.items()}
    return model, {**made, "mask": jnp.arange(8) < 7}


def _gradient(model, live):
    """Return the compiled `(params, stats, batch, key) -> ((loss, stats), gradient)`."""
    chosen = masks.mask(model.labels, live)

    def gradient(params, stats, batch, key):
        moving, held = masks.split(params, chosen)

        def loss(moving):
            merged = masks.merge(moving, held)
            out, moved = model.apply(merged, stats, batch, key=key, live=live)
            return jnp.sum(out["head"] ** 2), moved

        return jax.value_and_grad(loss, has_aux=True)(moving)

    return jax.jit(gradient)


def _lowered(model, batch, live):
    args = (model.params, model.stats, batch, jax.random.key(5))
    return _gradient(model, live).lower(*args)


def _flops(stage):
    return stage.cost_analysis()["flops"]


@pytest.mark.parametrize("name", CASES)
def test_full_training_has_the_same_numbers_in_less_memory_for_one_forward_pass(name):
    model, batch = _case(name)
    live = frozenset({*model.groups, "head"})
    both = (model, model.computing(remat=True))
    plain, rematted = (_lowered(m, batch, live).compile() for m in both)
    args = (model.params, model.stats, batch, jax.random.key(5))
    (one, gradient), (two, again_gradient) = plain(*args), rematted(*args)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-6)  # the masks of dropout are the same
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), one[1], two[1])
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    close = functools.partial(np.testing.assert_allclose, atol=2e-6 * max(scale, 1.0))
    jax.tree.map(close, gradient, again_gradient)
    memory = [c.memory_analysis().temp_size_in_bytes for c in (plain, rematted)]
    assert memory[1] < 0.8 * memory[0], memory
    prefix = jax.jit(model.prefix, static_argnums=3)
    forward, stem = (_flops(prefix.lower(*args[:3], border)) for border in (4, 1))
    extra = (_flops(rematted) - _flops(plain)) / (forward - stem)
    assert 0.7 < extra < 1.3, extra  # one forward pass of the three blocks


@pytest.mark.parametrize("name", CASES)
def test_what_is_held_runs_once(name):
    model, batch = _case(name)
    rematted = model.computing(remat=True)
    heads = frozenset({"head"})
    assert _flops(_lowered(rematted, batch, heads)) == _flops(_lowered(model, batch, heads))
    last = frozenset({"block_2", "head"})
    extra = _flops(_lowered(rematted, batch, last)) - _flops(_lowered(model, batch, last))
    every = frozenset({*model.groups, "head"})
    whole = _flops(_lowered(rematted, batch, every)) - _flops(_lowered(model, batch, every))
    assert 0 < extra < 0.5 * whole


def test_a_live_block_below_held_ones_and_a_column_below_it():
    model, batch = _case("bert")
    live = frozenset({"block_1", "head"})
    column = model.prefix(model.params, model.stats, batch, 2)
    args = (model.params, model.stats, {**batch, **column}, jax.random.key(5))
    (one, gradient), (two, other) = (
        _gradient(m, live)(*args) for m in (model, model.computing(remat=True))
    )
    np.testing.assert_allclose(one[0], two[0], rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), gradient, other)
    with pytest.raises(ValueError, match="above the live stages"):
        model.computing(remat=True).apply(*args[:3], key=args[3], live=frozenset({"block_0"}))


def test_gradients_of_single_examples():
    model, batch = _case("vit")
    live = frozenset({"block_2", "head"})

    def one(model, images):
        def loss(backbone):
            params = {**model.params, "backbone": backbone}
            row = {"pixel_values": images[None]}
            out, _ = model.apply(params, model.stats, row, key=jax.random.key(0), live=live)
            return jnp.sum(out["head"] ** 2)

        return jax.grad(loss)(model.params["backbone"])["encoder"]["layer"]["2"]

    images = batch["pixel_values"][:3]
    plain, rematted = (
        jax.jit(jax.vmap(functools.partial(one, m)))(images)
        for m in (model, model.computing(remat=True))
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), plain, rematted)


def test_again_by_hand():
    def block(weight, x, stats):
        return jnp.sin(weight * x), {"seen": stats["seen"] + jax.lax.stop_gradient(x.sum())}

    def loss(weight, x):
        hidden, stats = again(block)(weight, x, {"seen": jnp.float32(1.0)})
        return hidden.sum(), stats

    (value, stats), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        jnp.float32(0.5), jnp.array([0.0, 2.0])
    )
    assert float(value) == pytest.approx(np.sin(1.0)) and float(stats["seen"]) == 3.0
    assert float(gradients[0]) == pytest.approx(2 * np.cos(1.0))
    np.testing.assert_allclose(gradients[1], [0.5, 0.5 * np.cos(1.0)], rtol=1e-6)


def test_held_statistics_stay_in_live_blocks_and_normalise_them():
    model, batch = _case("resnet")
    live = frozenset({*model.groups, "head"})
    key, found = jax.random.key(2), []
    for again_ in (False, True):
        held = model.computing(remat=again_, hold_statistics=True)
        (loss, stats), gradient = _gradient(held, live)(held.params, held.stats, batch, key)
        jax.tree.map(np.testing.assert_array_equal, stats, model.stats)
        found.append((loss, gradient))
    (loss, gradient), again_ = found
    np.testing.assert_allclose(again_[0], loss, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3 * (1 + np.abs(a).max())),
        gradient,
        again_[1],
    )
    # Dropout aside, the numbers are those of evaluation mode, which batch moments are not.
    bare = attach(model.backbone, {"head": Linear(3)}, key=jax.random.key(1))
    stored, _ = bare.apply(bare.params, bare.stats, batch)
    out, _ = bare.computing(hold_statistics=True).apply(bare.params, bare.stats, batch, live=live)
    np.testing.assert_allclose(out["head"], stored["head"], atol=1e-5)
    moved, _ = bare.apply(bare.params, bare.stats, batch, live=live)
    assert float(jnp.abs(moved["head"] - stored["head"]).max()) > 1e-3
