"""Heads on tokens: values by hand, dropout where live, folders that give them back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import backbone
from flax.traverse_util import flatten_dict

from jtl.models.export import export, import_model
from jtl.models.heads import ReplacedToken, Span, TokenLinear, TokenProjection, TwoLayer
from jtl.models.model import attach

TOKENS = jnp.array([[[1.0, -2.0], [3.0, 4.0]]])
EYE = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}


@pytest.mark.parametrize(
    ("activation", "expected"),
    [("relu", [[1.5]]), ("tanh", [[np.tanh(1) + 10 * np.tanh(-2) + 0.5]])],
)
def test_two_layers_read_the_first_token(activation, expected):
    last = {"kernel": jnp.array([[1.0], [10.0]]), "bias": jnp.array([0.5])}
    head = TwoLayer(1, activation)
    logits = head.apply({"params": {"dense": EYE, "out_proj": last}}, {"tokens": TOKENS}, {})
    np.testing.assert_allclose(logits, expected, rtol=1e-6)


def test_a_tag_for_each_token():
    kernel = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    params = {"classifier": {"kernel": kernel, "bias": jnp.array([0.0, 0.0, 5.0])}}
    logits = TokenLinear(3).apply({"params": params}, {"tokens": TOKENS}, {})
    np.testing.assert_allclose(logits, [[[1.0, -2.0, 4.0], [3.0, 4.0, 12.0]]])


def test_a_span_has_two_ends():
    logits = Span().apply({"params": {"qa_outputs": EYE}}, {"tokens": TOKENS}, {})
    np.testing.assert_allclose(logits, TOKENS)
    assert Span().outputs == 2


def test_a_projection_normalises_between_its_layers():
    norm = {"scale": jnp.ones(2), "bias": jnp.array([1.0, 1.0])}
    double = {"kernel": 2 * jnp.eye(2), "bias": jnp.zeros(2)}
    params = {"dense_to_hidden": EYE, "LayerNorm": norm, "dense_to_output": double}
    # GELU keeps the order of 1 and -2, LayerNorm makes them (1, -1).
    got = TokenProjection(2).apply({"params": params}, {"tokens": TOKENS}, {})
    np.testing.assert_allclose(got, [[4.0, 0.0]], atol=1e-5)


@pytest.mark.parametrize(
    "head", [TwoLayer(3, dropout=0.5), TokenLinear(3, dropout=0.5), Span(dropout=0.5)]
)
def test_dropout_is_where_the_head_is_live(head):
    out = {"tokens": jnp.ones((2, 3, 8))}
    params = head.init(jax.random.key(0), out, {})
    held = head.apply(params, out, {})
    rngs = {"dropout": jax.random.key(1)}
    np.testing.assert_array_equal(held, head.apply(params, out, {}, False, rngs=rngs))
    assert not np.array_equal(held, head.apply(params, out, {}, True, rngs=rngs))


def test_the_first_dropout_of_two_layers_can_be_left_out():
    out = {"tokens": jnp.ones((1, 1, 64))}
    rngs = {"dropout": jax.random.key(1)}

    def zeros(first):
        head = TwoLayer(64, "relu", dropout=0.5, first=first)
        params = head.init(jax.random.key(0), out, {})
        # The sum of a row of ones, once; what the first dropout takes is missing from it.
        dense = {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}
        last = {"kernel": jnp.eye(64), "bias": jnp.zeros(64)}
        params = {"params": {"dense": dense, "out_proj": last}}
        return np.unique(np.asarray(head.apply(params, out, {}, True, rngs=rngs)))

    np.testing.assert_allclose(zeros(first=False), [0.0, 128.0])
    assert zeros(first=True)[1] != 128.0


@pytest.mark.parametrize("start", ["zeros", "normal"])
def test_start_is_of_the_last_layer(start):
    out = {"tokens": jnp.ones((1, 1, 8))}
    for head in (TwoLayer(3, start=start), TokenLinear(3, start=start), Span(start=start)):
        params = flatten_dict(head.init(jax.random.key(0), out, {})["params"], sep="/")
        last = next(p for n, p in params.items() if n.endswith("kernel") and "dense" not in n)
        assert bool(jnp.any(last != 0)) == (start == "normal")


HEADS = {
    "TwoLayer": (TwoLayer(3), "RobertaForSequenceClassification"),
    "other": (TwoLayer(3, "gelu"), "RobertaModel"),
    "TokenLinear": (TokenLinear(4), "RobertaForTokenClassification"),
    "Span": (Span(), "RobertaForQuestionAnswering"),
    "ReplacedToken": (ReplacedToken(), "RobertaModel"),
    "TokenProjection": (TokenProjection(6), "RobertaModel"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_folder_gives_the_head_back_under_its_class(tmp_path, name):
    head, class_name = HEADS[name]
    model = attach(backbone("roberta"), {"head": head}, key=jax.random.key(1))
    again = import_model(export(tmp_path / "x", model))
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    assert again.heads["head"] == head
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["architectures"] == [class_name]
    if class_name != "RobertaModel":
        assert len(config["id2label"]) == head.outputs
