"""Computing in bfloat16: float32 parameters, gradients, moments, statistics, logits and losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import masks
from jtl.losses.classification import cross_entropy
from jtl.models.heads import Linear, MaskedLM
from jtl.models.load import new_backbone
from jtl.models.model import attach
from jtl.train.state import create
from jtl.train.step import make_step

WIDE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    initializer_range=0.1,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
CONFIGS = {
    "bert": dict(WIDE, vocab_size=31, max_position_embeddings=64),
    "vit": dict(WIDE, image_size=16, patch_size=4, num_channels=3),
    "resnet": dict(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_channels=3
    ),
}
ROWS = 16


@functools.cache
def _case(name):
    backbone = new_backbone(name, CONFIGS[name], key=jax.random.key(0))
    model = attach(backbone, {"head": Linear(3)}, key=jax.random.key(1))
    rng = np.random.default_rng(0)
    if name == "bert":
        ids = rng.integers(1, 31, (ROWS, 64)).astype(np.int32)
        batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    else:
        batch = {"pixel_values": rng.normal(size=(ROWS, 16, 16, 3)).astype(np.float32)}
    batch |= {"label": rng.integers(0, 3, ROWS).astype(np.int32), "mask": np.ones(ROWS, bool)}
    return model, jax.tree.map(jnp.asarray, batch)


def _term(c):
    return cross_entropy(c.out["head"], c.batch["label"], mask=c.batch["mask"])


def _gradient(model, batch):
    live = frozenset({*model.groups, "head"})

    @jax.jit
    def gradient(params, stats, batch):
        def loss(params):
            out, moved = model.apply(params, stats, batch, live=live)
            total, weight = cross_entropy(out["head"], batch["label"], mask=batch["mask"])
            return total / weight, (out, moved)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return gradient(model.params, model.stats, batch)


def _float32(tree):
    return all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_follows_float32(name):
    model, batch = _case(name)
    half = model.computing("bfloat16")
    (loss, (out, stats)), gradient = _gradient(half, batch)
    (wide_loss, (wide_out, wide_stats)), wide_gradient = _gradient(model, batch)
    assert out["tokens"].dtype == out["pooled"].dtype == jnp.bfloat16
    assert loss.dtype == out["head"].dtype == jnp.float32
    assert _float32(gradient) and _float32(stats) and _float32(half.params)
    spread = float(jnp.abs(wide_out["head"]).max())
    gap = float(jnp.abs(out["head"] - wide_out["head"]).max())
    assert 0 < gap < 0.05 * spread, "2^-8 a rounding, some tens of them"
    assert float(loss) == pytest.approx(float(wide_loss), rel=0.02)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0.02, atol=0.02), stats, wide_stats
    )
    for part in ("backbone", "heads"):
        a, b = (
            jnp.concatenate([x.ravel() for x in jax.tree.leaves(g[part])])
            for g in (gradient, wide_gradient)
        )
        assert float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b)) > 0.99


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_keeps_the_state_in_float32_and_the_held_bits(name):
    model, batch = _case(name)
    half = model.computing(jnp.bfloat16, remat=True)
    rates = {"block_1": 1e-2, "head": 1e-2}
    tx = optax.adamw(1.0)
    state = create(model.params, model.stats, tx, key=jax.random.key(0))
    step = jax.jit(make_step(half.apply, {"task": _term}, tx, model.labels, rates))
    new, metrics = step(state, batch, 0)
    assert all(value.dtype == jnp.float32 for value in (metrics["loss"], metrics["grad_norm"]))
    assert bool(metrics["finite"]) and _float32((new.params, new.stats))
    assert {leaf.dtype for leaf in jax.tree.leaves(new.opt_state)} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    held = jax.tree.map(lambda label: label not in rates, model.labels)
    masks.assert_held(state.params, new.params, held)
    moved = masks.split(new.params, jax.tree.map(lambda is_held: not is_held, held))[0]
    before = masks.split(state.params, jax.tree.map(lambda is_held: not is_held, held))[0]
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (moved, before)), strict=True))


def test_columns_are_in_the_dtype_and_give_the_same_numbers():
    model, batch = _case("bert")
    half = model.computing("bfloat16")
    columns = half.prefix(half.params, half.stats, batch, 2)
    assert columns["hidden_2"].dtype == jnp.bfloat16
    plain, _ = half.apply(half.params, half.stats, batch)
    given, _ = half.apply(half.params, half.stats, {**batch, **columns})
    np.testing.assert_array_equal(plain["head"], given["head"])


def test_gradients_of_embeddings_are_summed_in_float32():
    """Added up in bfloat16, the gradient of a row that 1,024 tokens share is 4 % off."""
    model, batch = _case("bert")
    rows = jax.random.normal(jax.random.key(2), (ROWS, 64, 32)) + 1.0

    def total(model, params):
        module = model.backbone.module
        stem = module.apply({"params": params}, batch, False, method="stem").astype(jnp.float32)
        return jnp.sum(stem * rows)

    half, wide = (
        jax.grad(functools.partial(total, m))(model.params["backbone"])["embeddings"]
        for m in (model.computing("bfloat16"), model)
    )
    for table in ("token_type_embeddings", "position_embeddings", "word_embeddings"):
        one, other = half[table]["embedding"], wide[table]["embedding"]
        assert float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other)) < 0.01


def test_the_masked_lm_head_computes_in_the_dtype_of_its_tokens():
    model, batch = _case("bert")
    lm = attach(model.backbone, {"lm": MaskedLM(32, 31)}, key=jax.random.key(3))
    wide, half = (m.apply(m.params, {}, batch)[0]["lm"] for m in (lm, lm.computing("bfloat16")))
    assert half.dtype == jnp.float32 and half.shape == (ROWS, 64, 31)
    assert float(jnp.abs(half - wide).max()) < 0.05 * float(jnp.abs(wide).max())
    text = str(
        jax.make_jaxpr(lambda p: lm.computing("bfloat16").apply(p, {}, batch)[0]["lm"])(lm.params)
    )
    assert "bf16[32,31]" in text, "the table enters the product in bfloat16"


def test_computing_changes_what_it_is_given_alone():
    model, _ = _case("bert")
    half = model.computing("bfloat16")
    assert half.backbone.module.dtype == jnp.bfloat16 and not half.remat
    both = half.computing(remat=True)
    assert both.backbone.module.dtype == jnp.bfloat16 and both.remat
    assert both.computing(jnp.float32).remat and model.backbone.module.dtype == jnp.float32
    with pytest.raises(ValueError, match="dtype is float16; models compute in float32 or bfloat16"):
        model.computing("float16")
