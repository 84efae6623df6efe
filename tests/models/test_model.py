"""The contract of Model with every family: labels, `live` block by block, prefix and border."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import masks
from jtl.models import backbone as stages
from jtl.models.families import family
from jtl.models.heads import DenseMap, Linear, MaskedLM
from jtl.models.load import new_backbone
from jtl.models.model import add_head, attach, attach_weights, outline
from jtl.train.held import held_stats

CONFIGS = {
    "bert": dict(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        initializer_range=0.3,
        hidden_dropout_prob=0.3,
    ),
    "vit": dict(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=3,
        initializer_range=0.3,
        hidden_dropout_prob=0.3,
    ),
    "resnet": dict(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_channels=3,
    ),
}
CASES = [(name, pooling) for name in CONFIGS for pooling in family(name).poolings]
ROWS = 4


@functools.cache
def _backbone(name, pooling):
    return new_backbone(name, CONFIGS[name], key=jax.random.key(0), pooling=pooling)


def _model(name="bert", pooling=None, heads=None):
    heads = heads or {"head": Linear(5)}
    return attach(_backbone(name, pooling), heads, key=jax.random.key(1))


def _batch(model):
    """Four rows like the family's example, the first text padded, the last row no real one."""
    rng = np.random.default_rng(0)
    batch = {}
    for name, example in model.backbone.family.example(model.backbone.config).items():
        shape = (ROWS, *example.shape[1:])
        if name == "attention_mask":
            batch[name] = jnp.ones(shape, jnp.int32).at[0, -1].set(0)
        elif jnp.issubdtype(example.dtype, jnp.integer):
            batch[name] = jnp.asarray(rng.integers(1, 31, shape), jnp.int32)
        else:
            batch[name] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {**batch, "mask": jnp.arange(ROWS) < ROWS - 1}


def _rest(batch):
    """What a derived dataset keeps beside the column of a border."""
    return {name: batch[name] for name in ("attention_mask", "mask") if name in batch}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def model(request):
    return _model(*request.param)


def test_labels_cover_every_leaf_in_order_of_depth(model):
    counts = masks.count(model.params, model.labels)
    assert set(counts) - {"unused"} == {*model.groups, "head"}
    assert counts["head"].parameters == 5 * model.backbone.dim + 5
    depth = stages.stage_labels(model.backbone.module.blocks)
    assert list(model.groups) == [label for label in depth if label in model.groups]
    assert model.groups[0] == "stem" and set(depth[1:-1]) <= set(model.groups)


def test_out_has_tokens_pooled_and_logits(model):
    out, stats = model.apply(model.params, model.stats, _batch(model))
    dim = model.backbone.dim
    assert out["tokens"].shape[::2] == (ROWS, dim) and out["pooled"].shape == (ROWS, dim)
    assert out["head"].shape == (ROWS, 5) and out["head"].dtype == jnp.float32
    kernel, bias = (model.params["heads"]["head"]["classifier"][k] for k in ("kernel", "bias"))
    np.testing.assert_allclose(out["head"], out["pooled"] @ kernel + bias[None], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, stats, model.stats)
    same = model.backbone(_batch(model))
    np.testing.assert_allclose(same["pooled"], out["pooled"], atol=1e-5)


def test_prefix_and_border_give_the_numbers_of_the_plain_forward(model):
    batch = _batch(model)
    plain, _ = model.apply(model.params, model.stats, batch)
    blocks = model.backbone.module.blocks
    for border in range(1, blocks + 3):
        column = model.prefix(model.params, model.stats, batch, border)
        assert list(column) == ["pooled" if border == blocks + 2 else f"hidden_{border}"]
        out, _ = model.apply(model.params, model.stats, {**column, **_rest(batch)})
        np.testing.assert_array_equal(out["head"], plain["head"])
        assert ("tokens" in out) == (border < blocks + 2)


def test_a_prefix_starts_where_the_batch_lets_it(model):
    batch = _batch(model)
    last = model.backbone.module.blocks + 1
    first = {**model.prefix(model.params, model.stats, batch, 1), **_rest(batch)}
    direct = model.prefix(model.params, model.stats, batch, last)
    jax.tree.map(
        np.testing.assert_array_equal, direct, model.prefix(model.params, model.stats, first, last)
    )
    later = {**direct, **_rest(batch)}
    with pytest.raises(ValueError, match=f"starts at border {last}; ask for that or more, not 1"):
        model.prefix(model.params, model.stats, later, 1)


def test_columns_of_several_borders_come_of_one_pass(model):
    batch = _batch(model)
    borders = (model.backbone.module.blocks + 2, 2, 1)
    together = model.prefix(model.params, model.stats, batch, *borders)
    for border in borders:
        for name, column in model.prefix(model.params, model.stats, batch, border).items():
            np.testing.assert_array_equal(together[name], column)


def test_a_live_stage_below_the_border_of_the_batch_is_an_error(model):
    batch = _batch(model)
    column = {**model.prefix(model.params, model.stats, batch, 2), **_rest(batch)}
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"border 2, above the live stages \['block_0'\]"):
        live = frozenset({"block_0", "block_1"})
        model.apply(model.params, model.stats, column, key=key, live=live)
    model.apply(model.params, model.stats, column, key=key, live=frozenset({"block_1"}))


def test_gradients_above_the_border_are_those_of_the_plain_forward(model):
    batch = _batch(model)
    live = frozenset({"block_1", "head"})
    border = model.border(live)
    column = {**model.prefix(model.params, model.stats, batch, border), **_rest(batch)}
    chosen, rest = masks.split(model.params, masks.mask(model.labels, live))

    def loss(chosen, batch):
        out, _ = model.apply(masks.merge(chosen, rest), model.stats, batch)
        return jnp.sum(out["head"] ** 2)

    plain, derived = jax.grad(loss)(chosen, batch), jax.grad(loss)(chosen, column)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, derived
    )
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain)) > 1e-3


def test_border_is_the_lowest_moving_stage():
    model = _model()
    assert model.border(frozenset({"stem", "head"})) == 0
    assert model.border(frozenset({"block_0"})) == 1
    assert model.border(frozenset({"top", "block_1", "head"})) == 2
    assert model.border(frozenset({"top", "head"})) == 3
    assert model.border(frozenset({"head"})) == 4
    both = _model(heads={"head": Linear(5), "lm": MaskedLM(16, 31)})
    assert both.border(frozenset({"head"})) == 3, "the masked-LM head reads the tokens"


def test_border_outside_the_model_is_an_error(model):
    last = model.backbone.module.blocks + 2
    for border in (0, last + 1):
        with pytest.raises(ValueError, match=rf"border {border} is outside 1\.\.{last}"):
            model.prefix(model.params, model.stats, _batch(model), border)


def _stops(model, batch, live, key):
    """The activations after every stage, and the statistics."""
    own = stages.variables(model.params["backbone"], model.stats.get("backbone", {}))
    rngs = {"dropout": key}
    module, stops = model.backbone.module, range(1, model.backbone.module.blocks + 2)
    options = dict(rngs=rngs, mutable=["batch_stats"])
    return [module.apply(own, batch, live, stop, **options)[0] for stop in stops]


def test_live_decides_block_by_block(model):
    # Held below and above, training at one stage: the first activations to differ are its own.
    batch, key = _batch(model), jax.random.key(7)
    held = _stops(model, batch, frozenset(), key)
    labels = stages.stage_labels(model.backbone.module.blocks)[:-1]
    for position, label in enumerate(labels):
        moved = _stops(model, batch, frozenset({label}), key)
        for stop, (a, b) in enumerate(zip(held, moved, strict=True)):
            assert np.array_equal(a, b) == (stop < position), (label, stop)


def test_statistics_move_in_live_stages_only(model):
    batch, key = _batch(model), jax.random.key(7)
    rules = model.backbone.groups
    for label in model.groups:
        live = frozenset({label, "head"})
        _, stats = model.apply(model.params, model.stats, batch, key=key, live=live)
        moved = set(masks.names(model.stats)) - _equal(model.stats, stats)
        own = {r for r, owner in rules if owner == label}
        expected = {name for name in masks.names(model.stats) if _owned(name, own)}
        assert moved == expected, label


def _equal(before, after):
    pairs = zip(masks.names(before), jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return {name for name, a, b in pairs if np.array_equal(a, b)}


def _owned(name, regexes):
    return any(re.fullmatch(f"backbone/(?:{regex})", name) for regex in regexes)


def test_dropout_is_of_the_key_and_of_live_parts_alone(model):
    model = attach(model.backbone, {"head": Linear(5, dropout=0.5)}, key=jax.random.key(1))
    batch = _batch(model)
    everything = frozenset({*model.groups, "head"})

    def logits(live, seed):
        key = jax.random.key(seed)
        return model.apply(model.params, model.stats, batch, key=key, live=live)[0]["head"]

    np.testing.assert_array_equal(logits(everything, 0), logits(everything, 0))
    assert not np.array_equal(logits(everything, 0), logits(everything, 1))
    assert not np.array_equal(logits(frozenset({"head"}), 0), logits(frozenset({"head"}), 1))
    np.testing.assert_array_equal(logits(frozenset(), 0), logits(frozenset(), 1))
    plain = model.apply(model.params, model.stats, batch)[0]["head"]
    np.testing.assert_array_equal(logits(frozenset(), 0), plain)


def test_locate_names_the_first_stage_that_is_not_finite(model):
    batch = _batch(model)
    assert model.locate(model.params, model.stats, batch) is None
    for label in (*model.groups, "head"):
        mask = masks.mask(model.labels, label)
        broken = jax.tree.map(lambda leaf, on: leaf * jnp.nan if on else leaf, model.params, mask)
        assert model.locate(broken, model.stats, batch) == label
    bad = {name: x * jnp.nan if x.dtype == jnp.float32 else x for name, x in batch.items()}
    if any(x.dtype == jnp.float32 for x in batch.values()):
        assert model.locate(model.params, model.stats, bad) == "stem"


def test_locate_starts_at_the_border(model):
    border = model.backbone.module.blocks
    batch = _batch(model)
    column = {**model.prefix(model.params, model.stats, batch, border), **_rest(batch)}
    assert model.locate(model.params, model.stats, column) is None
    mask = masks.mask(model.labels, {f"block_{border - 1}", "stem"})
    broken = jax.tree.map(lambda leaf, on: leaf * jnp.nan if on else leaf, model.params, mask)
    assert model.locate(broken, model.stats, column) == f"block_{border - 1}"


def test_a_tied_head_reads_the_word_embedding_and_sends_gradients_there():
    model = _model(pooling="mean", heads={"lm": MaskedLM(16, 31)})
    batch = _batch(model)
    out, _ = model.apply(model.params, model.stats, batch)
    assert out["lm"].shape == (ROWS, 4, 31) and "table" not in out
    # Everything but the decoder's bias is zero: the logits are the bias, by hand.
    zeros = jax.tree.map(jnp.zeros_like, model.params["heads"])
    zeros["lm"]["bias"] = jnp.arange(31.0)
    params = {**model.params, "heads": zeros}
    logits = model.apply(params, model.stats, batch)[0]["lm"]
    np.testing.assert_array_equal(logits, jnp.broadcast_to(jnp.arange(31.0), logits.shape))

    def first_logit(table):
        word = {"word_embeddings": {"embedding": table}}
        body = model.params["backbone"]
        body = {**body, "embeddings": {**body["embeddings"], **word}}
        params = {**model.params, "backbone": body}
        column = model.prefix(params, model.stats, batch, 3)  # so the stem's path is not in it
        column = jax.lax.stop_gradient(column)
        rest = {**column, **_rest(batch)}
        return model.apply(params, model.stats, rest)[0]["lm"][0, 0, 0]

    table = model.params["backbone"]["embeddings"]["word_embeddings"]["embedding"]
    gradient = jax.grad(first_logit)(table)
    assert float(jnp.abs(gradient[0]).max()) > 0 and not gradient[1:].any()


def test_heads_stand_side_by_side():
    two = {"head": Linear(5), "other": Linear(3, pooling="mean"), "a.b(": Linear(2, start="zeros")}
    model = _model(heads=two)
    out, _ = model.apply(model.params, model.stats, _batch(model))
    assert out["other"].shape == (ROWS, 3)
    assert out["a.b("].tolist() == [[0.0, 0.0]] * ROWS
    counts = masks.count(model.params, model.labels)
    assert counts["other"].parameters == 16 * 3 + 3 and counts["a.b("].leaves == 2


def test_fresh_heads_are_of_the_key():
    backbone = _backbone("bert", None)
    one, two = (attach(backbone, {"head": Linear(5)}, key=jax.random.key(k)) for k in (1, 1))
    jax.tree.map(np.testing.assert_array_equal, one.params["heads"], two.params["heads"])
    other = attach(backbone, {"head": Linear(5)}, key=jax.random.key(2)).params["heads"]
    kernel = one.params["heads"]["head"]["classifier"]["kernel"]
    assert not np.array_equal(kernel, other["head"]["classifier"]["kernel"])
    twins = attach(backbone, {"a": Linear(5), "b": Linear(5)}, key=jax.random.key(1)).params
    kernels = [twins["heads"][name]["classifier"]["kernel"] for name in ("a", "b")]
    assert not np.array_equal(*kernels)


@pytest.mark.parametrize("name", ["stem", "block_0", "top", "unused", "pooled", "tokens", "table"])
def test_a_head_must_not_bear_a_name_of_the_backbone(name):
    with pytest.raises(ValueError, match=rf"\['{name}'\] are names of the backbone's own"):
        _model(heads={name: Linear(5)})


def test_a_model_needs_a_head():
    backbone = _backbone("bert", None)
    with pytest.raises(ValueError, match="at least one head"):
        attach(backbone, {}, key=jax.random.key(0))


def test_heads_errors():
    with pytest.raises(ValueError, match="pooling 'max' is not known"):
        _model(heads={"head": Linear(5, pooling="max")})
    with pytest.raises(
        ValueError, match=r"'ones' is not known; there are \['normal', 'scaled', 'zeros'\]"
    ):
        _model(heads={"head": Linear(5, start="ones")})


def test_on_axis_reaches_batch_norm_alone():
    assert _model("resnet").on_axis("devices").backbone.module.axis_name == "devices"
    bert = _model()
    assert bert.on_axis("devices") is bert


def _normed():
    heads = {"a": DenseMap(2, scale=1, rows=1, batch_norm=True), "head": Linear(5)}
    return _model("resnet", heads=heads)


def test_heads_with_statistics_have_a_branch_of_their_own():
    model = _normed()
    assert sorted(model.stats) == ["backbone", "heads"] and list(model.stats["heads"]) == ["a"]
    normed = DenseMap(3, scale=1, rows=1, batch_norm=True)
    more = add_head(model, "b", normed, key=jax.random.key(3))
    assert list(more.stats["heads"]) == ["a", "b"] and list(model.stats["heads"]) == ["a"]
    assert list(add_head(model, "c", Linear(2), key=jax.random.key(3)).stats["heads"]) == ["a"]
    assert model.on_axis("devices").heads["a"].axis_name == "devices"


@pytest.mark.parametrize("remat", [False, True])
def test_statistics_of_a_head_move_with_its_label_and_no_other(remat):
    model = _normed().computing(remat=remat)
    batch, key = _batch(model), jax.random.key(7)
    for label in ("a", "head", "block_1"):
        live = frozenset({label})
        _, stats = model.apply(model.params, model.stats, batch, key=key, live=live)
        moved = set(masks.names(model.stats)) - _equal(model.stats, stats)
        held = held_stats(model.stats, model.labels, live)
        pairs = zip(masks.names(held), jax.tree.leaves(held), strict=True)
        assert moved == {name for name, stays in pairs if not stays}, label
        assert any(name.startswith("heads/a/") for name in moved) == (label == "a")


def test_weights_put_on_a_backbone_are_those_of_attach():
    model = _normed()
    params, stats = outline(model.backbone, model.heads)
    own = model.params["heads"], model.stats["heads"]
    for shapes, made in zip((params, stats), own, strict=True):
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, made)
    same = attach_weights(model.backbone, model.heads, *own)
    jax.tree.map(np.testing.assert_array_equal, same.params, model.params)
    jax.tree.map(np.testing.assert_array_equal, same.stats, model.stats)
