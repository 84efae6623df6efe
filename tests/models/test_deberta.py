"""DeBERTa v2 and v3: values by hand, names, stages; parity with transformers' PyTorch models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from torch_oracle import close, names_agree, peer, same_gradients, to_torch

from jtl.models.backbone import column, stage_labels
from jtl.models.export import export, import_model
from jtl.models.families.deberta import DEBERTA_V2 as FAMILY
from jtl.models.families.deberta import deberta_config
from jtl.models.heads import Linear
from jtl.models.layers.disentangled import DisentangledAttention, RelativePlaces, place_rows
from jtl.models.load import load_backbone, new_backbone
from jtl.models.load_head import load_head
from jtl.models.model import attach

CONFIG = dict(
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
    type_vocab_size=0,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    initializer_range=0.3,
    layer_norm_eps=1e-7,
    relative_attention=True,
    position_buckets=4,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    pos_att_type="p2c|c2p",
    position_biased_input=False,
)
# What published configs differ in: v3, v2-xlarge with its convolution, and the older options.
VARIANTS = {
    "v3": {},
    "xlarge": dict(conv_kernel_size=3, conv_act="gelu"),
    "own projections": dict(share_att_key=False, norm_rel_ebd="none", position_buckets=-1),
    "c2p alone": dict(share_att_key=False, pos_att_type=["c2p"], max_relative_positions=5),
    "p2c alone": dict(pos_att_type=["p2c"], position_buckets=3),
    "absolute": dict(
        relative_attention=False,
        pos_att_type=None,
        position_biased_input=True,
        type_vocab_size=2,
        embedding_size=8,
        norm_rel_ebd="none",
    ),
}
_LAYER = {
    "attention/output/LayerNorm/bias": (16,),
    "attention/output/LayerNorm/scale": (16,),
    "attention/output/dense/bias": (16,),
    "attention/output/dense/kernel": (16, 16),
    **{f"attention/self/{n}_proj/bias": (16,) for n in ("key", "query", "value")},
    **{f"attention/self/{n}_proj/kernel": (16, 16) for n in ("key", "query", "value")},
    "intermediate/dense/bias": (24,),
    "intermediate/dense/kernel": (16, 24),
    "output/LayerNorm/bias": (16,),
    "output/LayerNorm/scale": (16,),
    "output/dense/bias": (16,),
    "output/dense/kernel": (24, 16),
}
GOLDEN = {
    "embeddings/LayerNorm/bias": (16,),
    "embeddings/LayerNorm/scale": (16,),
    "embeddings/word_embeddings/embedding": (31, 16),
    "encoder/LayerNorm/bias": (16,),
    "encoder/LayerNorm/scale": (16,),
    "encoder/conv/LayerNorm/bias": (16,),
    "encoder/conv/LayerNorm/scale": (16,),
    "encoder/conv/conv/bias": (16,),
    "encoder/conv/conv/kernel": (3, 16, 16),
    "encoder/rel_embeddings/embedding": (8, 16),
    **{f"encoder/layer/{i}/{name}": shape for i in range(2) for name, shape in _LAYER.items()},
}


def _batch(n=3, length=7, padding=2, types=False):
    """Rows of `length` tokens, the first of them ending in padding; no token is 0.

    PyTorch's embedding lets no gradient reach the row of the padding token.
    """
    rng = np.random.default_rng(0)
    mask = np.ones((n, length), np.int32)
    mask[0, length - padding :] = 0
    batch = {"input_ids": rng.integers(1, 31, (n, length)).astype(np.int32), "attention_mask": mask}
    if types:
        batch["token_type_ids"] = rng.integers(0, 2, (n, length)).astype(np.int32)
    return {name: jnp.asarray(value) for name, value in batch.items()}


@pytest.fixture(scope="module")
def made():
    """The variant with everything in it."""
    config = {**CONFIG, **VARIANTS["xlarge"]}
    return new_backbone("deberta-v2", config, key=jax.random.key(0))


def test_golden_tree(made):
    flat = flatten_dict(made.params, sep="/")
    assert {name: leaf.shape for name, leaf in flat.items()} == GOLDEN


def test_groups_go_from_stem_to_the_last_block(made):
    assert made.labels == stage_labels(2)[:-1] and made.dim == 16
    assert dict(made.groups)["encoder/conv/.*"] == "block_0"
    assert dict(made.groups)["encoder/rel_embeddings/.*"] == "stem"


def _by_loops(query, key, key_places, query_places, rows, size):
    """Equation 4 of the paper, one pair of words at a time."""
    length = len(query)
    scores = np.zeros((length, length))
    for i in range(length):
        for j in range(length):
            place = rows(i - j)
            scores[i, j] = query[i] @ key[j] + query[i] @ key_places[place]
            scores[i, j] += key[j] @ query_places[place]
    return scores / np.sqrt(3 * size)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_attention_is_the_equation_of_the_paper(length):
    places = RelativePlaces(span=3, farthest=3, bucketed=False)
    layer = DisentangledAttention(4, 1, ("c2p", "p2c"), places, scale=1.0)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, length, 4)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    variables = layer.init(jax.random.key(1), hidden, table, None, False)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])

    def through(name, x):
        return np.asarray(x, np.float64) @ params[name]["kernel"] + params[name]["bias"]

    query, key = through("query_proj", hidden[0]), through("key_proj", hidden[0])
    places_of = (through("pos_key_proj", table), through("pos_query_proj", table))
    # Distances from -3 to 2 have the rows 0 to 5; what is farther has the last one on its side.
    scores = _by_loops(query, key, *places_of, lambda d: int(np.clip(d + 3, 0, 5)), 4)
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    got = layer.apply(variables, hidden, table, None, False)
    np.testing.assert_allclose(got[0], shares @ through("value_proj", hidden[0]), atol=1e-5)


def test_only_the_places_of_the_length_are_projected():
    rows, among = place_rows(6, RelativePlaces(span=256, farthest=512, bucketed=True))
    assert rows.tolist() == list(range(250, 263))
    assert rows[among].shape == (2, 12)
    assert rows[among][0].tolist() == list(range(261, 249, -1))
    long, _ = place_rows(512, RelativePlaces(span=256, farthest=512, bucketed=True))
    assert len(long) <= 512


def test_padding_changes_nothing_at_real_positions(made):
    batch = _batch()
    padded = made(batch)
    plain = made({name: value[:1, :5] for name, value in batch.items()})
    np.testing.assert_allclose(padded["tokens"][:1, :5], plain["tokens"], atol=2e-6)
    bare = made({"input_ids": batch["input_ids"][1:]})
    np.testing.assert_allclose(padded["tokens"][1:], bare["tokens"], atol=2e-6)


def test_poolings(made):
    batch = _batch()
    first = made(batch)
    np.testing.assert_array_equal(first["pooled"], first["tokens"][:, 0])
    mean = made.module.clone(pooling="mean").top(first["tokens"], batch)["pooled"]
    np.testing.assert_allclose(mean[0], first["tokens"][0, :5].mean(0), atol=1e-6)


def test_rematerialised_blocks_read_the_table(made):
    # A block that did not get the table would miss a parameter.
    plain, batch = attach(made, {"head": Linear(2)}, key=jax.random.key(1)), _batch()
    live = frozenset({"head", *plain.groups})
    outs = [
        jax.jit(lambda p, m=model: m.apply(p, {}, batch, key=jax.random.key(2), live=live)[0])(
            plain.params
        )
        for model in (plain, plain.computing(remat=True))
    ]
    np.testing.assert_allclose(outs[0]["head"], outs[1]["head"], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pos_att_type="p2p"), "pos_att_type='p2p'; the encoder here has 'c2p' and 'p2c'"),
        (dict(pos_att_type=None), "pos_att_type=None"),
        (dict(norm_rel_ebd="rms"), "norm_rel_ebd='rms'"),
        (dict(conv_kernel_size=2), "conv_kernel_size=2; the encoder here has odd kernels"),
        (dict(attention_head_size=4), "attention_head_size=4"),
        (dict(hidden_size=None), r"the DeBERTa config lacks \['hidden_size'\]"),
        (dict(num_attention_heads=5), "num_attention_heads=5 does not divide hidden_size=16"),
        (dict(conv_act="gleu"), "activation 'gleu' is not known"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        deberta_config({**CONFIG, **changes})


def test_both_spellings_of_the_masked_lm_head_are_one():
    from jtl.weights.rename import normalise

    def names(prefix):
        parts = ("dense.weight", "LayerNorm.bias", "bias")
        return [normalise(f"{prefix}.{part}", FAMILY.aliases) for part in parts]

    assert names("lm_predictions.lm_head") == [
        "cls.predictions.transform.dense.weight",
        "cls.predictions.transform.LayerNorm.bias",
        "cls.predictions.bias",
    ]


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def pair(request, tmp_path_factory):
    """A peer, our backbone of its folder, and a batch, for each variant."""
    folder = tmp_path_factory.mktemp("deberta")
    changes = VARIANTS[request.param]
    theirs = peer("DebertaV2Model", folder, **{**CONFIG, **changes})
    return theirs, load_backbone(folder), _batch(types=bool(changes.get("type_vocab_size")))


def _borders(module, params, batch):
    """The activations at each border of two blocks, in one forward pass."""
    found = []
    for stop in (1, 2, 3):
        start = {column(stop - 1, 2): found[-1]} if found else {}
        found.append(module.apply({"params": params}, {**batch, **start}, frozenset(), stop))
    return found


@pytest.mark.parity
def test_every_hidden_state_is_that_of_transformers(pair):
    import torch

    theirs, ours, batch = pair
    assert not ours.report.fresh and not ours.report.unexpected
    with torch.no_grad():
        expected = theirs(**to_torch(batch), output_hidden_states=True)
    # Padding too: a query that is padding sees all keys alike.
    found = jax.jit(lambda params: _borders(ours.module, params, batch))(ours.params)
    for got, hidden in zip(found, expected.hidden_states, strict=True):
        close(got, hidden)


@pytest.mark.parity
@pytest.mark.parametrize("pair", ["xlarge"], indirect=True)
def test_another_length_is_that_of_transformers(pair):
    import torch

    theirs, ours, _ = pair
    batch = _batch(2, 12, 9)
    with torch.no_grad():
        expected = theirs(**to_torch(batch)).last_hidden_state
    close(ours(batch)["tokens"], expected)


@pytest.mark.parity
def test_gradients_of_all_parameters_are_those_of_transformers(pair):
    import torch

    theirs, ours, batch = pair
    weight = np.random.default_rng(1).normal(size=(3, 7, 16)).astype(np.float32) / 10

    def loss(params):
        return jnp.sum(ours.module.apply({"params": params}, batch)["tokens"] * weight)

    found = theirs(**to_torch(batch)).last_hidden_state
    same_gradients(ours, loss, theirs, (found * torch.tensor(weight)).sum())


@pytest.mark.parity
@pytest.mark.parametrize("pair", ["xlarge"], indirect=True)
def test_bfloat16_stays_near_transformers(pair):
    import torch

    theirs, ours, batch = pair
    module = ours.module.clone(dtype=jnp.bfloat16)
    out = jax.jit(module.apply)({"params": ours.params}, batch)["tokens"]
    assert out.dtype == jnp.bfloat16
    with torch.no_grad():
        close(out, theirs(**to_torch(batch)).last_hidden_state, 0.05)


HEADS = {
    "masked_lm": ("DebertaV2ForMaskedLM", {}),
    "masked_lm of the published names": ("DebertaV2ForMaskedLM", dict(legacy=False)),
    "classification": (
        "DebertaV2ForSequenceClassification",
        dict(id2label={i: str(i) for i in range(3)}, pooler_hidden_act="tanh"),
    ),
    "token_classification": (
        "DebertaV2ForTokenClassification",
        dict(id2label={i: str(i) for i in range(3)}),
    ),
    "question_answering": ("DebertaV2ForQuestionAnswering", {}),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", HEADS)
def test_heads_are_those_of_transformers_and_go_back(name, tmp_path):
    import torch
    import transformers

    class_name, changes = HEADS[name]
    kind = name.split()[0]
    theirs = peer(class_name, tmp_path / "theirs", **{**CONFIG, **changes})
    batch = _batch()

    def logits(model):
        with torch.no_grad():
            out = model(**to_torch(batch))
        if kind == "question_answering":
            return torch.stack([out.start_logits, out.end_logits], -1)
        return out.logits

    expected = logits(theirs)
    ours = load_backbone(tmp_path / "theirs")
    module, params = load_head(tmp_path / "theirs", ours, kind)
    model = attach(ours, {"head": module}, key=jax.random.key(0))
    model.params["heads"]["head"] = params
    out, _ = jax.jit(model.apply)(model.params, model.stats, batch)
    close(out["head"], expected)
    export(tmp_path / "ours", model)
    opened, report = getattr(transformers, class_name).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    close(logits(opened.eval()), expected)
    again = import_model(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


V3_BASE = dict(
    attention_probs_dropout_prob=0.1,
    hidden_act="gelu",
    hidden_dropout_prob=0.1,
    hidden_size=768,
    initializer_range=0.02,
    intermediate_size=3072,
    max_position_embeddings=512,
    relative_attention=True,
    position_buckets=256,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    pos_att_type="p2c|c2p",
    layer_norm_eps=1e-7,
    max_relative_positions=-1,
    position_biased_input=False,
    num_attention_heads=12,
    num_hidden_layers=12,
    type_vocab_size=0,
    vocab_size=128100,
)
V2_XLARGE = dict(
    V3_BASE,
    hidden_size=1536,
    intermediate_size=6144,
    num_attention_heads=24,
    num_hidden_layers=24,
    conv_kernel_size=3,
    conv_act="gelu",
    attention_head_size=64,
)


@pytest.mark.parity
@pytest.mark.parametrize(("config", "leaves"), [(V3_BASE, 198), (V2_XLARGE, 394)])
def test_names_and_shapes_at_the_published_sizes(config, leaves):
    assert names_agree("DebertaV2Model", "deberta-v2", **config) == leaves
