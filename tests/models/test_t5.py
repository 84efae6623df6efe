"""T5, mT5 and T5's encoder: values by hand, names, streams; parity with transformers' models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from torch_oracle import close, names_agree, peer, same_gradients, to_torch

from jtl.models.backbone import column, stage_labels
from jtl.models.export import export, import_model
from jtl.models.families.t5 import T5_ROW, t5_config
from jtl.models.heads import Linear
from jtl.models.layers import relative_buckets
from jtl.models.layers.t5_stack import T5Sizes, T5Stack
from jtl.models.load import load_backbone, new_backbone
from jtl.models.load_head import load_head
from jtl.models.model import attach

CONFIG = dict(
    vocab_size=31,
    d_model=16,
    d_kv=6,
    d_ff=24,
    num_layers=2,
    num_decoder_layers=1,
    num_heads=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    feed_forward_proj="relu",
)
_ATTENTION = {
    **{f"{name}/kernel": (16, 12) for name in "qkv"},
    "o/kernel": (12, 16),
}


def _layer(place, kind, leaves):
    names = {f"layer/{place}/{kind}/{name}": shape for name, shape in leaves.items()}
    return {**names, f"layer/{place}/layer_norm/scale": (16,)}


_TABLE = {"relative_attention_bias/embedding": (8, 2)}
_FEED_FORWARD = {"wi/kernel": (16, 24), "wo/kernel": (24, 16)}


def _block(stack, index, decoder):
    own = {**_ATTENTION, **(_TABLE if index == 0 else {})}
    leaves = _layer(0, "SelfAttention", own)
    if decoder:
        leaves |= _layer(1, "EncDecAttention", _ATTENTION)
    leaves |= _layer(1 + decoder, "DenseReluDense", _FEED_FORWARD)
    return {f"{stack}/block/{index}/{name}": shape for name, shape in leaves.items()}


GOLDEN = {
    "shared/embedding": (31, 16),
    **_block("encoder", 0, False),
    **_block("encoder", 1, False),
    "encoder/final_layer_norm/scale": (16,),
    **_block("decoder", 0, True),
    "decoder/final_layer_norm/scale": (16,),
}


def _batch(n=3, source=7, target=5, left=False):
    """Rows of two lengths; the first one is padded in both streams, the decoder's on one side."""
    rng = np.random.default_rng(0)
    mask, own = np.ones((n, source), np.int32), np.ones((n, target), np.int32)
    mask[0, source - 2 :] = 0
    own[0, :2] = 0 if left else 1
    own[0, target - 2 :] = 1 if left else 0
    batch = {
        "input_ids": rng.integers(0, 31, (n, source)).astype(np.int32),
        "attention_mask": mask,
        "decoder_input_ids": rng.integers(0, 31, (n, target)).astype(np.int32),
        "decoder_attention_mask": own,
    }
    return {name: jnp.asarray(value) for name, value in batch.items()}


def _source(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def made():
    return new_backbone("t5", CONFIG, key=jax.random.key(0))


@pytest.fixture(scope="module")
def encoder(made):
    """The encoder alone, with the weights of the whole model."""
    alone = new_backbone("t5_encoder", CONFIG, key=jax.random.key(1))
    params = {name: made.params[name] for name in ("shared", "encoder")}
    return lambda batch: alone.module.apply({"params": params}, batch)


def test_golden_tree(made):
    flat = flatten_dict(made.params, sep="/")
    assert {name: leaf.shape for name, leaf in flat.items()} == GOLDEN
    assert made.labels == stage_labels(3) and made.dim == 16


def test_groups_put_the_tables_into_the_stem(made):
    rules = dict(made.groups)
    assert rules[".*/relative_attention_bias/.*"] == "stem"
    assert rules["encoder/final_layer_norm/.*"] == rules["encoder/block/1/.*"] == "block_1"
    assert rules["decoder/block/0/.*"] == "block_2"


def test_attention_by_hand():
    # One head of width 1, no scale: the scores are q k + the table's entry of the distance.
    sizes = T5Sizes(1, 1, 1, 1, 1, decoder=False, gated=False, activation="relu", buckets=4)
    stack = T5Stack(sizes)
    hidden = jnp.array([[[1.0], [2.0], [-1.0]]])
    variables = stack.init(jax.random.key(0), 0, hidden, None)
    flat = jax.tree.map(jnp.ones_like, variables["params"])
    parts = flat["block"]["0"]["layer"]
    table = jnp.array([0.0, 1.0, 0.0, 2.0])[:, None]  # itself and before; behind: 0, 1 or more
    parts["0"]["SelfAttention"]["relative_attention_bias"]["embedding"] = table
    parts["1"]["DenseReluDense"]["wo"]["kernel"] = jnp.zeros((1, 1))
    got = stack.apply({"params": flat}, 0, hidden, None)
    x = np.sign(np.asarray(hidden[0, :, 0]))  # the norm of one number
    bias = np.array([[0.0, 2.0, 2.0], [1.0, 0.0, 2.0], [1.0, 1.0, 0.0]])
    scores = np.outer(x, x) + bias
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(got[0, :, 0], np.asarray(hidden[0, :, 0]) + shares @ x, atol=1e-5)


def test_the_encoder_alone_is_that_of_the_whole(made, encoder):
    batch = _batch()
    whole, alone = made(batch), encoder(_source(batch))
    np.testing.assert_allclose(alone["tokens"], whole["encoder"], atol=1e-6)
    mean = made.module.clone(pooling="encoder_mean").apply({"params": made.params}, batch)
    np.testing.assert_allclose(alone["pooled"], mean["pooled"], atol=1e-6)
    np.testing.assert_allclose(mean["pooled"][0], whole["encoder"][0, :5].mean(0), atol=1e-6)


def test_poolings_of_the_decoder(made):
    batch = _batch()
    out = made(batch)
    np.testing.assert_array_equal(out["pooled"][0], out["tokens"][0, 2])
    np.testing.assert_array_equal(out["pooled"][1], out["tokens"][1, 4])
    mean = made.module.clone(pooling="decoder_mean").apply({"params": made.params}, batch)
    np.testing.assert_allclose(mean["pooled"][0], out["tokens"][0, :3].mean(0), atol=1e-6)


def test_padding_on_either_side_changes_nothing(made):
    batch = _batch()
    long = made(batch)
    short = made({n: x[:1, : 3 if n.startswith("decoder") else 5] for n, x in batch.items()})
    np.testing.assert_allclose(long["tokens"][:1, :3], short["tokens"], atol=2e-6)
    left = {n: jnp.roll(x[:1], 2, axis=1) for n, x in batch.items()}
    np.testing.assert_allclose(made(left)["tokens"][:, 2:], short["tokens"], atol=2e-6)


def test_later_tokens_do_not_reach_earlier_ones(made):
    batch = _batch()
    other = {**batch, "decoder_input_ids": batch["decoder_input_ids"].at[:, 3:].set(1)}
    first, second = made(batch)["tokens"], made(other)["tokens"]
    np.testing.assert_allclose(first[:, :3], second[:, :3], atol=1e-6)
    assert float(jnp.abs(first[1:, 3:] - second[1:, 3:]).max()) > 1e-3


def test_one_mask_says_where_the_decoder_begins(made):
    batch = _batch()
    variables = {"params": made.params}
    hidden = made.module.apply(variables, batch, frozenset(), 2)
    assert hidden.shape == (3, 12, 16)
    whole = made.module.apply(variables, batch)["tokens"]
    kept = {**batch, column(2, 3): hidden}
    del kept["decoder_attention_mask"], kept["input_ids"], kept["decoder_input_ids"]
    got = made.module.apply(variables, kept)["tokens"]
    np.testing.assert_allclose(got[1:], whole[1:], atol=1e-6)
    with pytest.raises(ValueError, match="nothing says where the decoder's positions begin"):
        made.module.apply(variables, {column(2, 3): hidden})


def test_rematerialised_blocks_give_the_tables_their_gradients(made):
    plain, batch = attach(made, {"head": Linear(2)}, key=jax.random.key(1)), _batch()
    live = frozenset({"head", *plain.groups})

    def gradient(model):
        def loss(params):
            key = jax.random.key(2)
            return jnp.sum(model.apply(params, {}, batch, key=key, live=live)[0]["head"] ** 2)

        return jax.jit(jax.grad(loss))(model.params)["backbone"]

    expected, got = gradient(plain), gradient(plain.computing(remat=True))
    for stack in ("encoder", "decoder"):
        table = expected[stack]["block"]["0"]["layer"]["0"]["SelfAttention"]
        assert float(jnp.abs(table["relative_attention_bias"]["embedding"]).max()) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), expected, got)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(d_model=None), r"the T5 config lacks \['d_model'\]"),
        (dict(is_decoder=True), "is_decoder=True; here are the encoder with the decoder"),
        (dict(feed_forward_proj="gated-gelu-x"), "feed_forward_proj='gated-gelu-x'"),
        (dict(feed_forward_proj="gleu"), "activation 'gleu' is not known"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        t5_config({**CONFIG, **changes})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, r"no column 'input_ids'"),
        (
            {"input_ids": jnp.zeros((1, 2), jnp.int32)},
            "no column 'decoder_input_ids'.* load the encoder alone with family='t5_encoder'",
        ),
        ({"input_ids": jnp.zeros(2, jnp.int32)}, r"'input_ids' is int32\(2,\)"),
    ],
)
def test_bad_input_is_named(made, batch, message):
    with pytest.raises(ValueError, match=message):
        made.module.apply({"params": made.params}, batch)


def test_unknown_pooling_names_the_known_ones():
    with pytest.raises(ValueError, match="'cls' is not known to T5.*'decoder_last'"):
        T5_ROW.make(CONFIG, "cls", jnp.float32)


V1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=2)


@pytest.fixture(scope="module", params=["T5Model", "MT5Model"])
def pair(request, tmp_path_factory):
    """A peer and our backbone of its folder: the first T5, and mT5 with its gates."""
    folder = tmp_path_factory.mktemp("t5")
    changes = {} if request.param == "T5Model" else V1_1
    # Scores are not scaled: with larger weights float32 itself is 1e-5 away from float64.
    theirs = peer(request.param, folder, spread=0.2, **{**CONFIG, **changes})
    return theirs, load_backbone(folder)


def _borders(module, params, batch):
    """The activations at each border below the top, in one forward pass."""
    found = []
    for stop in range(1, module.blocks + 2):
        start = {column(stop - 1, module.blocks): found[-1]} if found else {}
        found.append(module.apply({"params": params}, {**batch, **start}, frozenset(), stop))
    return found


@pytest.mark.parity
def test_every_hidden_state_is_that_of_transformers(pair):
    import torch

    theirs, ours = pair
    assert not ours.report.fresh
    batch = _batch()
    with torch.no_grad():
        expected = theirs(**to_torch(batch), output_hidden_states=True)
    found = jax.jit(lambda params: _borders(ours.module, params, batch))(ours.params)
    layers = ours.module.config.num_layers
    # Theirs ends each list with the norm; ours ends the encoder's last block with it.
    for got, hidden in zip(found[: layers + 1], expected.encoder_hidden_states, strict=True):
        close(got[:, :7], hidden)
    for got, hidden in zip(found[layers:], expected.decoder_hidden_states[:-1], strict=False):
        close(got[:, 7:], hidden)
    out = ours(batch)
    close(out["tokens"], expected.last_hidden_state)
    close(out["encoder"], expected.encoder_last_hidden_state)


@pytest.mark.parity
@pytest.mark.parametrize("missing", [(), ("attention_mask", "decoder_attention_mask")])
def test_long_texts_and_left_padding_are_those_of_transformers(pair, missing):
    import torch

    theirs, ours = pair
    batch = _batch(2, 23, 18, left=True)
    real = np.asarray(batch["decoder_attention_mask"]).astype(bool)
    batch = {name: value for name, value in batch.items() if name not in missing}
    with torch.no_grad():
        expected = theirs(**to_torch(batch)).last_hidden_state.numpy()
    got = np.asarray(ours(batch)["tokens"])
    # What padding on the left sees is not the same: nothing real is before it.
    rows = real if not missing else np.ones_like(real)
    close(got[rows], expected[rows])


@pytest.mark.parity
def test_gradients_of_all_parameters_are_those_of_transformers(pair):
    import torch

    theirs, ours = pair
    batch = _batch()
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(3, 5, 16)).astype(np.float32) / 10
    other = rng.normal(size=(3, 7, 16)).astype(np.float32) / 10

    def loss(params):
        out = ours.module.apply({"params": params}, batch)
        return jnp.sum(out["tokens"] * weight) + jnp.sum(out["encoder"] * other)

    found = theirs(**to_torch(batch))
    total = (found.last_hidden_state * torch.tensor(weight)).sum()
    total = total + (found.encoder_last_hidden_state * torch.tensor(other)).sum()
    same_gradients(ours, loss, theirs, total)


@pytest.mark.parity
def test_bfloat16_stays_near_transformers(pair):
    import torch

    theirs, ours = pair
    batch = _batch()
    module = ours.module.clone(dtype=jnp.bfloat16)
    out = jax.jit(module.apply)({"params": ours.params}, batch)
    assert out["tokens"].dtype == out["encoder"].dtype == jnp.bfloat16
    with torch.no_grad():
        close(out["tokens"], theirs(**to_torch(batch)).last_hidden_state, 0.05)


HEADS = {
    "first": ("T5ForConditionalGeneration", {}, True, 0.25),
    "v1.1": ("T5ForConditionalGeneration", V1_1, False, 1.0),
    "mt5": ("MT5ForConditionalGeneration", V1_1, False, 1.0),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", HEADS)
def test_sequence_to_sequence_is_that_of_transformers_and_goes_back(name, tmp_path):
    import torch
    import transformers

    class_name, changes, tied, scale = HEADS[name]
    theirs = peer(class_name, tmp_path / "theirs", **{**CONFIG, **changes})
    if not tied:  # transformers 5 ties what it makes; published files have a kernel of its own
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(31, 16) * 0.3)
        theirs.all_tied_weights_keys.pop("lm_head.weight")
        theirs.save_pretrained(tmp_path / "theirs")
    batch = _batch()
    with torch.no_grad():
        expected = theirs(**to_torch(batch)).logits
    ours = load_backbone(tmp_path / "theirs")
    module, params = load_head(tmp_path / "theirs", ours, "sequence_to_sequence")
    assert (module.tied, module.scale) == (tied, scale)
    model = attach(ours, {"head": module}, key=jax.random.key(0))
    model.params["heads"]["head"] = params
    out, _ = jax.jit(model.apply)(model.params, model.stats, batch)
    close(out["head"], expected)
    export(tmp_path / "ours", model)
    opened, report = getattr(transformers, class_name).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        close(opened.eval()(**to_torch(batch)).logits, expected)
    again = import_model(tmp_path / "ours")
    assert again.heads["head"] == module
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


@pytest.mark.parity
def test_the_encoder_alone_is_that_of_transformers(tmp_path):
    import torch
    import transformers

    theirs = peer("T5EncoderModel", tmp_path / "theirs", **{**CONFIG, **V1_1})
    batch = _source(_batch())
    with torch.no_grad():
        expected = theirs(**to_torch(batch), output_hidden_states=True)
    ours = load_backbone(tmp_path / "theirs")  # by the class that the folder states
    assert ours.family.model_type == "t5_encoder" and not ours.report.fresh
    found = jax.jit(lambda params: _borders(ours.module, params, batch))(ours.params)
    for got, hidden in zip(found[:-1], expected.hidden_states[:-1], strict=True):
        close(got, hidden)
    close(ours(batch)["tokens"], expected.last_hidden_state)
    weight = np.random.default_rng(1).normal(size=(3, 7, 16)).astype(np.float32) / 10

    def loss(params):
        return jnp.sum(ours.module.apply({"params": params}, batch)["tokens"] * weight)

    last = theirs(**to_torch(batch)).last_hidden_state
    same_gradients(ours, loss, theirs, (last * torch.tensor(weight)).sum())
    export(tmp_path / "ours", attach(ours, {"head": Linear(3)}, key=jax.random.key(0)))
    opened, report = transformers.T5EncoderModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        close(opened.eval()(**to_torch(batch)).last_hidden_state, expected.last_hidden_state)
    assert import_model(tmp_path / "ours").backbone.family.model_type == "t5_encoder"


@pytest.mark.parity
def test_the_encoder_of_a_whole_checkpoint_and_its_tagger(tmp_path):
    import torch

    peer("T5Model", tmp_path / "whole", **CONFIG)
    alone = load_backbone(tmp_path / "whole", family="t5_encoder")
    whole, batch = load_backbone(tmp_path / "whole"), _batch()
    close(alone(_source(batch))["tokens"], np.asarray(whole(batch)["encoder"]))
    labels = {i: str(i) for i in range(3)}
    theirs = peer("T5ForTokenClassification", tmp_path / "tags", **CONFIG, id2label=labels)
    model = import_model(tmp_path / "tags")
    out, _ = model.apply(model.params, model.stats, _source(batch))
    with torch.no_grad():
        expected = theirs(**to_torch(_source(batch))).logits
    close(out["head"], expected)
    export(tmp_path / "ours", model)
    opened = type(theirs).from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        close(opened(**to_torch(_source(batch))).logits, expected)


@pytest.mark.parity
@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (64, 256)])
def test_buckets_are_those_of_transformers(both_ways, buckets, farthest):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    ahead = np.arange(-2000, 2001)
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(ahead), both_ways, buckets, farthest
    )
    ours = relative_buckets(ahead, buckets=buckets, farthest=farthest, both_ways=both_ways)
    np.testing.assert_array_equal(ours, theirs.numpy())


_SMALL = dict(d_model=512, d_ff=2048, d_kv=64, num_heads=8, num_layers=6, vocab_size=32128)
_GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
PUBLISHED = {
    "t5-small": ("t5", _SMALL, 131),
    "t5-v1_1-base": (
        "t5",
        dict(
            _GATED, d_model=768, d_ff=2048, d_kv=64, num_heads=12, num_layers=12, vocab_size=32128
        ),
        281,
    ),
    "mt5-small": (
        "mt5",
        dict(_GATED, d_model=512, d_ff=1024, d_kv=64, num_heads=6, num_layers=8, vocab_size=250112),
        189,
    ),
    "byt5-small": (
        "t5",
        dict(_GATED, d_model=1472, d_ff=3584, d_kv=64, num_heads=6, num_layers=12, vocab_size=384)
        | dict(num_decoder_layers=4),
        169,
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_at_the_published_sizes(name):
    model_type, config, leaves = PUBLISHED[name]
    class_name = "MT5Model" if model_type == "mt5" else "T5Model"
    assert names_agree(class_name, model_type, **config) == leaves
