"""GPT-2 and GPT-BigCode: values by hand, names, configs; parity with transformers' PyTorch."""

import dataclasses
import json

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

from jtl.data.text import load_text_inputs
from jtl.models import load
from jtl.models.backbone import stage_labels
from jtl.models.export import export
from jtl.models.families.gpt import GPT2, GPT_BIGCODE, gpt_config
from jtl.models.heads import Linear
from jtl.models.model import attach

CONFIG = dict(
    vocab_size=31,
    n_positions=16,
    n_embd=16,
    n_layer=2,
    n_head=4,
    initializer_range=0.3,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=1,
)
_BLOCK = {
    "attn/c_attn/bias": (48,),
    "attn/c_attn/kernel": (16, 48),
    "attn/c_proj/bias": (16,),
    "attn/c_proj/kernel": (16, 16),
    "ln_1/bias": (16,),
    "ln_1/scale": (16,),
    "ln_2/bias": (16,),
    "ln_2/scale": (16,),
    "mlp/c_fc/bias": (64,),
    "mlp/c_fc/kernel": (16, 64),
    "mlp/c_proj/bias": (16,),
    "mlp/c_proj/kernel": (64, 16),
}
GOLDEN = {
    "wte/embedding": (31, 16),
    "wpe/embedding": (16, 16),
    **{f"h/{i}/{name}": shape for i in range(2) for name, shape in _BLOCK.items()},
    "ln_f/bias": (16,),
    "ln_f/scale": (16,),
}


@pytest.fixture(scope="module")
def fresh():
    return load.new_backbone("gpt2", CONFIG, key=jax.random.key(0))


def test_golden_tree_and_groups(fresh):
    leaves = flatten_dict(fresh.params, sep="/")
    assert {name: leaf.shape for name, leaf in leaves.items()} == GOLDEN
    assert fresh.labels == stage_labels(2) and fresh.pooling == "last"
    shared = load.new_backbone("gpt_bigcode", CONFIG, key=jax.random.key(0))
    assert shared.params["h"]["0"]["attn"]["c_attn"]["kernel"].shape == (16, 16 + 2 * 4)


def test_layers_that_write_to_the_stream_start_smaller(fresh):
    leaves = flatten_dict(fresh.params, sep="/")
    wide, last = leaves["h/1/mlp/c_fc/kernel"], leaves["h/1/mlp/c_proj/kernel"]
    assert float(wide.std()) == pytest.approx(0.3, rel=0.1)
    assert float(last.std()) == pytest.approx(0.3 / np.sqrt(2 * 2), rel=0.1)


def test_a_block_of_zeros_passes_words_and_positions(fresh):
    flat = flatten_dict(jax.tree.map(jnp.zeros_like, fresh.params), sep="/")
    flat["wte/embedding"] = flat["wte/embedding"].at[5, :2].set(jnp.array([1.0, 2.0]))
    flat["wpe/embedding"] = flat["wpe/embedding"].at[1, 1].set(3.0)
    params = {"params": unflatten_dict(flat, sep="/")}
    batch = {"input_ids": jnp.array([[5, 5]])}
    hidden = fresh.module.apply(params, batch, frozenset(), 3)
    assert hidden[0, :, :2].tolist() == [[1.0, 2.0], [1.0, 5.0]] and not hidden[0, :, 2:].any()
    moved = {**batch, "position_ids": jnp.array([[1, 0]])}
    hidden = fresh.module.apply(params, moved, frozenset(), 3)
    assert hidden[0, :, :2].tolist() == [[1.0, 5.0], [1.0, 2.0]]


def test_no_token_sees_what_comes_after_it(fresh):
    batch = batch_of(2, 9)
    other = {**batch, "input_ids": batch["input_ids"].at[:, 6:].set(2)}
    one, two = (np.asarray(fresh(b)["tokens"]) for b in (batch, other))
    np.testing.assert_array_equal(one[:, :6], two[:, :6])
    assert (np.abs(one[:, 6:] - two[:, 6:]).max(-1) > 1e-3).all()


def test_padding_changes_nothing_on_either_side(fresh):
    batch = batch_of(1, 5)
    plain = fresh(batch)
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def padded(before, after):
        width = ((0, 0), (before, after))
        count = jnp.maximum(jnp.cumsum(jnp.pad(mask, width), 1) - 1, 0)
        columns = {"input_ids": jnp.pad(ids, width), "attention_mask": jnp.pad(mask, width)}
        return fresh({**columns, "position_ids": count})

    for before, after in ((0, 3), (3, 0), (1, 2)):
        out = padded(before, after)
        inner = out["tokens"][:, before : before + 5]
        np.testing.assert_allclose(inner, plain["tokens"], atol=1e-5)
        np.testing.assert_allclose(out["pooled"], plain["pooled"], atol=1e-5)


def test_the_mean_is_over_real_tokens(fresh):
    module = GPT2.make(fresh.config, "mean", jnp.float32)
    batch = batch_of(2, 6, right=2)
    out = module.apply({"params": fresh.params}, batch)
    np.testing.assert_allclose(out["pooled"][0], out["tokens"][0, :4].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "rates"),
    [(0, dict(embd_pdrop=0.5)), (1, dict(attn_pdrop=0.5)), (1, dict(resid_pdrop=0.5))],
)
def test_live_turns_on_each_kind_of_dropout(fresh, stage, rates):
    off = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    batch, rngs = batch_of(), {"dropout": jax.random.key(1)}
    live = frozenset({stage_labels(2)[stage]})
    params = {"params": fresh.params}
    quiet = GPT2.make({**fresh.config, **off}, "last", jnp.float32)
    noisy = GPT2.make({**fresh.config, **off, **rates}, "last", jnp.float32)
    held = noisy.apply(params, batch, frozenset(), stage + 1)
    moved = noisy.apply(params, batch, live, stage + 1, rngs=rngs)
    assert float(jnp.abs(moved - held).max()) > 1e-3
    np.testing.assert_array_equal(held, quiet.apply(params, batch, live, stage + 1, rngs=rngs))


def test_the_flax_checkpoint_has_its_kernels_the_other_way(fresh, tmp_path):
    # FlaxConv1D keeps (features, inputs) and turns it at use; modeling_flax_gpt2.py of version 4.
    flat = flatten_dict(fresh.params, sep="/")
    turned = {
        f"transformer/{n}": np.asarray(x.T if "/c_" in n and n.endswith("kernel") else x)
        for n, x in flat.items()
    }
    (tmp_path / "flax_model.msgpack").write_bytes(
        msgpack_serialize(unflatten_dict(turned, sep="/"))
    )
    again = load.load_backbone(tmp_path, config={**CONFIG, "model_type": "gpt2"})
    assert again.report.fresh == ()
    jax.tree.map(np.testing.assert_array_equal, fresh.params, again.params)


def test_a_tree_of_our_own_is_not_turned(fresh, tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(
        msgpack_serialize(jax.tree.map(np.asarray, fresh.params))
    )
    again = load.load_backbone(tmp_path, config={**CONFIG, "model_type": "gpt2"})
    jax.tree.map(np.testing.assert_array_equal, fresh.params, again.params)


def test_a_text_is_padded_with_its_end_and_the_folder_says_so(tmp_path):
    (tmp_path / "vocab.json").write_text('{"<|endoftext|>": 0, "a": 1, "b": 2}')
    (tmp_path / "merges.txt").write_text("")
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 9}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {**CONFIG, "pad_token_id": None}
    inputs = load_text_inputs(tmp_path, config)
    made = load.new_backbone("gpt2", config, key=jax.random.key(0), inputs=inputs)
    batch = made.inputs(["abba", "b"])
    alone = made(made.inputs(["b"]))
    np.testing.assert_allclose(made(batch)["pooled"][1], alone["pooled"][0], atol=1e-5)
    model = attach(made, {"head": Linear(2, bias=False)}, key=jax.random.key(1))
    stated = json.loads((export(tmp_path / "x", model) / "config.json").read_text())
    assert stated["pad_token_id"] == 0
    assert stated["architectures"] == ["GPT2ForSequenceClassification"]
    # A layer with a bias is not that class's: it lies beside the bare backbone.
    model = attach(made, {"head": Linear(2)}, key=jax.random.key(1))
    stated = json.loads((export(tmp_path / "y", model) / "config.json").read_text())
    assert stated["architectures"] == ["GPT2Model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_embd=None), r"the GPT config lacks \['n_embd'\]; it has \["),
        (dict(n_head=3), "n_head=3 does not divide n_embd=16"),
        (dict(activation_function="gleu"), "activation 'gleu' is not known"),
        (dict(add_cross_attention=True), "self-attention alone"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        gpt_config({**CONFIG, **changes})


def test_bad_input_is_named(fresh):
    with pytest.raises(ValueError, match="17 tokens; the model has 16 positions"):
        fresh({"input_ids": jnp.ones((1, 17), jnp.int32)})
    with pytest.raises(ValueError, match="no column 'input_ids'"):
        fresh({"pixel_values": jnp.ones((1, 2))})
    with pytest.raises(ValueError, match=r"'max' is not known to GPT.*'last', 'mean'"):
        GPT2.make(CONFIG, "max", jnp.float32)


KINDS = {
    "gpt2": ("GPT2Model", {}),
    "scaled by depth": (
        "GPT2Model",
        dict(scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False, n_inner=24),
    ),
    "shared key": ("GPTBigCodeModel", {}),
    "head after head": ("GPTBigCodeModel", dict(multi_query=False, activation_function="relu")),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    name, changes = KINDS[request.param]
    folder = tmp_path_factory.mktemp("gpt")
    return peer(name, folder, **{**CONFIG, **changes}), load.load_backbone(folder)


@pytest.mark.parity
def test_forward_is_that_of_transformers(pair):
    theirs, ours = pair
    for batch in BATCHES.values():
        same_hidden_states(ours, theirs, batch)
    types = batch_of(token_type_ids=batch_of(seed=3)["input_ids"] % 2 + 4)
    same_hidden_states(ours, theirs, types)


@pytest.mark.parity
def test_gradients_of_all_parameters_are_those_of_transformers(pair):
    theirs, ours = pair
    same_gradients_everywhere(ours, theirs, batch_of(3, 16, right=2, left=3))


@pytest.mark.parity
def test_bfloat16_stays_near_transformers(pair):
    theirs, ours = pair
    batch = batch_of(right=2)
    half = dataclasses.replace(ours, module=ours.module.clone(dtype=jnp.bfloat16))
    out = half(batch)["pooled"]
    assert out.dtype == jnp.bfloat16
    close(out, ours(batch)["pooled"], 0.05)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "kind", "auto"),
    [
        ("GPT2LMHeadModel", "causal_lm", "AutoModelForCausalLM"),
        ("GPT2ForSequenceClassification", "classification", "AutoModelForSequenceClassification"),
        ("GPT2ForTokenClassification", "token_classification", "AutoModelForTokenClassification"),
        ("GPT2ForQuestionAnswering", "question_answering", "AutoModelForQuestionAnswering"),
        ("GPTBigCodeForCausalLM", "causal_lm", "AutoModelForCausalLM"),
        (
            "GPTBigCodeForSequenceClassification",
            "classification",
            "AutoModelForSequenceClassification",
        ),
        (
            "GPTBigCodeForTokenClassification",
            "token_classification",
            "AutoModelForTokenClassification",
        ),
    ],
)
def test_heads_are_those_of_transformers(tmp_path, name, kind, auto):
    theirs = peer(name, tmp_path / "a", **CONFIG, num_labels=5)
    batch = batch_of(right=2, left=3)
    model = same_head(tmp_path / "a", theirs, kind, batch)
    opened_again(tmp_path / "b", auto, model, batch)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "model_type", "config"),
    [
        ("GPT2LMHeadModel", "gpt2", {}),
        ("GPT2LMHeadModel", "gpt2", dict(n_embd=1600, n_layer=48, n_head=25)),  # gpt2-xl
        (
            "GPTBigCodeForCausalLM",
            "gpt_bigcode",  # starcoderbase
            dict(
                vocab_size=49152,
                n_positions=8192,
                n_embd=6144,
                n_layer=40,
                n_head=48,
                n_inner=24576,
            ),
        ),
    ],
)
def test_names_are_those_of_the_published_sizes(name, model_type, config):
    per_block = len(_BLOCK)
    blocks = config.get("n_layer", 12)
    assert names_and_shapes_agree(name, model_type, **config) == 4 + per_block * blocks


@pytest.mark.parity
def test_buffers_of_old_files_are_no_surprise(tmp_path):
    import torch

    theirs = peer("GPT2Model", tmp_path, **CONFIG)
    state = {**theirs.state_dict(), "h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    state["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert load.load_backbone(tmp_path).report.fresh == ()


def test_rows_of_the_table():
    assert GPT2.layout is not None and GPT_BIGCODE.layout is None
    assert GPT2.prefix == GPT_BIGCODE.prefix == "transformer"
