"""LLaMA, Mistral, Qwen2, Qwen3: rope by kinds, windows, configs; parity with PyTorch's classes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_checks import (
    BATCHES,
    PAD,
    batch_of,
    names_and_shapes_agree,
    opened_again,
    same_gradients_everywhere,
    same_head,
    same_hidden_states,
)
from flax.serialization import msgpack_serialize
from flax.traverse_util import flatten_dict, unflatten_dict
from torch_oracle import close, peer

from jtl.models import families, load
from jtl.models.backbone import stage_labels
from jtl.models.families.llama import LLAMA, decoder_config
from jtl.models.families.qwen import layer_windows
from jtl.models.layers.rope import Rope, frequencies, rope_of

CONFIG = dict(
    vocab_size=31,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    initializer_range=0.3,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=1,
)
_LAYER = {
    "input_layernorm/scale": (24,),
    "mlp/down_proj/kernel": (20, 24),
    "mlp/gate_proj/kernel": (24, 20),
    "mlp/up_proj/kernel": (24, 20),
    "post_attention_layernorm/scale": (24,),
    "self_attn/k_proj/kernel": (24, 12),
    "self_attn/o_proj/kernel": (24, 24),
    "self_attn/q_proj/kernel": (24, 24),
    "self_attn/v_proj/kernel": (24, 12),
}
GOLDEN = {
    "embed_tokens/embedding": (31, 24),
    **{f"layers/{i}/{name}": shape for i in range(2) for name, shape in _LAYER.items()},
    "norm/scale": (24,),
}


def _made(model_type="llama", **changes):
    return load.new_backbone(model_type, {**CONFIG, **changes}, key=jax.random.key(0))


@pytest.fixture(scope="module")
def fresh():
    return _made()


def test_golden_tree_and_groups(fresh):
    leaves = flatten_dict(fresh.params, sep="/")
    assert {name: leaf.shape for name, leaf in leaves.items()} == GOLDEN
    assert fresh.labels == stage_labels(2) and fresh.pooling == "last"
    assert fresh.module.beside == ("attention_mask", "position_ids")


@pytest.mark.parametrize(
    ("model_type", "changes", "more"),
    [
        ("llama", dict(attention_bias=True), "qkvo"),
        ("qwen2", {}, "qkv"),
        ("qwen3", dict(head_dim=6), ""),
        ("mistral", {}, ""),
    ],
)
def test_what_the_families_have_more(model_type, changes, more):
    row = families.family(model_type)
    config = load.full_config(row, {**CONFIG, **changes})
    module = row.make(config, "last", jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), row.example(config))["params"]
    found = set(flatten_dict(shapes["layers"]["1"], sep="/")) - set(_LAYER)
    norms = {"self_attn/q_norm/scale", "self_attn/k_norm/scale"} if model_type == "qwen3" else set()
    assert found == {f"self_attn/{x}_proj/bias" for x in more} | norms


def test_only_the_distance_of_two_tokens_counts(fresh):
    batch = batch_of(2, 9)
    places = jnp.tile(jnp.arange(9), (2, 1))
    plain = fresh(batch)["tokens"]
    same = fresh({**batch, "position_ids": places})["tokens"]
    np.testing.assert_allclose(plain, same, atol=1e-6)
    moved = fresh({**batch, "position_ids": places + 5})["tokens"]
    np.testing.assert_allclose(plain, moved, atol=1e-4)
    spread = fresh({**batch, "position_ids": places * 2})["tokens"]
    assert float(jnp.abs(plain - spread).max()) > 1e-2


def test_no_token_sees_what_comes_after_it_or_left_the_window():
    made = _made("mistral", sliding_window=2, num_hidden_layers=1)
    batch = batch_of(1, 8)
    changed = {**batch, "input_ids": batch["input_ids"].at[0, 4].set(30)}
    moved = np.abs(np.asarray(made(batch)["tokens"] - made(changed)["tokens"])).max(-1)[0] > 1e-4
    assert moved.tolist() == [False] * 4 + [True] * 2 + [False] * 2


def test_live_turns_on_dropout_of_attention():
    made = _made(attention_dropout=0.5)
    batch, rngs = batch_of(), {"dropout": jax.random.key(1)}
    params = {"params": made.params}
    held, moved = (
        made.module.apply(params, batch, live, 2, rngs=rngs)
        for live in (frozenset(), frozenset({"block_0"}))
    )
    assert float(jnp.abs(held - moved).max()) > 1e-3


def test_the_flax_checkpoint_calls_its_norms_weight(fresh, tmp_path):
    # FlaxLlamaRMSNorm has a leaf "weight"; modeling_flax_llama.py of version 4.
    flat = flatten_dict(fresh.params, sep="/")
    names = {name: f"model/{name.replace('/scale', '/weight')}" for name in flat}
    tree = unflatten_dict({names[n]: np.asarray(x) for n, x in flat.items()}, sep="/")
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    again = load.load_backbone(tmp_path, config={**CONFIG, "model_type": "llama"})
    assert again.report.fresh == ()
    jax.tree.map(np.testing.assert_array_equal, fresh.params, again.params)


def test_windows_of_layers():
    config = dict(num_hidden_layers=2, sliding_window=3, use_sliding_window=True)
    kinds = ["full_attention", "sliding_attention"]
    assert layer_windows({**config, "layer_types": kinds}) == (None, 3)
    assert layer_windows({**config, "layer_types": None}) == (None, None)
    # Qwen2's files state a window that is not used.
    assert layer_windows({**config, "use_sliding_window": False}) == (None, None)
    for wrong in (kinds[:1], ["chunked_attention"] * 2):
        with pytest.raises(ValueError, match="layer_types is .* correct layer_types"):
            layer_windows({**config, "layer_types": wrong})


def _rope(**scaling):
    return rope_of(dict(max_position_embeddings=64, rope_theta=100.0, rope_scaling=scaling), 8)


def test_rope_by_hand():
    plain = 100.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(frequencies(_rope(), 8), plain, rtol=1e-6)
    linear = _rope(type="linear", factor=4.0)
    np.testing.assert_allclose(frequencies(linear, 8), plain / 4, rtol=1e-6)
    dynamic = _rope(rope_type="dynamic", factor=2.0)
    np.testing.assert_allclose(frequencies(dynamic, 64), plain, rtol=1e-6)
    # At twice the length the base is 100 * (2 * 2 - 1)^(8 / 6).
    longer = (100.0 * 3.0 ** (8 / 6)) ** (-np.arange(4) / 4)
    np.testing.assert_allclose(frequencies(dynamic, 128), longer, rtol=1e-6)
    np.testing.assert_allclose(frequencies(dynamic, jnp.asarray(128)), longer, rtol=1e-6)


def test_rope_of_llama3_by_hand():
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    made = _rope(rope_type="llama3", original_max_position_embeddings=16, **scaling)
    plain = 100.0 ** (-np.arange(4) / 4)
    turns = 16 * plain / (2 * math.pi)  # 2.55, 0.81, 0.25, 0.08
    share = np.array([(turns[0] - 1) / 3, 0, 0, 0])
    expected = share * plain + (1 - share) * plain / 8
    np.testing.assert_allclose(frequencies(made, 8), expected, rtol=1e-6)


def test_longrope_has_lists_for_short_and_long_texts():
    lists = dict(short_factor=[1.0, 2.0, 3.0, 4.0], long_factor=[5.0, 6.0, 7.0, 8.0])
    made = _rope(rope_type="longrope", original_max_position_embeddings=16, **lists)
    plain = 100.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(frequencies(made, 16) * plain**-1, 1 / np.arange(1, 5), rtol=1e-5)
    np.testing.assert_allclose(frequencies(made, 17) * plain**-1, 1 / np.arange(5, 9), rtol=1e-5)
    assert made.scale == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))


def test_yarn_leaves_fast_pairs_and_divides_slow_ones():
    made = Rope(size=64, kind="yarn", original=2048, factor=4.0)
    ratio = np.asarray(frequencies(made, 1)) / 10000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(ratio[:8], 1.0, rtol=1e-5)
    np.testing.assert_allclose(ratio[-8:], 0.25, rtol=1e-5)
    assert (np.diff(ratio) <= 1e-6).all()
    stated = _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    assert stated.scale == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (dict(rope_type="mrope"), "rope_type='mrope'; jtl has"),
        (dict(rope_type="linear"), r"rope 'linear' of the config lacks \['factor'\]"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (
            dict(rope_type="longrope", short_factor=[1.0], long_factor=[1.0] * 4),
            r"\{'short_factor': 1\} numbers; heads of 8 have 4 pairs",
        ),
    ],
)
def test_rope_errors(scaling, message):
    with pytest.raises(ValueError, match=message):
        _rope(**scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden_size=None), r"lacks \['hidden_size'\]; it has \["),
        (dict(num_key_value_heads=3), "num_attention_heads=4 has to be a multiple of .*=3"),
        (dict(hidden_act="gleu"), "activation 'gleu' is not known"),
        (dict(head_dim=5), "heads of 5 numbers"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        decoder_config({**CONFIG, **changes})


def test_bad_input_is_named(fresh):
    with pytest.raises(ValueError, match="no column 'input_ids'"):
        fresh({"pixel_values": jnp.ones((1, 2))})
    with pytest.raises(ValueError, match=r"'max' is not known to llama.*'last', 'mean'"):
        LLAMA.make(CONFIG, "max", jnp.float32)


_LISTS = dict(short_factor=[1.0, 1.5, 2.0], long_factor=[2.0, 3.0, 4.0])
_BANDS = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
KINDS = {
    "llama": ("LlamaModel", dict(attention_bias=True, mlp_bias=True, head_dim=10)),
    "mistral": ("MistralModel", dict(sliding_window=4)),
    "qwen2": (
        "Qwen2Model",
        dict(use_sliding_window=True, sliding_window=3, max_window_layers=1),
    ),
    "qwen3": ("Qwen3Model", dict(head_dim=8, sliding_window=3)),
}
ROPES = {
    "linear": dict(factor=2.0),
    "dynamic": dict(factor=2.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=8),
    "llama3": dict(factor=8.0, **_BANDS),
    "longrope": dict(original_max_position_embeddings=8, **_LISTS),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    name, changes = KINDS[request.param]
    folder = tmp_path_factory.mktemp("llama")
    return peer(name, folder, **{**CONFIG, **changes}), load.load_backbone(folder)


@pytest.mark.parity
def test_forward_is_that_of_transformers(pair):
    theirs, ours = pair
    for batch in BATCHES.values():
        same_hidden_states(ours, theirs, batch)


@pytest.mark.parity
def test_gradients_of_all_parameters_are_those_of_transformers(pair):
    theirs, ours = pair
    same_gradients_everywhere(ours, theirs, batch_of(3, 11, right=2, left=3))


@pytest.mark.parity
def test_bfloat16_stays_near_transformers(pair):
    theirs, ours = pair
    batch = batch_of(right=2)
    half = dataclasses.replace(ours, module=ours.module.clone(dtype=jnp.bfloat16))
    out = half(batch)["pooled"]
    assert out.dtype == jnp.bfloat16
    close(out, ours(batch)["pooled"], 0.05)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ROPES)
def test_rope_is_that_of_transformers(tmp_path, kind):
    scaling = {"rope_type": kind, "rope_theta": 500.0, **ROPES[kind]}
    changes = dict(num_hidden_layers=1, max_position_embeddings=16, rope_parameters=scaling)
    theirs = peer("LlamaModel", tmp_path, **{**CONFIG, **changes})
    ours = load.load_backbone(tmp_path)
    # 8 tokens are within every model's first length, 24 beyond.
    for length in (8, 24):
        same_hidden_states(ours, theirs, batch_of(2, length))


@pytest.mark.parity
def test_rope_with_positions_beyond_its_length(tmp_path):
    scaling = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0}
    changes = dict(num_hidden_layers=1, max_position_embeddings=16, rope_parameters=scaling)
    theirs = peer("LlamaModel", tmp_path, **{**CONFIG, **changes})
    batch = batch_of(2, 8, position_ids=jnp.tile(jnp.arange(8) * 4, (2, 1)))
    same_hidden_states(load.load_backbone(tmp_path), theirs, batch)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("classes", "kind", "what"),
    [
        ("Llama", "causal_lm", "CausalLM"),
        ("Llama", "classification", "SequenceClassification"),
        ("Llama", "token_classification", "TokenClassification"),
        ("Llama", "question_answering", "QuestionAnswering"),
        ("Mistral", "question_answering", "QuestionAnswering"),
        ("Qwen2", "classification", "SequenceClassification"),
        ("Qwen3", "causal_lm", "CausalLM"),
    ],
)
def test_heads_are_those_of_transformers(tmp_path, classes, kind, what):
    one = {**CONFIG, "num_hidden_layers": 1, "num_labels": 5}
    theirs = peer(f"{classes}For{what}", tmp_path / "a", **one)
    batch = batch_of(right=2, left=3)
    model = same_head(tmp_path / "a", theirs, kind, batch)
    opened_again(tmp_path / "b", f"AutoModelFor{what}", model, batch)


@pytest.mark.parity
def test_a_tied_head_has_no_weights_of_its_own(tmp_path):
    theirs = peer("LlamaForCausalLM", tmp_path / "a", **CONFIG, tie_word_embeddings=True)
    model = same_head(tmp_path / "a", theirs, "causal_lm", batch_of(right=2))
    assert model.params["heads"]["head"] == {}
    opened_again(tmp_path / "b", "AutoModelForCausalLM", model, batch_of(right=2))


_LLAMA_2_7B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
_LLAMA_3_8B = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
_LLAMA_32_1B = dict(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)
_QWEN2_HALF_B = dict(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
_QWEN3_06B = dict(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("classes", "model_type", "config", "leaves"),
    [
        ("Llama", "llama", _LLAMA_2_7B, 2 + 9 * 32),
        ("Llama", "llama", _LLAMA_3_8B, 2 + 9 * 32),
        ("Llama", "llama", _LLAMA_32_1B, 2 + 9 * 16),
        ("Mistral", "mistral", {}, 2 + 9 * 32),  # the defaults are those of 7B
        ("Qwen2", "qwen2", _QWEN2_HALF_B, 2 + 12 * 24),
        ("Qwen3", "qwen3", _QWEN3_06B, 2 + 11 * 28),
    ],
)
def test_names_are_those_of_the_published_sizes(classes, model_type, config, leaves):
    assert names_and_shapes_agree(f"{classes}ForCausalLM", model_type, **config) == leaves
