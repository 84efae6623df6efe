"""StarCoder2: names, dropout; parity with transformers' PyTorch model."""

import dataclasses

import jax
import jax.numpy as jnp
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
from flax.traverse_util import flatten_dict
from torch_oracle import close, peer

from jtl.models import load
from jtl.models.backbone import stage_labels

CONFIG = dict(
    vocab_size=31,
    hidden_size=16,
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
_WIDTHS = {"q": 16, "k": 8, "v": 8, "o": 16}
_LAYER = {
    "input_layernorm/bias": (16,),
    "input_layernorm/scale": (16,),
    "mlp/c_fc/bias": (20,),
    "mlp/c_fc/kernel": (16, 20),
    "mlp/c_proj/bias": (16,),
    "mlp/c_proj/kernel": (20, 16),
    "post_attention_layernorm/bias": (16,),
    "post_attention_layernorm/scale": (16,),
    **{f"self_attn/{x}_proj/bias": (width,) for x, width in _WIDTHS.items()},
    **{f"self_attn/{x}_proj/kernel": (16, width) for x, width in _WIDTHS.items()},
}
GOLDEN = {
    "embed_tokens/embedding": (31, 16),
    **{f"layers/{i}/{name}": shape for i in range(2) for name, shape in _LAYER.items()},
    "norm/bias": (16,),
    "norm/scale": (16,),
}


def _made(**changes):
    return load.new_backbone("starcoder2", {**CONFIG, **changes}, key=jax.random.key(0))


def test_golden_tree():
    made = _made()
    leaves = flatten_dict(made.params, sep="/")
    assert {name: leaf.shape for name, leaf in leaves.items()} == GOLDEN
    assert made.module.config.epsilon == 1e-5
    plain = {n for n in flatten_dict(_made(use_bias=False).params, sep="/") if n.endswith("bias")}
    assert all("norm" in name for name in plain) and len(plain) == 5


@pytest.mark.parametrize(
    ("stage", "rate"), [(0, "embedding_dropout"), (1, "residual_dropout"), (1, "attention_dropout")]
)
def test_live_turns_on_each_kind_of_dropout(stage, rate):
    made = _made(**{rate: 0.5})
    label, params = stage_labels(2)[stage], {"params": made.params}
    batch, rngs = batch_of(), {"dropout": jax.random.key(1)}
    held, moved = (
        made.module.apply(params, batch, live, stage + 1, rngs=rngs)
        for live in (frozenset(), frozenset({label}))
    )
    assert float(jnp.abs(held - moved).max()) > 1e-3


@pytest.fixture(scope="module", params=["all keys", "a window, no biases"])
def pair(request, tmp_path_factory):
    changes = {} if request.param == "all keys" else dict(sliding_window=4, use_bias=False)
    folder = tmp_path_factory.mktemp("starcoder")
    return peer("Starcoder2Model", folder, **CONFIG, **changes), load.load_backbone(folder)


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
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("causal_lm", "CausalLM"),
        ("classification", "SequenceClassification"),
        ("token_classification", "TokenClassification"),
    ],
)
def test_heads_are_those_of_transformers(tmp_path, kind, what):
    one = {**CONFIG, "num_hidden_layers": 1, "num_labels": 5}
    theirs = peer(f"Starcoder2For{what}", tmp_path / "a", **one)
    batch = batch_of(right=2, left=3)
    model = same_head(tmp_path / "a", theirs, kind, batch)
    opened_again(tmp_path / "b", f"AutoModelFor{what}", model, batch)


@pytest.mark.parity
def test_names_are_those_of_the_published_size():
    # starcoder2-3b
    sizes = dict(hidden_size=3072, intermediate_size=12288, num_hidden_layers=30)
    heads = dict(num_attention_heads=24, num_key_value_heads=2, sliding_window=4096)
    agree = names_and_shapes_agree("Starcoder2ForCausalLM", "starcoder2", **sizes, **heads)
    assert agree == 3 + 16 * 30
